"""Item content to vectors: text by one of the ENCODERS, float32 [V + 1, D], row 0 (padding) zeros.

The text columns of a log are joined to one text per item. Every distinct text is encoded once (text_encoders.py), so
items with equal texts have equal vectors, bit for bit. Items without a word get the mean of the others' vectors: it
says nothing of them, and unlike zeros it does not pull a codebook away from the rest. `encode` counts both kinds.

What an encoder has learned from a catalogue is kept, so that `encode_again` makes vectors of items that come later in
the space of the first ones.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from recscale.data.event_log import EventLog
from recscale.semantic_ids.text_encoders import ENCODERS, LEARNING, ContentError, defaults, version

COLUMNS = ("title", "keywords", "brand", "attributes", "categories", "genres", "description", "abstract")
"""What says something of an item, in this order, where a log has it: no ids, no links."""
IGNORED = ("Unknown",)  # S3-Rec's brand of the products without one
_WORD = re.compile(r"\w")


class Content(NamedTuple):
    """vectors_VD: float32 [V + 1, D]; facts: encoder, its settings and version, columns, counts, in plain JSON.

    kept: what `encode_again` needs beside the facts: "mean" [D], the vector of the items without a word, and what the
    encoder has learned; {} where nothing was encoded.
    """

    vectors_VD: np.ndarray
    facts: dict[str, Any]
    kept: dict[str, np.ndarray]


class _Distinct(NamedTuple):
    """Every different text once: those with a word, which of all [n] they are, and the text of each item, [V]."""

    texts: list[str]
    spoken: np.ndarray
    index: np.ndarray


def vectors(log: EventLog, encoder: str, **settings: Any) -> np.ndarray:
    """The vectors of `encode`, float32 [V + 1, D]."""
    return encode(log, encoder, **settings).vectors_VD


def encode(
    log: EventLog,
    encoder: str,
    *,
    columns: Sequence[str] = (),
    ignored: Sequence[str] = IGNORED,
    **settings: Any,
) -> Content:
    """Vectors of the items of a log and what is to be known of them.

    columns: text columns, joined in this order; by default those of COLUMNS that the log has. ignored: values that say
    nothing. settings: of the encoder. The facts count `items_without_text`, `items_with_the_text_of_another` and
    `distinct_texts`. Raises ContentError: unknown encoder, setting or column, no text in the log or in any item, a
    package that is not installed, vectors that are not finite.
    """
    if encoder not in ENCODERS:
        raise ContentError(f"encoder {encoder!r}: expected one of {', '.join(ENCODERS)}")
    unknown = sorted(set(settings) - set(defaults(encoder)))
    if unknown:
        known = ", ".join(defaults(encoder)) or "none"
        raise ContentError(f"encoder {encoder!r}: no setting {', '.join(unknown)}; it has {known}")
    chosen = text_columns(log, columns)
    distinct = _distinct(log, chosen, ignored)
    settings = {**defaults(encoder), **settings}
    learned: dict[str, np.ndarray] = {}
    if encoder in LEARNING:
        found, learned = LEARNING[encoder].fit(distinct.texts, **settings)
    else:
        found = ENCODERS[encoder](distinct.texts, **settings)
    vectors_VD, silent = _of_items(found, distinct, encoder)
    mean = vectors_VD[1:][~silent].mean(axis=0, dtype=np.float64).astype(np.float32)
    vectors_VD[1:][silent] = mean
    copies = np.bincount(distinct.index)[distinct.index][~silent]
    facts = {
        "encoder": encoder,
        "settings": settings,
        "version": version(encoder),
        "columns": list(chosen),
        "ignored": list(ignored),
        "dim": vectors_VD.shape[1],
        "items_without_text": int(silent.sum()),
        "items_with_the_text_of_another": int((copies > 1).sum()),
        "distinct_texts": int(distinct.spoken.sum()),
    }
    return Content(vectors_VD, facts, {"mean": mean, **learned})


def encode_again(
    log: EventLog, facts: Mapping[str, Any], kept: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Vectors float32 [V + 1, D] of the items of another log, in the space of the `Content` of these facts.

    Also which items said something, bool [V + 1]: not those without a word, nor those whose words are all unknown (they
    have zeros, as texts of rare words alone always had). Raises ContentError: no such text columns, a package that is
    not installed, or that has another version than the vectors were made with.
    """
    encoder = facts["encoder"]
    distinct = _distinct(log, text_columns(log, facts["columns"]), facts["ignored"])
    if encoder in LEARNING:
        found = LEARNING[encoder].again(distinct.texts, kept, **facts["settings"])
    elif version(encoder) != facts["version"]:
        raise ContentError(
            f"encoder {encoder!r}: the vectors were made with {facts['version']}, here is {version(encoder)}: install "
            "that version"
        )
    else:
        found = ENCODERS[encoder](distinct.texts, **facts["settings"])
    vectors_VD, silent = _of_items(found, distinct, encoder)
    said = np.asarray(vectors_VD.any(axis=1))
    vectors_VD[1:][silent] = kept["mean"]
    return vectors_VD, said


def _distinct(log: EventLog, columns: Sequence[str], ignored: Sequence[str]) -> _Distinct:
    texts = item_texts(log, columns, ignored)
    distinct, index = np.unique(np.array(texts, dtype=object), return_inverse=True)
    spoken = np.array([bool(_WORD.search(text)) for text in distinct])
    if not spoken.any():
        raise ContentError(f"{_named(log)}: no item has a word in {', '.join(columns)}; choose other columns")
    return _Distinct([str(text) for text in distinct[spoken]], spoken, index)


def _of_items(found: Any, distinct: _Distinct, encoder: str) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of the items [V + 1, D] from those of the texts, zeros for items without a word; which these are [V]."""
    found = check_vectors(found, len(distinct.texts), f"encoder {encoder}")
    rows = np.zeros((len(distinct.spoken), found.shape[1]), np.float32)
    rows[distinct.spoken] = found
    return np.pad(rows[distinct.index], ((1, 0), (0, 0))), ~distinct.spoken[distinct.index]


def text_columns(log: EventLog, columns: Sequence[str] = ()) -> tuple[str, ...]:
    """The text columns to join, `columns` or those of COLUMNS that the log has; raises ContentError."""
    text = log.read_text()
    if text is None:
        raise ContentError(
            f"{_named(log)}: no item text (items/text.parquet); prepare it from a source with items, or use behaviour "
            "vectors"
        )
    known = [name for name in text.column_names if _is_text(text.schema.field(name).type)]
    chosen = tuple(columns) or tuple(name for name in COLUMNS if name in known)
    missing = [name for name in chosen if name not in known]
    if missing or not chosen:
        what = f"no text column {', '.join(missing)}" if missing else f"none of {', '.join(COLUMNS)}"
        raise ContentError(f"{_named(log)}: {what} in its item text; it has {', '.join(known) or 'none'}")
    return chosen


def item_texts(log: EventLog, columns: Sequence[str], ignored: Sequence[str] = IGNORED) -> list[str]:
    """One text per item 1..V: the values of the columns, joined by ". "; the names of a list by ", "."""
    text = log.read_text()
    if text is None or text.num_rows != log.num_items:
        found = "none" if text is None else f"{text.num_rows:,}"
        raise ContentError(f"{_named(log)}: item text of {found} items, expected {log.num_items:,}; prepare it again")
    drop = set(ignored)
    parts = [[_plain(value, drop) for value in text[name].to_pylist()] for name in columns]
    return [". ".join(part for part in row if part) for row in zip(*parts, strict=True)]


def check_vectors(found: Any, rows: int, name: str) -> np.ndarray:
    """`found` as float32 [rows, D]; raises ContentError, beginning with `name`, for other shapes and NaN."""
    array = np.asarray(found)
    if array.ndim != 2 or len(array) != rows or array.shape[1] < 1:
        raise ContentError(f"{name}: shape {list(array.shape)}, expected [{rows}, width]: one row per item")
    if array.dtype.kind not in "fiu":
        raise ContentError(f"{name}: dtype {array.dtype}, expected numbers")
    array = array.astype(np.float32)
    bad = ~np.isfinite(array).all(axis=1)
    if bad.any():
        raise ContentError(f"{name}: {int(bad.sum()):,} rows with NaN or infinite values, first row {np.argmax(bad)}")
    return array


def _is_text(kind: pa.DataType) -> bool:
    values = kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else kind
    return pa.types.is_string(values) or pa.types.is_large_string(values)


def _plain(value: Any, drop: set[str]) -> str:
    parts = value if isinstance(value, list) else [value]
    return ", ".join(" ".join(part.split()) for part in parts if part and part not in drop)


def _named(log: EventLog) -> str:
    return str(log.path) if log.path is not None else "the log"
