"""Texts to vectors: one function per encoder, in ENCODERS.

`tfidf_svd` needs no model and no network. The others are pretrained: "wordllama" carries its weights in its package,
"sentence_transformers" and "fastembed" take the name of a model, or its folder.
"""

import importlib
import importlib.metadata
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np


class ContentError(ValueError):
    """No vectors can be made: one line with what was found, what was expected and what to do."""


class Learning(NamedTuple):
    """fit: (texts, **settings) -> vectors and what was learned; again: (texts, learned, **settings) -> vectors."""

    fit: Callable[..., tuple[np.ndarray, dict[str, np.ndarray]]]
    again: Callable[..., np.ndarray]


def tfidf_svd(texts: list[str], *, dim: int = 256, ngrams: int = 1, min_count: int = 1, seed: int = 0) -> np.ndarray:
    """TF-IDF of words (1 + log of the count), truncated SVD, rows of length 1: float32 [N, dim], by scikit-learn.

    ngrams: words joined at most; min_count: texts that a word must be in. The same texts, settings and seed, on the
    same machine: the same bits. A text whose words all are too rare is a zero row. Raises ContentError where dim is not
    below the number of texts and of words.
    """
    return fit_tfidf_svd(texts, dim=dim, ngrams=ngrams, min_count=min_count, seed=seed)[0]


def fit_tfidf_svd(
    texts: list[str], *, dim: int, ngrams: int, min_count: int, seed: int
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The vectors of `tfidf_svd`, and its vocabulary (one word a line, in bytes), idf [W] and components [dim, W].

    The components are kept as float32, like codebooks: vectors made with them differ by some 1e-8.
    """
    decomposition = _package("sklearn.decomposition", "scikit-learn")
    weights = _tfidf(ngrams, min_df=min_count)
    try:
        matrix = weights.fit_transform(texts)
    except ValueError as error:
        raise ContentError(f"encoder tfidf_svd: {error}; lower min_count = {min_count}") from None
    if not 1 <= dim < min(matrix.shape):
        raise ContentError(
            f"encoder tfidf_svd: dim = {dim}: expected 1..{min(matrix.shape) - 1}, below the {matrix.shape[0]:,} "
            f"distinct texts and their {matrix.shape[1]:,} words"
        )
    svd = decomposition.TruncatedSVD(dim, n_iter=7, random_state=seed)
    reduced = svd.fit_transform(matrix)
    words = "\n".join(weights.get_feature_names_out()).encode()
    learned = {
        "words": np.frombuffer(words, np.uint8),
        "idf": weights.idf_,
        "components": svd.components_.astype(np.float32),
    }
    return _unit(reduced), learned


def tfidf_svd_again(texts: list[str], learned: Mapping[str, np.ndarray], *, ngrams: int, **_: Any) -> np.ndarray:
    """Vectors of further texts by what `fit_tfidf_svd` learned; words that it did not see count for nothing."""
    words = learned["words"].tobytes().decode().split("\n")
    weights = _tfidf(ngrams, vocabulary=words)
    weights.idf_ = learned["idf"]
    return _unit(weights.transform(texts) @ learned["components"].T.astype(np.float64))


def _tfidf(ngrams: int, **settings: Any) -> Any:
    text = _package("sklearn.feature_extraction.text", "scikit-learn")
    return text.TfidfVectorizer(
        token_pattern=r"(?u)\w+", sublinear_tf=True, ngram_range=(1, ngrams), dtype=np.float64, **settings
    )


def _unit(reduced: np.ndarray) -> np.ndarray:
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
LEARNING = {"tfidf_svd": Learning(fit_tfidf_svd, tfidf_svd_again)}
"""The encoders that learn from the texts of a catalogue."""
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


def defaults(encoder: str) -> dict[str, Any]:
    """Settings of an encoder and their values, where none are given."""
    return dict(ENCODERS[encoder].__kwdefaults__ or {})


def version(encoder: str) -> str:
    """The package of an encoder and its version."""
    name = _DISTRIBUTIONS.get(encoder, encoder)
    try:
        return f"{name} {importlib.metadata.version(name)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{name}, not installed as a package"
