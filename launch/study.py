"""A study and the jobs it consists of.

A study is a folder with a study.py that has `cells()` (names), `get_config(cell)`, `prepare(folder)` (data, once) and
`write_report(folder)`. A job is one cell: one command that may be given any number of times, anywhere.
"""

import functools
import importlib.util
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from ml_collections import ConfigDict

from recscale.lease import Held, Lease
from recscale.population import groups

FUNCTIONS = ("cells", "get_config", "prepare", "write_report")


class StudyError(ValueError):
    """A study that cannot be loaded, in one line."""


@dataclass(frozen=True)
class Job:
    """One cell: run `python ARGV`, and again until WORKDIR/DONE is there.

    after: the cell whose branch it is, or "". alike: cells of the same word can train in one program; "": alone.
    """

    cell: str
    workdir: str
    argv: tuple[str, ...]
    after: str = ""
    alike: str = ""


@dataclass(frozen=True)
class Study:
    """A folder with a study.py, where its runs go, and where else their metrics are shown."""

    folder: Path
    runs: Path
    module: ModuleType
    mirror: str = ""

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def out(self) -> Path:
        """The folder of this study's runs: one folder per cell, and what the launcher keeps."""
        return self.runs / self.name

    @functools.cached_property
    def jobs(self) -> tuple[Job, ...]:
        """All cells, in the order of the study. Raises StudyError where a name is there twice."""
        names = list(self.module.cells())
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise StudyError(f"{self.folder}/study.py: cells() names {', '.join(twice)} more than once")
        configs = {name: self.config(name) for name in names}
        folders = {(self.out / name).resolve(): name for name in names}
        alike = {name: group[0] for group in groups(configs) for name in group if len(group) > 1}
        mirror = (f"--mirror={self.mirror}",) if self.mirror else ()
        jobs = []
        for name, config in configs.items():
            workdir, trunk = self.out / name, Path(config.train.branch_from).resolve()
            argv = ("-m", "recscale.train", f"--config={self.folder / 'study.py'}:{name}", f"--workdir={workdir}")
            jobs.append(Job(name, str(workdir), argv + mirror, folders.get(trunk, ""), alike.get(name, "")))
        return tuple(jobs)

    def config(self, cell: str) -> ConfigDict:
        return self.module.get_config(cell)

    def prepare(self) -> None:
        """Make the data, once: of several processes that come here together one works and the others wait for it."""
        said = False
        while True:
            try:
                with Lease.take(self.out / ".prepare"):
                    return self.module.prepare(self.out)
            except Held as error:
                if not said:
                    print(f"{error}: waiting for it", flush=True)
                said = True
                time.sleep(1.0)

    def report(self) -> Path:
        return self.module.write_report(self.out)


def load(folder: Path, runs: Path = Path("runs"), mirror: str = "") -> Study:
    """The study in FOLDER/study.py; raises StudyError where there is none, or one that lacks a function."""
    file = folder / "study.py"
    if not file.is_file():
        raise StudyError(f"{file} does not exist; give the folder of a study, e.g. experiments/0001_four_axes_planted")
    spec = importlib.util.spec_from_file_location(folder.resolve().name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if missing := [name for name in FUNCTIONS if not callable(getattr(module, name, None))]:
        raise StudyError(f"{file}: lacks {', '.join(missing)}; a study has {', '.join(FUNCTIONS)}")
    return Study(folder, runs, module, mirror)
