"""One tiny cell for two processes of one device each; RECSCALE_SLURM_LOG names its log."""

import os
from pathlib import Path

from ml_collections import ConfigDict

from recscale.record import read
from tests.tiny_run import SAMPLED, make_log, tiny

LOG = Path(os.environ["RECSCALE_SLURM_LOG"])
PLAN = {"train__epochs": 10.0, "train__checkpoint_every": 100, "mesh__data": 2}


def cells() -> list[str]:
    return ["pair"]


def get_config(cell: str) -> ConfigDict:
    config = tiny("hstu", LOG, **PLAN, **SAMPLED).unlock()
    config.study, config.cell.name = "study", cell
    return config.lock()


def prepare(folder: Path) -> None:
    if not LOG.exists():
        make_log(LOG)


def write_report(folder: Path) -> Path:
    """The final losses of the cells that are done."""
    lines = [f"{cell} {read(folder / cell)['status']}\n" for cell in cells() if (folder / cell / "DONE").exists()]
    (folder / "report.txt").write_text("".join(lines))
    return folder / "report.txt"
