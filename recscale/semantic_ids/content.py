"""Item content to vectors: text by one of the ENCODERS, float32 [V + 1, D], row 0 (padding) zeros.

The text columns of a log are joined to one text per item. Every distinct text is encoded once, so items with equal
texts have equal vectors, bit for bit. Items without a word get the mean of the others' vectors: it says nothing of
them, and unlike zeros it does not pull a codebook away from the rest. `encode` counts both kinds.

`tfidf_svd` needs no model and no network. The others are pretrained: "wordllama" carries its weights in its package,
"sentence_transformers" and "fastembed" take the name of a model, or its folder.
"""

import importlib
import importlib.metadata
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from recscale.data.event_log import EventLog

COLUMNS = ("title", "keywords", "brand", "attributes", "categories", "genres", "description", "abstract")
"""What says something of an item, in this order, where a log has it: no ids, no links."""
IGNORED = ("Unknown",)  # S3-Rec's brand of the products without one
_WORD = re.compile(r"\w")


class ContentError(ValueError):
    """No vectors can be made: one line with what was found, what was expected and what to do."""


class Content(NamedTuple):
    """vectors_VD: float32 [V + 1, D]; facts: encoder, its settings and version, columns, counts, in plain JSON."""

    vectors_VD: np.ndarray
    facts: dict[str, Any]


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
    unknown = sorted(set(settings) - set(_defaults(encoder)))
    if unknown:
        known = ", ".join(_defaults(encoder)) or "none"
        raise ContentError(f"encoder {encoder!r}: no setting {', '.join(unknown)}; it has {known}")
    chosen = text_columns(log, columns)
    texts = item_texts(log, chosen, ignored)
    distinct, index = np.unique(np.array(texts, dtype=object), return_inverse=True)
    spoken = np.array([bool(_WORD.search(text)) for text in distinct])
    if not spoken.any():
        raise ContentError(f"{_named(log)}: no item has a word in {', '.join(chosen)}; choose other columns")
    found = ENCODERS[encoder]([str(text) for text in distinct[spoken]], **settings)
    found = check_vectors(found, int(spoken.sum()), f"encoder {encoder}")
    rows = np.zeros((len(distinct), found.shape[1]), np.float32)
    rows[spoken] = found
    vectors_VD = np.zeros((log.num_items + 1, found.shape[1]), np.float32)
    vectors_VD[1:] = rows[index]
    silent = ~spoken[index]
    vectors_VD[1:][silent] = vectors_VD[1:][~silent].mean(axis=0, dtype=np.float64)
    copies = np.bincount(index)[index][~silent]
    facts = {
        "encoder": encoder,
        "settings": {**_defaults(encoder), **settings},
        "version": _version(encoder),
        "columns": list(chosen),
        "dim": found.shape[1],
        "items_without_text": int(silent.sum()),
        "items_with_the_text_of_another": int((copies > 1).sum()),
        "distinct_texts": int(spoken.sum()),
    }
    return Content(vectors_VD, facts)


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


def tfidf_svd(texts: list[str], *, dim: int = 256, ngrams: int = 1, min_count: int = 1, seed: int = 0) -> np.ndarray:
    """TF-IDF of words (1 + log of the count), truncated SVD, rows of length 1: float32 [N, dim], by scikit-learn.

    ngrams: words joined at most; min_count: texts that a word must be in. The same texts, settings and seed, on the
    same machine: the same bits. A text whose words all are too rare is a zero row. Raises ContentError where dim is not
    below the number of texts and of words.
    """
    text = _package("sklearn.feature_extraction.text", "scikit-learn")
    decomposition = _package("sklearn.decomposition", "scikit-learn")
    weights = text.TfidfVectorizer(
        token_pattern=r"(?u)\w+", sublinear_tf=True, ngram_range=(1, ngrams), min_df=min_count, dtype=np.float64
    )
    try:
        matrix = weights.fit_transform(texts)
    except ValueError as error:
        raise ContentError(f"encoder tfidf_svd: {error}; lower min_count = {min_count}") from None
    if not 1 <= dim < min(matrix.shape):
        raise ContentError(
            f"encoder tfidf_svd: dim = {dim}: expected 1..{min(matrix.shape) - 1}, below the {matrix.shape[0]:,} "
            f"distinct texts and their {matrix.shape[1]:,} words"
        )
    reduced = decomposition.TruncatedSVD(dim, n_iter=7, random_state=seed).fit_transform(matrix)
    length = np.linalg.norm(reduced, axis=1, keepdims=True)
    return (reduced / np.where(length > 1e-9, length, 1)).astype(np.float32)


def wordllama(texts: list[str]) -> np.ndarray:
    """Means of 256-d vectors of word pieces, rows of length 1; weights and tokenizer of the package.

    The package is under the MIT licence; its vectors were trained from the token embeddings of Llama 2 and other
    models, so read the licence of Llama 2 before you use them.
    """
    package = _package("wordllama", "wordllama")
    inside = Path(str(package.__file__)).parent  # its own search misses the tokenizer that it carries, and asks the net
    model = package.WordLlama.load(dim=256, cache_dir=inside, disable_download=True)
    return np.asarray(model.embed(texts, norm=True), np.float32)


def sentence_transformers(
    texts: list[str],
    *,
    model: str = "sentence-transformers/sentence-t5-base",
    batch_size: int = 64,
    device: str | None = None,
) -> np.ndarray:
    """Sentence vectors of length 1 by a model of sentence-transformers, by name or folder. Needs PyTorch."""
    package = _package("sentence_transformers", "sentence-transformers")
    loaded = _loaded(lambda: package.SentenceTransformer(model, device=device), model)
    return loaded.encode(
        texts, batch_size=batch_size, normalize_embeddings=True, convert_to_numpy=True, show_progress_bar=False
    )


def fastembed(texts: list[str], *, model: str = "BAAI/bge-small-en-v1.5", batch_size: int = 256) -> np.ndarray:
    """Sentence vectors by an ONNX model of fastembed, which fetches it once; no PyTorch."""
    package = _package("fastembed", "fastembed")
    loaded = _loaded(lambda: package.TextEmbedding(model_name=model), model)
    return np.stack(list(loaded.embed(texts, batch_size=batch_size)))


ENCODERS: dict[str, Callable[..., np.ndarray]] = {
    "tfidf_svd": tfidf_svd,
    "wordllama": wordllama,
    "sentence_transformers": sentence_transformers,
    "fastembed": fastembed,
}
"""name -> (distinct texts, **settings) -> [texts, D]."""
_DISTRIBUTIONS = {"tfidf_svd": "scikit-learn", "sentence_transformers": "sentence-transformers"}


def _package(module: str, distribution: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ContentError(f"this encoder needs {error.name}: pip install {distribution}") from None


def _loaded(load: Callable[[], Any], model: str) -> Any:
    try:
        return load()
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ContentError(f"model {model!r} cannot be loaded ({reason}); give the folder of a copy on disk") from None


def _defaults(encoder: str) -> dict[str, Any]:
    return dict(ENCODERS[encoder].__kwdefaults__ or {})


def _version(encoder: str) -> str:
    name = _DISTRIBUTIONS.get(encoder, encoder)
    try:
        return f"{name} {importlib.metadata.version(name)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{name}, not installed as a package"


def _is_text(kind: pa.DataType) -> bool:
    values = kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else kind
    return pa.types.is_string(values) or pa.types.is_large_string(values)


def _plain(value: Any, drop: set[str]) -> str:
    parts = value if isinstance(value, list) else [value]
    return ", ".join(" ".join(part.split()) for part in parts if part and part not in drop)


def _named(log: EventLog) -> str:
    return str(log.path) if log.path is not None else "the log"
