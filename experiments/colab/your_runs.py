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
# # A law for your own runs
#
# Any table of runs: one row per run, a column per size, a column for the metric. Upload it, name the columns in the
# second cell, run all. As it stands the notebook makes up a small recommender study, to show what comes out.

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
TABLE = "my_runs.csv"  # CSV or parquet
SIZES = {"encoder": "encoder_parameters", "table": "table_parameters", "data": "events"}  # axis -> column
METRIC = "loss"
HELD_OUT = "held_out"  # column with 1 for the largest runs, which no fit may see; "" for none

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from pyarrow import csv, parquet
from scipy.stats import qmc

from recscale.scaling import allocate, fits, law_file, validate
from recscale.scaling.points import Points

# %%
if not Path(TABLE).exists():
    print(f"{TABLE} is not there: making up 44 runs of a recommender (floor 4.9 nats).")
    low, high = np.log([1e4, 1e5, 1e5]), np.log([1e6, 1e7, 1e7])
    unit = qmc.Sobol(3, rng=np.random.default_rng(0)).random(64)[:40]
    rung = np.log([[8e6, 3e7, 8e7], [4e6, 8e7, 8e7], [8e6, 8e7, 3e7], [8e6, 8e7, 8e7]])
    encoder, table, events = np.exp(np.concatenate([low + unit * (high - low), rung])).T
    nats = 4.9 + 14 * encoder**-0.4 + 30 * table**-0.4 + 60 * events**-0.38
    nats *= np.exp(0.0006 * np.random.default_rng(1).standard_normal(len(nats)))
    rows = [
        f"r{i},{a:.0f},{b:.0f},{c:.0f},{y:.5f},{int(i >= 40)}"
        for i, (a, b, c, y) in enumerate(zip(encoder, table, events, nats, strict=True))
    ]
    Path(TABLE).write_text("\n".join(["run,encoder_parameters,table_parameters,events,loss,held_out", *rows]) + "\n")

# %%
runs = parquet.read_table(TABLE) if TABLE.endswith(".parquet") else csv.read_csv(TABLE)
missing = [
    column for column in [*SIZES.values(), METRIC, *([HELD_OUT] if HELD_OUT else [])] if column not in runs.column_names
]
if missing:
    raise SystemExit(
        f"{TABLE} has no column {', '.join(missing)}; it has {', '.join(runs.column_names)}: change the cell above"
    )
points = Points.of(
    {axis: runs[column].to_numpy() for axis, column in SIZES.items()},
    runs[METRIC].to_numpy(),
    held_out=runs[HELD_OUT].to_numpy() > 0 if HELD_OUT else None,
    metric=METRIC,
)
print(f"{len(points.fitted)} runs to fit, {len(points.held_out)} held out")

# %% [markdown]
# ## Which form do the runs carry?

# %%
comparison = fits.compare(points, ("additive", "additive_shared", "log"), draws=500)
print(comparison.text)
for one in comparison.laws:
    print(f"\n{one.form}: {one.formula}   ΔAICc {one.delta_aicc:.1f}   {'certified' if one.certified else 'refused'}")
    for name, value in one.params.items():
        low, high = one.intervals[name]
        print(f"   {name:16} {value:>12.5g}   90 % {low:.4g} to {high:.4g}   {one.verdicts.get(name, '')}")
law = comparison.best

# %% [markdown]
# ## What to scale next
#
# The gain of a doubling is well known even where exponents are not.

# %%
if law is None:
    print("No law may be quoted. The sentence above says what would make the runs carry one.")
else:
    gains = allocate.doublings(law)
    figure, axes = plt.subplots(figsize=(6.5, 2.6), layout="constrained")
    for place, row in enumerate(reversed(gains)):
        axes.barh(place, row.gain.value, color="#8fb4dc")
        axes.plot([row.gain.low, row.gain.high], [place, place], color="#1f2933")
    axes.set_yticks(range(len(gains)), [row.axis for row in reversed(gains)])
    axes.set_xlabel(f"{METRIC} gained by the next doubling, 90 %")

# %% [markdown]
# ## Does it predict the runs it never saw?

# %%
if law is not None and len(points.held_out):
    print(validate.held_out_test(law, points).text())

# %% [markdown]
# ## The next runs to train, and a law file for others
#
# Runs that shrink the interval at a target most per unit of cost. Replace the cost by yours.

# %%
if law is not None:
    corner = law.corner()
    target = {axis: 4 * size for axis, size in corner.items()}
    steps = np.geomspace(0.05, 2.0, 6)
    grid = np.stack(np.meshgrid(*(steps * corner[axis] for axis in law.axes), indexing="ij"), -1).reshape(
        -1, len(law.axes)
    )
    cost = allocate.product_cost(1.0, *law.axes[:1], *law.axes[-1:])
    candidates = {axis: grid[:, i] for i, axis in enumerate(law.axes)}
    budget = 6 * float(cost(corner))
    for point in allocate.next_points(law, candidates, target, cost=cost, budget=budget, most=4):
        print(
            {axis: f"{value:.3g}" for axis, value in point.sizes.items()},
            f"leaves {point.width_left:.0%} of the interval",
        )
    print(validate.project(law, target).text, validate.project(law, target).value_M)
    law_file.save_law(law, "law.json")
