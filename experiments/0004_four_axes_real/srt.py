"""The only public recommender scaling runs, refitted: 119 runs of SASRec on Amazon subsamples (mercadolibre/srt, MIT).

    RECSCALE_DATA=DIR python experiments/0004_four_axes_real/srt.py

Reads DIR/scaling/srt_runs.parquet, takes the best NDCG@5 of every (encoder size, data size) cell and fits
R0 - A/N^a - B/D^b and the logarithmic null, with and without the three encoder sizes that are out of line, and with the
two largest data sizes held out. Writes srt.md beside this file. The runs themselves are not kept here.
"""

import os
import sys
from pathlib import Path

import numpy as np
from pyarrow import parquet

from recscale.scaling import fits, validate
from recscale.scaling.law import Law
from recscale.scaling.points import Points

HERE = Path(__file__).parent
OUT_OF_LINE = (16_672, 62_016, 213_312)  # larger than a neighbour and worse: depth without width
HELD_OUT_FROM = 4e6  # training interactions


def cells() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Encoder parameters, training interactions and best validation NDCG@5 of each cell; exits without the data."""
    if "RECSCALE_DATA" not in os.environ:
        sys.exit("error: RECSCALE_DATA is not set: it names the folder that has scaling/srt_runs.parquet")
    table = parquet.read_table(Path(os.environ["RECSCALE_DATA"]) / "scaling" / "srt_runs.parquet")
    best: dict[tuple[float, float], float] = {}
    columns = (table[name].to_pylist() for name in ("model_non_emb_params", "n_inters", "valid_ndcg_at_5_best"))
    for size, data, value in zip(*columns, strict=True):
        best[float(size), float(data)] = max(float(value), best.get((size, data), 0.0))
    size_N, data_N = np.array(list(best)).T
    return size_N, data_N, np.array(list(best.values()))


def fitted(points: Points, form: str) -> Law:
    """Least squares on the metric itself: NDCG is bounded."""
    return fits.fit(points, form, scale="identity", delta="lsq", force=True)


def line(name: str, form: str, points: Points) -> str:
    """One row of the table: the law of all cells, and how a law of the small data sizes predicts the large ones."""
    law = fitted(points, form)
    told = "; ".join(
        f"{key} {law.params[key]:.3g} [{low:.3g}, {high:.3g}] {verdict}"
        for key, verdict in law.verdicts.items()
        for low, high in [law.intervals[key]]
    )
    later = Points.of(points.x, points.y_N, held_out=points.x["data"] > HELD_OUT_FROM, metric=points.metric)
    test = validate.held_out_test(fitted(later, form), later)
    state = "certified" if law.certified else f"refused: {'; '.join(law.reasons)}"
    error = f"RMSLE {test.rmsle:.1%}, bias {test.bias:+.1%}, worst {test.worst:.1%}"
    return f"| {name} | {form} | {law.n} | {told or 'none judged'} | {state} | {law.aicc:.1f} | {error} |"


def main() -> None:
    """Print and write the table."""
    size_N, data_N, value_N = cells()
    inside_N = ~np.isin(size_N, OUT_OF_LINE)
    rows = [
        line(name, form, Points.of({"encoder": size_N[m], "data": data_N[m]}, value_N[m], metric="ndcg@5"))
        for name, m in (("all cells", inside_N | True), ("without three sizes", inside_N))
        for form in ("ceiling", "log")
    ]
    head = "| cells | form | n | judged parameters, 90 % | certificate | AICc | largest data sizes held out |"
    text = "\n".join([head, "|---|---|---|---|---|---|---|", *rows]) + "\n"
    (HERE / "srt.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
