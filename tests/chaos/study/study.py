"""Twenty-four tiny cells for the launcher's tests.

CHAOS_LOG names the log, CHAOS_CELLS how many of them there are, CHAOS_DEVICES over how many devices each is spread,
CHAOS_EPOCHS how long they train.
"""

import os
from pathlib import Path

from ml_collections import ConfigDict

from recscale.record import read
from tests.tiny_run import SAMPLED, make_log, tiny

LOG = Path(os.environ.get("CHAOS_LOG", "runs/logs/chaos"))
PLAN = {"train__checkpoint_every": 5, "train__eval_every": 10, "train__select": "nats min"}


def cells() -> list[str]:
    return [f"rate-{i}-s{seed}" for i in range(8) for seed in range(3)][: int(os.environ.get("CHAOS_CELLS", "24"))]


def get_config(cell: str) -> ConfigDict:
    rate, seed = cell.removeprefix("rate-").split("-s")
    config = tiny("hstu", LOG, optim__learning_rate=1e-3 * 2 ** (int(rate) / 2), **PLAN, **SAMPLED).unlock()
    config.train.epochs = float(os.environ.get("CHAOS_EPOCHS", "6"))
    config.mesh.data = int(os.environ.get("CHAOS_DEVICES", "1"))
    config.study, config.cell.name, config.seed = "study", cell, int(seed)
    return config.lock()


def prepare(folder: Path) -> None:
    if not LOG.exists():
        make_log(LOG)


def write_report(folder: Path) -> Path:
    """The final losses, one line per cell that has one."""
    done = [cell for cell in cells() if (folder / cell / "DONE").exists()]
    lines = [f"{cell} {read(folder / cell)['evaluations'][0]['value']}\n" for cell in done]
    (folder / "report.txt").write_text("".join(lines))
    return folder / "report.txt"
