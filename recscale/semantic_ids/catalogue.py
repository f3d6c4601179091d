"""Codes of a catalogue: Q small integers per item, where they come from, and the folder that keeps them.

    codes.parquet       item_id, raw_id (where the log has them), c0 .. of items 1..V
    codebooks.parquet   level, code, vector of the learned levels; absent where the codebooks are unknown
    encoder.npz         arrays that encode further items (encoding.py); absent where nothing can encode them
    meta.json           schema version, sizes, facts, SHA-256 of the other files; written last

Codes belong to one catalogue: they know the number of its items and a hash of their raw ids, and are refused elsewhere.
"""

import dataclasses
import hashlib
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recscale.data.event_log import EventLog

SCHEMA_VERSION = 1
CATALOGUE = "catalogue"
"""The fact that says whose codes these are: {"num_items", "sha256"}; see `identity`."""
MAKE = "python -m recscale.semantic_ids.make"
_CODES, _CODEBOOKS, _ENCODER, _META = "codes.parquet", "codebooks.parquet", "encoder.npz", "meta.json"


class CodesError(ValueError):
    """Wrong codes: one line that names the file or value, what was found, what was expected and what to do."""


@dataclasses.dataclass(frozen=True)
class Codes:
    """The codes of every item of a catalogue.

    codes_VQ: int32 [V + 1, Q], row 0 (padding) zeros. sizes: number of codes of each level; a disambiguation digit is
    a level like the others. facts: plain JSON, with the catalogue's identity under "catalogue". codebooks: float32
    [K, d] of each learned level, the first ones; () where unknown. raw_id: [V + 1] of the log's items/raw_id, or None.
    encoder: arrays of numbers that encode further items; {} where there are none, or where they were not read.
    Raises CodesError where these do not fit each other.
    """

    codes_VQ: np.ndarray
    sizes: tuple[int, ...]
    facts: Mapping[str, Any]
    codebooks: tuple[np.ndarray, ...] = ()
    raw_id: np.ndarray | None = None
    encoder: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        check_codes(self.codes_VQ, self.sizes)
        if self.raw_id is not None and self.raw_id.shape != (len(self.codes_VQ),):
            raise CodesError(f"codes: raw_id of shape {list(self.raw_id.shape)}, expected [{len(self.codes_VQ)}]")
        if len(self.codebooks) > self.levels:
            raise CodesError(f"codes: {len(self.codebooks)} codebooks for {self.levels} levels")
        for level, book in enumerate(self.codebooks):
            if book.ndim != 2 or len(book) != self.sizes[level] or book.dtype != np.float32:
                found = f"{book.dtype} {list(book.shape)}"
                raise CodesError(f"codes: codebook {level} is {found}, expected float32 [{self.sizes[level]}, d]")
            if not np.isfinite(book).all():
                raise CodesError(f"codes: codebook {level} has NaN or infinite values; train the quantizer again")
        whose = self.facts.get(CATALOGUE, {})
        if whose and whose["num_items"] != self.num_items:
            raise CodesError(f"codes: {self.num_items:,} items, but facts[{CATALOGUE!r}] says {whose['num_items']:,}")

    @property
    def num_items(self) -> int:
        return len(self.codes_VQ) - 1

    @property
    def levels(self) -> int:
        return self.codes_VQ.shape[1]

    @property
    def sha256(self) -> str:
        """Hash of the codes alone: two runs with the same one predict the same tuples."""
        return hashlib.sha256(np.ascontiguousarray(self.codes_VQ, "<i4").tobytes()).hexdigest()


def check_codes(codes_VQ: np.ndarray, sizes: tuple[int, ...]) -> None:
    """Shape, type, padding and range of codes int32 [V + 1, Q]; raises CodesError."""
    if codes_VQ.ndim != 2 or codes_VQ.dtype != np.int32 or len(codes_VQ) < 2 or codes_VQ.shape[1] < 1:
        raise CodesError(f"codes: {codes_VQ.dtype} {list(codes_VQ.shape)}, expected int32 [items + 1, levels]")
    if len(sizes) != codes_VQ.shape[1] or min(sizes) < 1:
        raise CodesError(f"codes: sizes {sizes} for {codes_VQ.shape[1]} levels: expected a positive size per level")
    if codes_VQ[0].any():
        raise CodesError(f"codes: row 0 is padding, but it is {codes_VQ[0].tolist()}; expected zeros")
    low, high = codes_VQ.min(axis=0), codes_VQ.max(axis=0)
    for level, size in enumerate(sizes):
        if low[level] < 0 or high[level] >= size:
            raise CodesError(f"codes: level {level} has codes {low[level]}..{high[level]}, expected 0..{size - 1}")


def identity(log: EventLog) -> dict[str, Any]:
    """{"num_items", "sha256"} of a log's catalogue: the hash of its raw item ids as text, or of 1..V without them."""
    raw = np.asarray(log.items["raw_id"])[1:] if "raw_id" in log.items else np.arange(1, log.num_items + 1)
    text = "\n".join(map(str, raw.tolist()))
    return {"num_items": log.num_items, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def of_log(
    log: EventLog,
    codes_VQ: np.ndarray,
    sizes: tuple[int, ...],
    facts: Mapping[str, Any],
    codebooks: tuple[np.ndarray, ...] = (),
    encoder: Mapping[str, np.ndarray] | None = None,
) -> Codes:
    """Codes of this log's items: its identity and its dataset's name are added to the facts."""
    if len(codes_VQ) != log.num_items + 1:
        raise CodesError(f"codes: {len(codes_VQ)} rows, expected {log.num_items + 1} (padding first) for {_named(log)}")
    own = {CATALOGUE: identity(log), "dataset": log.facts.get("dataset")}
    raw = np.asarray(log.items["raw_id"]) if "raw_id" in log.items else None
    return Codes(codes_VQ, sizes, {**facts, **own}, codebooks, raw, encoder or {})


def write(codes: Codes, folder: str | Path, *, replace: bool = False) -> None:
    """Writes codes into `folder`; a reader sees all of them or none. replace: over codes that are there already.

    Raises CodesError where the folder holds codes, or the facts lack the catalogue or are not plain JSON.
    """
    folder = Path(folder)
    if CATALOGUE not in codes.facts:
        raise CodesError(f"codes: facts lack {CATALOGUE!r}: make the codes with catalogue.of_log")
    if (folder / _META).exists() and not replace:
        raise CodesError(f"{folder}: holds codes already; runs may depend on them: remove it or choose another folder")
    files = {_CODES: _codes_table(codes)} | ({_CODEBOOKS: _codebooks_table(codes)} if codes.codebooks else {})
    content = {name: _parquet_bytes(table) for name, table in files.items()}
    content |= {_ENCODER: _npz_bytes(codes.encoder)} if codes.encoder else {}
    meta = {
        "schema_version": SCHEMA_VERSION,
        "num_items": codes.num_items,
        "sizes": list(codes.sizes),
        "sha256": codes.sha256,
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in content.items()},
        "facts": dict(codes.facts),
    }
    try:
        text = json.dumps(meta, indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CodesError(f"codes: facts are not plain JSON ({error}); use str, int, float, list and dict") from None
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _META).unlink(missing_ok=True)  # until the end the folder holds no codes
    for name, data in {**content, _META: text.encode()}.items():
        _replace(folder / name, data)


def read(folder: str | Path, log: EventLog | None = None, *, encoder: bool = False) -> Codes:
    """The codes in `folder`; with a log, only those of its catalogue. encoder: with what encodes further items.

    Raises CodesError: no codes there, another schema version, a damaged file, codes of another catalogue.
    """
    folder = Path(folder)
    meta = _read_meta(folder)
    files = {name: digest for name, digest in meta["files"].items() if encoder or name != _ENCODER}
    content = {name: _read_file(folder / name, digest) for name, digest in files.items()}
    table = pq.read_table(io.BytesIO(content[_CODES]))
    sizes = tuple(meta["sizes"])
    codes_VQ = np.zeros((table.num_rows + 1, len(sizes)), np.int32)
    for level in range(len(sizes)):
        codes_VQ[1:, level] = table[f"c{level}"].to_numpy()
    books = _read_codebooks(content[_CODEBOOKS]) if _CODEBOOKS in content else ()
    arrays = _read_npz(content[_ENCODER]) if _ENCODER in content else {}
    raw = _padded(table["raw_id"]) if "raw_id" in table.column_names else None
    try:
        codes = Codes(codes_VQ, sizes, meta["facts"], books, raw, arrays)
    except CodesError as error:
        raise CodesError(f"{folder}: {error}") from None
    if log is not None:
        check_catalogue(codes, log, folder)
    return codes


def check_catalogue(codes: Codes, log: EventLog, name: str | Path = "codes") -> None:
    """Raises CodesError, naming `name`, where the codes belong to another catalogue than the log's."""
    found, expected = codes.facts[CATALOGUE], identity(log)
    if found != expected:
        what = "items" if found["num_items"] != expected["num_items"] else "items with other raw ids"
        raise CodesError(
            f"{name}: made for {found['num_items']:,} items ({found['sha256'][:12]}), but {_named(log)} has "
            f"{expected['num_items']:,} {what} ({expected['sha256'][:12]}): make codes for this log with `{MAKE}`"
        )


def _named(log: EventLog) -> str:
    return str(log.path) if log.path is not None else "the log"


def _codes_table(codes: Codes) -> pa.Table:
    columns: dict[str, Any] = {"item_id": np.arange(1, codes.num_items + 1, dtype=np.int32)}
    if codes.raw_id is not None:
        columns["raw_id"] = pa.array(codes.raw_id[1:].tolist() if codes.raw_id.dtype.kind == "U" else codes.raw_id[1:])
    return pa.table(columns | {f"c{level}": codes.codes_VQ[1:, level] for level in range(codes.levels)})


def _codebooks_table(codes: Codes) -> pa.Table:
    counts = [len(book) for book in codes.codebooks]
    level = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    code = np.concatenate([np.arange(count, dtype=np.int32) for count in counts])
    widths = np.concatenate([[0], *(np.full(len(book), book.shape[1]) for book in codes.codebooks)])
    values = np.concatenate([book.reshape(-1) for book in codes.codebooks])
    vector = pa.ListArray.from_arrays(np.cumsum(widths).astype(np.int32), values)
    return pa.table({"level": level, "code": code, "vector": vector})


def _read_codebooks(data: bytes) -> tuple[np.ndarray, ...]:
    table = pq.read_table(io.BytesIO(data)).combine_chunks()
    level, books = table["level"].to_numpy(), []
    for number in range(int(level.max()) + 1):
        rows = table["vector"].filter(pa.array(level == number)).combine_chunks()
        books.append(rows.flatten().to_numpy(zero_copy_only=False).reshape(len(rows), -1))
    return tuple(books)


def _padded(raw: pa.ChunkedArray) -> np.ndarray:
    values = raw.to_numpy() if pa.types.is_integer(raw.type) else np.array(raw.to_pylist(), dtype=np.str_)
    return np.concatenate([np.zeros(1, values.dtype), values])


def _parquet_bytes(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def _npz_bytes(arrays: Mapping[str, np.ndarray]) -> bytes:
    buffer, named = io.BytesIO(), dict[str, Any](arrays)
    np.savez(buffer, **named)
    return buffer.getvalue()


def _read_npz(data: bytes) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def _replace(path: Path, data: bytes) -> None:
    part = path.with_name(path.name + ".partial")
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def _read_meta(folder: Path) -> dict[str, Any]:
    if not (folder / _META).is_file():
        raise CodesError(f"{folder}: no codes here ({_META} is missing); make them with `{MAKE} --out={folder}`")
    try:
        meta = json.loads((folder / _META).read_text())
        version = meta["schema_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise CodesError(f"{folder}/{_META}: damaged ({type(error).__name__}: {error}); make the codes again") from None
    if version != SCHEMA_VERSION:
        raise CodesError(f"{folder}: schema version {version}, this code reads {SCHEMA_VERSION}: make the codes again")
    lacking = [key for key in ("num_items", "sizes", "files", "facts") if key not in meta]
    if lacking:
        raise CodesError(f"{folder}/{_META}: damaged, it lacks {', '.join(lacking)}; make the codes again")
    return meta


def _read_file(path: Path, digest: str) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CodesError(f"{path}: cannot be read ({error.strerror}); make the codes again") from None
    if hashlib.sha256(data).hexdigest() != digest:
        raise CodesError(f"{path}: damaged: not the bytes that were written; make the codes again")
    return data
