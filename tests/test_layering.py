"""Who may import whom. The table below is the rule; the rest of the file holds the imports against it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Part of the code -> the parts that it may import, besides itself. A part is a folder or a single file; the longest
# name that fits a module is its part. Not on the right: forbidden. Not on the left: the module has no place yet.
LIBRARY = {
    "recscale.data": (),
    "recscale.mesh": (),
    "recscale.metrics": (),
    "recscale.record": (),
    "recscale.events": (),
    "recscale.lease": (),
    "recscale.preemption": (),
    "recscale.cluster": (),
    "recscale.roll_call": ("recscale.cluster",),
    "recscale.distributed": ("recscale.cluster", "recscale.roll_call"),
    "recscale.goodput": ("recscale.events",),
    "recscale.mirrors": (),
    "recscale.worker": (
        "recscale.record",
        "recscale.events",
        "recscale.lease",
        "recscale.mirrors",
        "recscale.preemption",
    ),
    "recscale.kernels": (),
    "recscale.optim": ("recscale.layers",),
    "recscale.checkpoint": ("recscale.mesh",),
    "recscale.layers": ("recscale.kernels", "recscale.mesh"),
    "recscale.models": ("recscale.layers", "recscale.kernels", "recscale.mesh"),
    "recscale.tasks": ("recscale.layers", "recscale.metrics"),
    "recscale.warm_start": ("recscale.checkpoint", "recscale.record", "recscale.tasks"),
    "recscale.reading": ("recscale.data", "recscale.tasks"),
    "recscale.agreement": (),
    "recscale.user_statistics": (),
    "recscale.ranking_metrics": ("recscale.agreement", "recscale.user_statistics"),
    "recscale.paired": ("recscale.ranking_metrics", "recscale.metrics", "recscale.user_statistics"),
    "recscale.evaluate_feedback": (
        "recscale.data",
        "recscale.mesh",
        "recscale.metrics",
        "recscale.ranking_metrics",
        "recscale.reading",
        "recscale.run",
    ),
    "recscale.evaluate_generated": (
        "recscale.data",
        "recscale.layers",
        "recscale.mesh",
        "recscale.metrics",
        "recscale.reading",
        "recscale.run",
        "recscale.tasks",
    ),
    "recscale.evaluate_denoised": (
        "recscale.data",
        "recscale.layers",
        "recscale.mesh",
        "recscale.metrics",
        "recscale.reading",
        "recscale.run",
        "recscale.tasks",
    ),
    "recscale.known_law": ("recscale.data", "recscale.program", "recscale.reading", "recscale.run", "recscale.serve"),
    "recscale.resample": (
        "recscale.data",
        "recscale.evaluate",
        "recscale.evaluate_denoised",
        "recscale.metrics",
        "recscale.program",
        "recscale.reading",
        "recscale.record",
        "recscale.run",
        "recscale.serve",
        "recscale.tasks",
    ),
    "recscale.semantic_ids": (
        "recscale.data",
        "recscale.layers",
        "recscale.models",
        "recscale.mesh",
        "recscale.checkpoint",
        "recscale.record",
    ),
    "recscale.evaluate": (
        "recscale.data",
        "recscale.evaluate_denoised",
        "recscale.evaluate_feedback",
        "recscale.evaluate_generated",
        "recscale.program",
        "recscale.reading",
        "recscale.layers",
        "recscale.metrics",
        "recscale.run",
        "recscale.checkpoint",
        "recscale.mesh",
    ),
    "recscale.program": (
        "recscale.metrics",
        "recscale.models",
        "recscale.tasks",
        "recscale.layers",
        "recscale.optim",
        "recscale.mesh",
    ),
    "recscale.serve": (
        "recscale.checkpoint",
        "recscale.data",
        "recscale.kernels",
        "recscale.layers",
        "recscale.mesh",
        "recscale.program",
        "recscale.record",
        "recscale.run",
        "recscale.tasks",
    ),
    "recscale.branch": (
        "recscale.program",
        "recscale.run",
        "recscale.optim",
        "recscale.checkpoint",
        "recscale.record",
    ),
    "recscale.step": ("recscale.program", "recscale.layers", "recscale.mesh"),
    "recscale.run": (
        "recscale.program",
        "recscale.semantic_ids",
        "recscale.reading",
        "recscale.warm_start",
        "recscale.tasks",
        "recscale.data",
        "recscale.layers",
        "recscale.mesh",
    ),
    "recscale.training": (
        "recscale.branch",
        "recscale.checkpoint",
        "recscale.evaluate",
        "recscale.preemption",
        "recscale.program",
        "recscale.record",
        "recscale.run",
        "recscale.worker",
    ),
    "recscale.train": (
        "recscale.training",
        "recscale.data",
        "recscale.distributed",
        "recscale.events",
        "recscale.lease",
        "recscale.mesh",
        "recscale.preemption",
        "recscale.run",
        "recscale.step",
        "recscale.worker",
    ),
    "recscale.population": (
        "recscale.layers",
        "recscale.mesh",
        "recscale.program",
        "recscale.run",
        "recscale.step",
    ),
    "recscale.train_pack": (
        "recscale.training",
        "recscale.data",
        "recscale.population",
        "recscale.events",
        "recscale.lease",
        "recscale.preemption",
        "recscale.worker",
    ),
    "recscale.scaling": ("recscale.models", "recscale.record", "recscale.goodput", "recscale.events"),
}
ALLOWED = LIBRARY | {
    "recscale": (),
    "configs": (),
    "experiments": ("recscale", *LIBRARY, "configs"),
    "launch": ("recscale", *LIBRARY, "experiments"),
    "benchmarks": ("recscale", *LIBRARY, "configs", "launch"),
}
# Folders whose files may import nothing but the standard library and these.
THIRD_PARTY_ONLY = {"configs": ("ml_collections",)}
# Function-local imports are for accelerator kernels that are not installed everywhere, and only in these folders.
LOCAL_IMPORTS = {"recscale.kernels": ("jax.experimental.pallas", "jax.experimental.mosaic")}
STANDARD_IN_CONFIGS = ("copy", "dataclasses", "functools", "itertools", "math")
TOP_FOLDERS = ("recscale", "configs", "experiments", "launch", "benchmarks")


def part_of(module: str) -> str | None:
    """The longest name of ALLOWED that is `module` or one of its parents."""
    names = [name for name in ALLOWED if module == name or module.startswith(name + ".")]
    if names == ["recscale"] and module != "recscale":
        return None
    return max(names, key=len, default=None)


def module_name(root: Path, path: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(tree: ast.AST, module: str, is_package: bool, exists) -> list[tuple[int, str]]:
    """(line, module imported) of every import; `from a import b` counts as a.b where that is a module, else as a."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")
            base = base[: len(base) - node.level + is_package] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{source}.{alias.name}"
                found.append((node.lineno, full if exists(full) else source))
    return found


def local_imports(tree: ast.AST) -> list[tuple[int, str]]:
    """(line, module) of every import inside a function."""
    found = []
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            for node in ast.walk(function):
                if isinstance(node, ast.Import):
                    found += [(node.lineno, alias.name) for alias in node.names]
                elif isinstance(node, ast.ImportFrom):
                    found += [(node.lineno, f"{node.module or '.'}.{alias.name}") for alias in node.names]
    return sorted(set(found))


def may_import(importer: str, module: str) -> bool:
    top = module.split(".")[0]
    folder = importer.split(".")[0]
    if top not in TOP_FOLDERS:
        return folder not in THIRD_PARTY_ONLY or top in THIRD_PARTY_ONLY[folder] + STANDARD_IN_CONFIGS
    target = part_of(module)
    return target is not None and (target == importer or target in ALLOWED[importer])


def violations(root: Path) -> list[str]:
    """One line per import under `root` that the tables forbid."""
    found = []

    def exists(module: str) -> bool:
        path = root.joinpath(*module.split("."))
        return path.with_suffix(".py").is_file() or path.is_dir()

    for path in sorted(p for folder in TOP_FOLDERS for p in (root / folder).rglob("*.py")):
        module, where = module_name(root, path), path.relative_to(root).as_posix()
        importer = part_of(module)
        if importer is None:
            found.append(f"{where}: {module} has no place in the table of arrows")
            continue
        tree = ast.parse(path.read_text(), filename=where)
        for line, name in imported(tree, module, path.name == "__init__.py", exists):
            if not may_import(importer, name):
                found.append(f"{where}:{line}: {importer} may not import {name}")
        for line, name in local_imports(tree):
            if not name.startswith(LOCAL_IMPORTS.get(importer, ())):
                found.append(f"{where}:{line}: import of {name} inside a function")
    return list(dict.fromkeys(found))


def test_the_code_keeps_the_arrows():
    assert violations(ROOT) == []


def test_the_table_itself_keeps_the_order_of_the_folders():
    for part, targets in LIBRARY.items():
        assert all(target in LIBRARY for target in targets), part
    assert not ALLOWED["recscale.data"]
    assert {part for part, targets in ALLOWED.items() if "launch" in targets} == {"benchmarks"}
    assert "recscale.train" not in ALLOWED["recscale.scaling"] and "recscale.scaling" not in ALLOWED["recscale.train"]


@pytest.mark.parametrize(
    ("path", "source", "complaint"),
    [
        ("recscale/data/a.py", "import recscale.record", "recscale.data may not import recscale.record"),
        ("recscale/data/a.py", "from recscale import mesh", "recscale.data may not import recscale.mesh"),
        ("recscale/data/a.py", "from ..layers import norm", "recscale.data may not import recscale.layers.norm"),
        ("recscale/models/a.py", "from recscale.tasks import b", "recscale.models may not import recscale.tasks.b"),
        ("recscale/program.py", "import recscale.data.a", "recscale.program may not import recscale.data"),
        ("recscale/step.py", "from recscale.tasks import b", "recscale.step may not import recscale.tasks.b"),
        ("recscale/scaling/a.py", "from recscale.train import run", "recscale.scaling may not import recscale.train"),
        ("recscale/train.py", "import recscale.scaling.fit", "recscale.train may not import recscale.scaling.fit"),
        ("recscale/record.py", "from launch import local", "recscale.record may not import launch.local"),
        ("experiments/x/study.py", "import launch.local", "experiments may not import launch.local"),
        ("configs/a.py", "import jax", "configs may not import jax"),
        ("configs/a.py", "from recscale.scaling import axes", "configs may not import recscale.scaling.axes"),
        ("recscale/models/a.py", "def f():\n    import jax", "import of jax inside a function"),
        ("recscale/new.py", "import jax", "recscale.new has no place in the table of arrows"),
    ],
)
def test_a_planted_violation_is_found(tmp_path: Path, path: str, source: str, complaint: str):
    for module in ("recscale/mesh.py", "recscale/layers/norm.py", "recscale/tasks/b.py", "recscale/scaling/fit.py"):
        (tmp_path / module).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / module).write_text("")
    for module in ("launch/local.py", "recscale/scaling/axes.py", "recscale/record.py"):
        (tmp_path / module).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / module).write_text("")
    assert violations(tmp_path) == []
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).write_text(source + "\n")
    found = violations(tmp_path)
    assert len(found) == 1 and complaint in found[0], found


def test_allowed_imports_pass(tmp_path: Path):
    files = {
        "recscale/data/a.py": "import numpy\nfrom recscale.data.b import x\nfrom . import b\n",
        "recscale/data/b.py": "x = 1\n",
        "recscale/models/__init__.py": "from recscale.models import hstu\n",
        "recscale/models/hstu.py": "from recscale.layers import norm\nfrom recscale.kernels.attention import f\n",
        "recscale/layers/norm.py": "",
        "recscale/kernels/attention.py": "def f():\n    from jax.experimental.pallas import tpu\n",
        "recscale/scaling/study.py": "from recscale import record\nfrom recscale.models import MODELS\n",
        "recscale/record.py": "",
        "configs/a.py": "import math\nimport ml_collections\n",
        "launch/local.py": "import subprocess\nimport recscale.record\n",
    }
    for path, source in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(source)
    assert violations(tmp_path) == []
