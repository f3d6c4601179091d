"""The rules of the code's form that a linter does not know: file length, names, docstrings, configs, no loose ends."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("recscale", "configs", "experiments", "launch", "benchmarks", "tests")
MAX_LINES = 400
VAGUE_NAMES = {"utils", "util", "common", "misc", "helpers", "helper"}
LOOSE_ENDS = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b|NotImplementedError")
Complaints = list[str]


def files(root: Path, *folders: str) -> Iterator[tuple[str, Path]]:
    for folder in folders or FOLDERS:
        for path in sorted((root / folder).rglob("*.py")):
            yield path.relative_to(root).as_posix(), path


def too_long(root: Path) -> Complaints:
    counts = {name: len(path.read_text().splitlines()) for name, path in files(root)}
    return [
        f"{name}: {n} lines, at most {MAX_LINES}: split it by subject" for name, n in counts.items() if n > MAX_LINES
    ]


def vague_names(root: Path) -> Complaints:
    found = [(name, set(Path(name).with_suffix("").parts) & VAGUE_NAMES) for name, _ in files(root)]
    return [f"{name}: {sorted(vague)} says nothing of the subject" for name, vague in found if vague]


def loose_ends(root: Path) -> Complaints:
    here = Path(__file__).name
    return [
        f"{name}:{i}: {line.strip()}"
        for name, path in files(root)
        if path.name != here
        for i, line in enumerate(path.read_text().splitlines(), 1)
        if LOOSE_ENDS.search(line)
    ]


def missing_docstrings(root: Path) -> Complaints:
    """Public modules, classes and functions of recscale; methods whose name says it all and main() may go without."""
    found = []
    for name, path in files(root, "recscale"):
        tree = ast.parse(path.read_text(), filename=name)
        if tree.body and not ast.get_docstring(tree):
            found.append(f"{name}: the module has no docstring")
        for node in tree.body:
            public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
            if public and node.name != "main" and not ast.get_docstring(node):
                found.append(f"{name}:{node.lineno}: {node.name} has no docstring")
    return found


def config_names(tree: ast.Module) -> set[str]:
    """Names bound to a ConfigDict: by annotation, by construction, by get_config(), and `config` or `c` by habit."""
    names = {"config", "cfg", "c"}
    for node in ast.walk(tree):
        if isinstance(node, ast.arg) and node.annotation and "ConfigDict" in ast.unparse(node.annotation):
            names.add(node.arg)
        if isinstance(node, ast.Assign) and re.search(r"ConfigDict\(|get_config\(", ast.unparse(node.value)):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


def config_defaults(root: Path) -> Complaints:
    """`.get(key, default)` on a config hides a value that shaped the run: `c.get(..)`, `run.config.model.get(..)`."""
    found = []
    for name, path in files(root):
        tree = ast.parse(path.read_text(), filename=name)
        names = config_names(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get":
                owner = node.func.value
                chain = [part for part in re.split(r"\W+", ast.unparse(owner)) if part]
                if isinstance(owner, ast.Name | ast.Attribute) and set(chain) & names:
                    found.append(f"{name}:{node.lineno}: {ast.unparse(node)}: write the value into the config")
    return found


def configs_without_get_config(root: Path) -> Complaints:
    found = []
    for name, path in files(root, "configs"):
        tree = ast.parse(path.read_text(), filename=name)
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        if path.name != "__init__.py" and "get_config" not in functions:
            found.append(f"{name}: no get_config()")
    return found


RULES = (too_long, vague_names, loose_ends, missing_docstrings, config_defaults, configs_without_get_config)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_code_keeps(rule):
    assert rule(ROOT) == []


@pytest.mark.parametrize(
    ("rule", "path", "source"),
    [
        (too_long, "recscale/a.py", "x = 1\n" * 401),
        (vague_names, "recscale/utils/a.py", ""),
        (vague_names, "tests/helpers.py", ""),
        (loose_ends, "launch/a.py", "x = 1  # TODO later"),
        (loose_ends, "recscale/a.py", "def f():\n    raise NotImplementedError"),
        (missing_docstrings, "recscale/a.py", '"""Module."""\ndef f():\n    return 1'),
        (missing_docstrings, "recscale/a.py", "x = 1"),
        (config_defaults, "recscale/a.py", "def f(config):\n    return config.get('a', 1)"),
        (config_defaults, "recscale/a.py", "def f(self):\n    return self.config.model.get('a', 1)"),
        (config_defaults, "configs/a.py", "d = ml_collections.ConfigDict()\nd.get('a')"),
        (configs_without_get_config, "configs/a.py", "def sweep():\n    return []"),
    ],
)
def test_a_planted_violation_is_found(tmp_path: Path, rule, path: str, source: str):
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text(source)
    assert len(rule(tmp_path)) == 1


def test_what_only_looks_like_a_violation_passes(tmp_path: Path):
    source = '"""Module."""\n\n\ndef _f(rows, table, i):\n    return rows.get("a", 1), table.at[i].get(mode="clip")\n'
    (tmp_path / "recscale").mkdir()
    (tmp_path / "recscale" / "a.py").write_text(source + "x = 1\n" * 395)
    assert [rule(tmp_path) for rule in RULES] == [[]] * len(RULES)
