"""Reading a YAML file of known keys: what is unknown, missing, double or of the wrong type gives one line each."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from recscale.scaling.sources import nearest, number


class UniqueKeys(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, which YAML would resolve in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        doubled = next((key for key in keys if keys.count(key) > 1), None)
        if doubled is not None:
            raise yaml.constructor.ConstructorError(None, None, f"key {doubled!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


class Reader:
    """Takes values out of the file and keeps one line per problem."""

    def __init__(self, path: Path):
        self.path = path
        self.problems: list[str] = []

    def problem(self, key: str, text: str) -> None:
        self.problems.append(f"{self.path}: {key}: {text}")

    def keys(self, value: Any, key: str, required: tuple[str, ...], optional: tuple[str, ...] = ()) -> dict[str, Any]:
        """The mapping at `key` with every known key; unknown and missing ones are problems, missing ones None."""
        if not isinstance(value, Mapping):
            self.problem(key or "the file", f"found {shown(value)}, expected the keys {', '.join(required)}")
            return dict.fromkeys((*required, *optional)) | {"": set()}
        known, head = (*required, *optional), f"{key}." if key else ""
        for name in value:
            if name not in known:
                self.problem(f"{head}{name}", f"unknown key; the nearest known: {nearest(str(name), known, 3)}")
        for name in required:
            if name not in value:
                self.problem(f"{head}{name}", "missing; write it, see the head of recscale/scaling/study_file.py")
        return {name: value.get(name) for name in known} | {"": set(value)}

    def text(self, data: Mapping[str, Any], name: str, key: str, missing: str = "") -> str:
        value = data[name]
        if isinstance(value, str) and (value or name not in data.get("", ())):
            return value
        return self.wrong(data, name, key, "text", missing)

    def number(self, data: Mapping[str, Any], name: str, key: str, missing: float) -> float:
        value = number(data[name])  # YAML 1.1 reads 1e6 as text
        if value is not None and 0 < value < float("inf"):
            return value
        return self.wrong(data, name, key, "a number above 0", missing)

    def one_of(self, data: Mapping[str, Any], name: str, key: str, choices: tuple[Any, ...]) -> Any:
        value = data[name]
        if any(value is choice or (isinstance(value, str) and value == choice) for choice in choices):
            return value
        return self.wrong(data, name, key, f"one of {', '.join(map(str, choices))}", choices[0])

    def many(self, data: Mapping[str, Any], name: str, key: str, read: Callable[..., Any]) -> tuple[Any, ...]:
        """A list, each entry read by `read(list as data, its index, key)`."""
        value = data[name]
        if not isinstance(value, list):
            return self.wrong(data, name, key, "a list", ())
        entries = dict(enumerate(value))
        return tuple(read(entries, index, f"{key}[{index}]") for index in entries)

    def wrong(self, data: Mapping[Any, Any], name: Any, key: str, expected: str, value: Any) -> Any:
        if "" not in data or name in data[""]:  # a missing key is told of once, by keys()
            self.problem(key, f"found {shown(data[name])}, expected {expected}")
        return value


def shown(value: Any) -> str:
    """A value as a message shows it."""
    return "nothing" if value is None else repr(value)
