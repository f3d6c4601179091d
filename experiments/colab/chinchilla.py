# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # The Chinchilla points, and the published answer
#
# 240 runs of Hoffmann et al. (arXiv 2203.15556), read off their figure by Besiroglu et al. (arXiv 2404.10102). The law
# is L(N, D) = E + A/N^alpha + B/D^beta, the loss Huber's on logarithms with delta 1e-3. Under two minutes on two cores.

# %%
# Install. In Colab, put the address of your copy of recscale here; elsewhere nothing is installed.
REPOSITORY = ""
try:
    import recscale
except ImportError:
    if not REPOSITORY:
        raise SystemExit(
            "recscale is not installed: set REPOSITORY to the git address of your copy and run again"
        ) from None
    # %pip install -q git+{REPOSITORY}
    import recscale  # noqa: F401

# %%
import os
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from pyarrow import csv

from recscale.scaling import allocate, fits, validate
from recscale.scaling.points import Points

# %% [markdown]
# ## The runs
#
# From the folder that `RECSCALE_DATA` names, or a CSV you upload as `chinchilla.csv` (columns `params`, `tokens`,
# `loss`). Where neither is there, a made-up twin of the same size stands in, and the answer is that of the twin.

# %%
places = [Path(os.environ.get("RECSCALE_DATA", ".")) / "scaling" / "chinchilla_epoch.csv", Path("chinchilla.csv")]
found = next((place for place in places if place.exists()), None)
if found is not None:
    table = csv.read_csv(found)
    size, tokens, loss = (table[name].to_numpy() for name in ("params", "tokens", "loss"))
    kept = loss < np.sort(loss)[-5]  # the replication leaves out the five runs of highest loss
    size, tokens, loss = size[kept], tokens[kept], loss[kept]
else:
    print("The real runs are not at hand: these are made up.")
    rng = np.random.default_rng(0)
    size, tokens = np.exp(rng.uniform(18, 23.5, 240)), np.exp(rng.uniform(21.5, 26.5, 240))
    loss = (1.8172 + 482 * size**-0.3478 + 2085 * tokens**-0.3658) * np.exp(0.004 * rng.standard_t(3, 240))
points = Points.of({"params": size, "tokens": tokens}, loss)
print(len(points), "runs")

# %% [markdown]
# ## The law, with its certificate
#
# A fit that is not a minimum, or that the points do not carry, raises an error instead of a number.

# %%
law = fits.fit(points, "additive", delta=1e-3)
print(f"objective {law.objective:.13f}   scaled gradient {law.certificate.gradient:.1e}   {law.bootstrap} bootstrap")
for name, value in law.params.items():
    low, high = law.intervals[name]
    print(f"{name:14} {value:>14.7g}   90 % {low:.4g} to {high:.4g}   {law.verdicts.get(name, '')}")
alpha, beta = law.params["alpha_params"], law.params["alpha_tokens"]
print(f"N* grows as C^{beta / (alpha + beta):.4f}")

# %% [markdown]
# The published parameters (482.01, 2085.43, 1.8172, .3478, .3658) are the least-absolute-deviation fit, not the minimum
# of this loss. Both, side by side, with the choice of delta:

# %%
print(f"{'choice':36}{'E':>9}{'A':>10}{'B':>10}{'alpha':>9}{'beta':>9}")
print(
    f"{'Huber, delta 1e-3':36}" + "".join(f"{v:>{w}.5g}" for v, w in zip(law.params_P, (9, 10, 10, 9, 9), strict=True))
)
for choice, other, problem in validate.sensitivity(points, law).rows:
    values = (
        "".join(f"{v:>{w}.5g}" for v, w in zip(other.params_P, (9, 10, 10, 9, 9), strict=True)) if other else problem
    )
    print(f"{choice:36}{values}")

# %% [markdown]
# ## Against other forms
#
# The logarithmic null is always among them.

# %%
comparison = fits.compare(points, ("additive", "additive_shared", "gamma", "log"), delta=1e-3, draws=300)
for one in comparison.laws:
    print(f"{one.form:16} AICc {one.delta_aicc:8.1f} above the best")
print(comparison.text)

# %% [markdown]
# ## How to spend a budget
#
# Compute-optimal sizes with their 90 % band, under C = 6 N D.

# %%
flops = allocate.product_cost(6, "params", "tokens")
frontier = allocate.frontier(law, flops, np.geomspace(1e19, 1e24, 6), name="FLOPs")
figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
for axis in law.axes:
    best, low, high = frontier.sizes[axis]
    axes.plot(frontier.budget_B, best, label=f"best {axis}")
    axes.fill_between(frontier.budget_B, low, high, alpha=0.2)
axes.set(xscale="log", yscale="log", xlabel="training FLOPs", title="Compute-optimal sizes, 90 % band")
axes.legend()
best = allocate.minimise(law, {"FLOPs": (flops, 5.76e23)})
print(
    {axis: f"{value:.4g}" for axis, value in best.sizes.items()},
    f"tokens per parameter {best.sizes['tokens'] / best.sizes['params']:.2f}",
)

# %% [markdown]
# ## Does it predict?
#
# Fitted to the cheapest runs, tested on all dearer ones: good predictions coexist with loose parameters.

# %%
compute = 6 * size * tokens
rollout = validate.rollout(
    points, "params", "additive", along=validate.rollout_levels(compute, 6), delta=1e-3, draws=200
)
for level, count, prediction in rollout.steps:
    print(f"up to {level:.1e} FLOPs ({count} runs): {prediction.text()}")
try:
    validate.project(law, {"params": 1e13, "tokens": 1e14})
except validate.TooFar as error:
    print("refused:", error)
