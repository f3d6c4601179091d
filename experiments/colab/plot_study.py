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
# # A study from its frozen records
#
# Reads the records that a study keeps in `results/`, fits its laws and draws them. Nothing is trained. Under two
# minutes on two cores. The whole page: `python -m recscale.scaling.report experiments/0004_four_axes_real`.

# %%
# Install. In Colab, put the address of your copy of recscale here; elsewhere nothing is installed.
REPOSITORY = ""
try:
    import recscale
except ImportError:
    if not REPOSITORY:
        raise SystemExit("recscale is not installed: set REPOSITORY to the git address of your copy") from None
    # %pip install -q git+{REPOSITORY}
    # !git clone -q --depth 1 {REPOSITORY} recscale_source
    import recscale  # noqa: F401

# %%
# %matplotlib inline
import os
from pathlib import Path

from recscale.scaling import answers, figure_files, figures_axes, figures_checks, figures_surface, study, study_file

# %%
STUDY = "0004_four_axes_real"
GROUP = 4  # which group of the study: a log and a model
places = [
    Path(os.environ.get("RECSCALE_STUDIES", ".")),
    Path("recscale_source/experiments"),
    Path(".."),
    Path("experiments"),
]
folder = next((place / STUDY for place in places if (place / STUDY / "study.yaml").exists()), None)
if folder is None:
    raise SystemExit(
        f"found no {STUDY}/study.yaml in {', '.join(map(str, places))}: set RECSCALE_STUDIES to its folder"
    )
spec = study_file.read_spec(folder)
records, source = study.read_runs(folder)
tables = study.rows_of(spec, records, source)
print(spec.question)
for number, group in enumerate(tables.groups):
    print(
        f"{number}: {group.name}, {len(group.fitted_rows)} fitted, {len(group.held_out_rows)} held out. {group.problem}"
    )

# %% [markdown]
# ## The law of one group, and what it may not be called

# %%
found = answers.answer(spec, tables.groups[GROUP], draws=200)
comparison = found.evidence.comparison
if comparison is None:
    raise SystemExit(f"{found.group.name}: {found.problem}")
print(comparison.text)
for law in comparison.laws:
    print(f"\n{law.form}: {law.formula}   {'certified' if law.certified else 'refused: ' + '; '.join(law.reasons)}")
    for name, value in law.params.items():
        low, high = law.intervals[name]
        print(f"   {name:16} {value:>12.5g}   90 % {low:.4g} to {high:.4g}   {law.verdicts.get(name, '')}")
if found.evidence.held_out is not None:
    print("\nheld out:", found.evidence.held_out.text())

# %%
figure_files.figure_of(figures_axes.loss_by_axis(spec, found), folder.name)

# %%
figure_files.figure_of(figures_axes.gain_per_doubling(spec, [found]), folder.name)

# %%
figure_files.figure_of(figures_surface.contours(spec, found), folder.name)

# %%
figure_files.figure_of(figures_checks.residuals(spec, found), folder.name)
