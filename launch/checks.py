"""What settings of places have in common: types of fields, names that a scheduler takes, all problems at once."""

import dataclasses
import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath
from typing import Any


def wrong_types(settings: Any) -> list[str]:
    """One line per field of a dataclass whose value is not of its default's type; an int will do for a float."""
    found = []
    for field in dataclasses.fields(settings):
        default = field.default if field.default is not dataclasses.MISSING else {}
        value, wanted = getattr(settings, field.name), type(default)
        fits = type(value) is wanted or (wanted is float and type(value) is int)
        if isinstance(value, dict):
            fits = all(isinstance(part, str) for item in value.items() for part in item)
        if not fits:
            hint = "a mapping from text to text" if wanted is dict else wanted.__name__
            found.append(f"{field.name} = {value!r}: expected {hint}, found {type(value).__name__}")
    return found


def too_small(settings: Any, least: dict[str, int]) -> list[str]:
    """One line per number below its least value."""
    return [
        f"{name} = {getattr(settings, name)}: expected at least {number}"
        for name, number in least.items()
        if getattr(settings, name) < number
    ]


def missing(settings: Any, needed: dict[str, str]) -> list[str]:
    """One line per field that is empty and may not be; needed: field -> what it is."""
    return [
        f"{name} is not set: {what} (--set {name}=...)" for name, what in needed.items() if not getattr(settings, name)
    ]


def refuse(problems: Iterable[str]) -> None:
    """Raise ValueError with one line per problem; nothing where there is none."""
    if lines := list(dict.fromkeys(problems)):
        raise ValueError("\n".join(lines))


def slug(text: str, length: int = 63) -> str:
    """Lower-case letters, digits and single hyphens, at most so many: fit for a label's value."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:length].strip("-")


def resource_name(workdir: str) -> str:
    """Name of the resource that works on a run folder: a DNS label of at most 41 letters, the same at every call.

    The folder (RUNS/NAME/CELL) is the identity, as it is the lease's: a digest of it tells apart what reads alike.
    """
    path = PurePosixPath(workdir)
    digest = hashlib.sha256(path.as_posix().encode()).hexdigest()[:8]
    study, cell = slug(path.parent.name, 10), slug(path.name, 18)
    return "-".join(part for part in ("rs", study, cell, digest) if part)


def study_outside(argv: Sequence[str]) -> list[str]:
    """A line where --config names a file that no checkout elsewhere has: an absolute path, or one that climbs out."""
    files = {word: PurePosixPath(word.removeprefix("--config=")) for word in argv if word.startswith("--config=")}
    return [
        f"{word}: the study is read from the checkout there: give its path relative to the checkout's root"
        for word, file in files.items()
        if file.is_absolute() or ".." in file.parts
    ]
