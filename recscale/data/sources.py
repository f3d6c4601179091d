"""Source files of public datasets: finding them in a folder or a .zip, hashing them, reading typed tables from them.

Integers stay integers: a column of ids that holds floats, blanks or NaN is refused.
"""

import contextlib
import dataclasses
import hashlib
import io
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from recscale.data.event_log import MAX_ID, EventLog, EventLogError

Report = Callable[[str], None]
INT64_MAX = 2**63 - 1
MAX_TIME = 2**40  # seconds; only a guard against overflow, the event log's own check is narrower


class SourceError(EventLogError):
    """A source file is missing: says which, which layouts are accepted and where to get the data."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """One form a dataset comes in: role -> file name. `folder` may lie between SOURCE and the files, or be a .zip."""

    name: str
    required: Mapping[str, str]
    optional: Mapping[str, str] = dataclasses.field(default_factory=dict)
    folder: str = ""


class _Counted(io.RawIOBase):
    """A file that reports how much of it has been read, once a second."""

    def __init__(self, file: BinaryIO, name: str, size: int, report: Report):
        self.file, self.name, self.size, self.report = file, name, size, report
        self.last = time.monotonic()

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """As the file itself."""
        return self.file.seekable()

    def seek(self, offset: int, whence: int = 0) -> int:
        """As the file itself."""
        return self.file.seek(offset, whence)

    def readinto(self, buffer: Any) -> int:
        """As the file itself, and the report."""
        count = self.file.readinto(buffer)  # pyrefly: ignore[missing-attribute]
        if time.monotonic() - self.last >= 1.0:
            self.last = time.monotonic()
            self.report(f"{self.name}: read {self.file.tell() / 1e6:,.0f} of {self.size / 1e6:,.0f} MB")
        return count


@dataclasses.dataclass(frozen=True)
class Member:
    """One source file: a path, or an entry of the .zip at that path. report gets a line a second while it is read."""

    path: Path
    entry: str | None = None
    report: Report = lambda line: None

    @property
    def name(self) -> str:
        return Path(self.entry or self.path).name

    @contextlib.contextmanager
    def open(self) -> Iterator[io.RawIOBase]:
        """The file, open for reading; raises EventLogError where the .zip is damaged."""
        if self.entry is None:
            with self.path.open("rb") as file:
                yield _Counted(file, self.name, self.path.stat().st_size, self.report)
            return
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(self.entry) as file:
                size = archive.getinfo(self.entry).file_size
                yield _Counted(cast(BinaryIO, file), self.name, size, self.report)
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise EventLogError(f"{self.path}: damaged .zip ({error}). Download it again.") from None


@dataclasses.dataclass(frozen=True)
class Files:
    """The files of one layout that were found: role -> Member (absent optional roles left out)."""

    layout: str
    members: Mapping[str, Member]

    def sha256(self) -> dict[str, str]:
        """File name -> SHA-256 of its content; the same for a folder and for the .zip of it."""
        digests = {}
        for member in self.members.values():
            with member.open() as file:
                digests[member.name] = hashlib.file_digest(file, "sha256").hexdigest()
        return dict(sorted(digests.items()))


@dataclasses.dataclass(frozen=True)
class Dataset:
    """How one public dataset becomes an event log.

    load: Files -> EventLog (not yet validated). homepage: where a person gets the files. allow_repeats: an item may
    occur twice in one user's events.
    """

    name: str
    layouts: tuple[Layout, ...]
    load: Callable[[Files], EventLog]
    licence: str
    homepage: str
    allow_repeats: bool = False


def locate(dataset: Dataset, source: Path, report: Report = lambda line: None) -> Files:
    """The first layout of `dataset` whose required files all lie in `source`, a folder or .zip; raises SourceError."""
    closest: tuple[int, str] = (0, "")
    for layout in dataset.layouts:
        found = {role: _find(source, layout.folder, file) for role, file in layout.required.items()}
        missing = [layout.required[role] for role, member in found.items() if member is None]
        if not missing:
            extra = {role: _find(source, layout.folder, file) for role, file in layout.optional.items()}
            members = {role: member for role, member in {**found, **extra}.items() if member is not None}
            return Files(layout.name, {r: dataclasses.replace(m, report=report) for r, m in members.items()})
        if len(missing) < len(found) and len(found) - len(missing) > closest[0]:
            closest = (len(found) - len(missing), f" ({', '.join(missing)} missing from the {layout.name} layout)")
    accepted = "; ".join(f"{layout.name}: {', '.join(layout.required.values())}" for layout in dataset.layouts)
    state = "has no files of" if source.exists() else "does not exist: no files of"
    raise SourceError(
        f"{source} {state} {dataset.name}{closest[1]}. Accepted in that folder or .zip, one of: {accepted}. "
        f"Get them from {dataset.homepage}"
    )


def _find(source: Path, folder: str, file: str) -> Member | None:
    if source.is_file() and source.suffix == ".zip":
        return _find_in_zip(source, file)
    for place in dict.fromkeys([source, source / folder]):
        if (place / file).is_file():
            return Member(place / file)
    archive = source / f"{folder}.zip"
    return _find_in_zip(archive, file) if folder and archive.is_file() else None


def _find_in_zip(path: Path, file: str) -> Member | None:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = [name for name in archive.namelist() if name == file or name.endswith("/" + file)]
    except zipfile.BadZipFile as error:
        raise EventLogError(f"{path}: not a readable .zip ({error}). Download it again.") from None
    return Member(path, entries[0]) if entries else None


def read_delimited(
    member: Member,
    columns: Mapping[str, pa.DataType],
    *,
    delimiter: str = ",",
    names: tuple[str, ...] | None = None,
    encoding: str = "utf8",
) -> pa.Table:
    """The named columns of a text file. names: the file's columns where it has no header line (then nothing is quoted).

    Raises EventLogError: missing column, a value that is not of the column's type, a line of another length.
    """
    with member.open() as file:
        if len(delimiter) > 1:
            file, delimiter = io.BytesIO(file.readall().replace(delimiter.encode(), b"\x1f")), "\x1f"
        try:
            return pacsv.read_csv(
                file,
                read_options=pacsv.ReadOptions(column_names=names, encoding=encoding, block_size=1 << 24),
                parse_options=pacsv.ParseOptions(delimiter=delimiter, quote_char='"' if names is None else False),
                convert_options=pacsv.ConvertOptions(column_types=columns, include_columns=list(columns)),
            )
        except pa.ArrowKeyError:
            first = member_head(member, encoding)
            raise EventLogError(
                f"{member.name}: missing column: expected {', '.join(columns)}; the first line is {first!r}."
            ) from None
        except pa.ArrowInvalid as error:
            if "Empty CSV" in str(error):
                raise EventLogError(f"{member.name}: empty file. Download it again.") from None
            message = str(error).splitlines()[0]
            raise EventLogError(f"{member.name}: {message}. Expected columns {_describe(columns)}.") from None


def read_parquet(member: Member, columns: Mapping[str, pa.DataType], optional: tuple[str, ...] = ()) -> pa.Table:
    """The named columns of a parquet file. Raises EventLogError: missing column, floats where integers are expected."""
    with member.open() as file:
        try:
            parquet = pq.ParquetFile(file)
            schema = parquet.schema_arrow
            missing = [name for name in columns if name not in schema.names and name not in optional]
            if missing:
                raise EventLogError(f"{member.name}: missing column {', '.join(missing)}; found {schema.names}.")
            table = parquet.read(columns=[name for name in columns if name in schema.names])
        except pa.ArrowInvalid as error:
            raise EventLogError(f"{member.name}: not a readable parquet file ({error}). Get it again.") from None
    for name in table.column_names:
        found, expected = table.schema.field(name).type, columns[name]
        if pa.types.is_integer(expected) and not pa.types.is_integer(found):
            nan = " with NaN" if pa.types.is_floating(found) and pc.any(pc.is_nan(table[name])).as_py() else ""
            raise EventLogError(
                f"{member.name}: column {name} is {found}{nan}, expected integers: ids and times never pass through a "
                "float. Write the column as integers again."
            )
    return table


def integers(table: pa.Table, name: str, member: Member, low: int = 0, high: int = MAX_ID) -> np.ndarray:
    """Column `name` as int64 [rows]; raises EventLogError on blanks, NaN or values outside low..high."""
    column = table[name]
    if column.null_count:
        first = int(np.argmax(pc.is_null(column).to_numpy()))
        raise EventLogError(
            f"{member.name}: column {name} has {column.null_count:,} blank or NaN values, first in row {first + 1}."
        )
    if column.type == pa.uint64() and len(column) and pc.max(column).as_py() > INT64_MAX:
        raise EventLogError(f"{member.name}: column {name} overflows int64.")
    values = column.cast(pa.int64()).to_numpy()
    bad = (values < low) | (values > high)
    if bad.any():
        at = int(np.argmax(bad))
        raise EventLogError(
            f"{member.name}: column {name} has {int(bad.sum()):,} values outside {low}..{high}, "
            f"first in row {at + 1}: {values[at]}."
        )
    return values


def member_head(member: Member, encoding: str = "utf8") -> str:
    """The first line of a text file, at most 200 characters."""
    with member.open() as file:
        return file.readline(200).decode(encoding, errors="replace").strip()


def _describe(columns: Mapping[str, pa.DataType]) -> str:
    return ", ".join(f"{name} ({dtype})" for name, dtype in columns.items())
