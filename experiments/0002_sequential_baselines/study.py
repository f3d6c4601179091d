"""Published sequential baselines on ML-1M and Beauty. Question, prediction and verdict: README.md beside.

    python -m launch.sweep experiments/0002_sequential_baselines --on=local --set jobs=2   (logs: see README.md)

A cell selects its step on the validation item of some users (the other users train on theirs), never on test.
"""

import csv
import importlib
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from recscale.data.event_log import EventLog
from recscale.scaling.collect import collect

HERE = Path(__file__).parent
NAME = "0002_sequential_baselines"


class Published(NamedTuple):
    """A published result: hit rate (= recall) and NDCG at 10, and who published it."""

    hr: float
    ndcg: float
    source: str


PUBLISHED = {
    "sasrec_ml1m": Published(0.2853, 0.1603, "authors of HSTU, released configuration (arXiv 2402.17152)"),
    "hstu_ml1m": Published(0.3023, 0.1718, "RecTools re-run, position bias only"),
    "sasrec_beauty": Published(0.0921, 0.0531, "controlled comparison, RecSys 2025"),
    "hstu_beauty": Published(0.0788, 0.0439, "controlled comparison, RecSys 2025"),
    "gsasrec_ml1m": Published(0.3003, 0.1726, "authors of gSASRec (arXiv 2308.07192)"),
}
TOLERANCE = 0.05  # relative shortfall that still counts as reached


def cells() -> list[str]:
    """One cell per published row."""
    return list(PUBLISHED)


def get_config(cell: str) -> ConfigDict:
    """The shipped config of a baseline."""
    if cell not in PUBLISHED:
        raise ValueError(f"study {NAME} has no cell {cell!r}; it has {', '.join(PUBLISHED)}")
    config = importlib.import_module(f"configs.{cell}").get_config().unlock()
    config.study, config.cell.name = NAME, cell
    return config.lock()


def prepare(folder: Path) -> None:
    """Check that the logs are there; raises EventLogError with the command that builds a missing one."""
    del folder
    for name in PUBLISHED:
        EventLog.open(get_config(name).data.path)


def write_report(folder: Path) -> Path:
    """Write results.csv beside this file and FOLDER/table.md: ours beside the published, with a verdict per row."""
    records = {row["cell.name"]: row for row in collect(folder).rows}
    lines = [
        "| cell | metric | published | ours | stderr | ours / published | verdict |",
        "|---|---|---|---|---|---|---|",
    ]
    table = []
    for cell in cells():
        if cell not in records:
            continue
        published = PUBLISHED[cell]
        for metric, value in (("hr@10", published.hr), ("ndcg@10", published.ndcg)):
            key = f"eval.test.all.{metric}/unseen"
            ours, stderr = records[cell][key], records[cell][f"{key}.stderr"]
            verdict = "reached" if ours >= (1 - TOLERANCE) * value else "short"
            table.append({"cell": cell, "metric": metric, "published": value, "ours": ours, "stderr": stderr,
                          "ratio": ours / value, "verdict": verdict, "source": published.source,
                          "selected_step": records[cell]["selected_step"], "steps": records[cell]["steps"],
                          "device": records[cell]["devices.kind"], "wall_seconds": records[cell]["seconds.wall"],
                          "revision": records[cell]["code.revision"]})  # fmt: skip
            lines.append(
                f"| {cell} | {metric} | {value:.4f} | {ours:.4f} | {stderr:.4f} | {ours / value:.3f} | {verdict} |"
            )
    if table:
        with (HERE / "results.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(table[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(table)
    report = folder / "table.md"
    report.write_text("\n".join(lines) + "\n")
    return report
