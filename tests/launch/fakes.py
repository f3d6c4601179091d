"""Stand-ins for kubectl and gcloud on PATH, and the schema of a JobSet, strict enough to find a typing error."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = """#!{python} -S
import json, pathlib, sys
folder, words = pathlib.Path({folder!r}), sys.argv[1:]
reads = any(word == "-" for word in words)
call = {{"argv": [{name!r}, *words], "stdin": sys.stdin.read() if reads else ""}}
with (folder / "calls.jsonl").open("a") as file:
    file.write(json.dumps(call) + chr(10))
for file in sorted(folder.glob("answer*.json"), reverse=True):  # the newest first
    answer = json.loads(file.read_text())
    if all(word in words for word in answer["words"]):
        if answer["once"]:
            file.unlink()
        sys.stdout.write(answer["stdout"])
        sys.stderr.write(answer["stderr"])
        sys.exit(answer["status"])
"""


class Fake:
    """A program of that name, first on PATH, that writes down how it was called and answers what a test says."""

    def __init__(self, name: str, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.name, self.folder, self.answers = name, folder / f"fake_{name}", 0
        self.folder.mkdir()
        binaries = self.folder / "bin"
        binaries.mkdir()
        program = binaries / name
        program.write_text(PROGRAM.format(python=sys.executable, folder=str(self.folder), name=name))
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{binaries}{os.pathsep}{os.environ['PATH']}")

    def answer(self, *words: str, stdout: Any = "", stderr: str = "", status: int = 0, once: bool = False) -> None:
        """Answer calls that have all these words so: stdout is text, or data to be written as JSON."""
        text = stdout if isinstance(stdout, str) else json.dumps(stdout)
        said = {"words": words, "stdout": text, "stderr": stderr, "status": status, "once": once}
        self.answers += 1
        (self.folder / f"answer{self.answers:04d}.json").write_text(json.dumps(said))

    @property
    def calls(self) -> list[dict[str, Any]]:
        """Every call so far: argv with the program's name, and stdin where it was read."""
        file = self.folder / "calls.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def verbs(self, *known: str) -> list[str]:
        """Of every call the first word that is among `known`."""
        return [next((word for word in call["argv"] if word in known), "?") for call in self.calls]

    def forget(self) -> None:
        """Start the list of calls anew."""
        (self.folder / "calls.jsonl").unlink(missing_ok=True)


def strict(schema: Any) -> Any:
    """A Kubernetes schema as JSON Schema: a property that it does not list is an error, and so is a null.

    Objects that preserve unknown fields stay open, as does `metadata`, of which the schema says nothing.
    """
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    found = {key: value for key, value in schema.items() if key not in ("description", "default", "format")}
    for key in ("items", "additionalProperties", "anyOf", "oneOf", "allOf", "not"):
        if key in found:
            found[key] = strict(found[key])
    if "properties" in found:
        found["properties"] = {name: strict(part) for name, part in found["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            found.setdefault("additionalProperties", False)
    return found


def closed(crd: Any) -> Any:
    """The strict schema of the newest version that a CustomResourceDefinition serves."""
    return strict(next(v for v in crd["spec"]["versions"] if v["storage"])["schema"]["openAPIV3Schema"])
