"""Item text to vectors: what is joined, what is counted, and encoders with stand-ins for packages that are not here."""

import dataclasses
import sys
import types

import numpy as np
import pyarrow as pa
import pytest

from recscale.data.event_log import Column, EventLog
from recscale.data.prepare import prepare
from recscale.semantic_ids import content, text_encoders
from recscale.semantic_ids.content import ContentError

WORDS = ("red", "nail", "polish", "cream", "skin", "hair", "oil", "brush", "soap", "lotion", "gel", "spray")


def make_log(items: int = 60, seed: int = 0) -> EventLog:
    """Three kinds of item, each with words of its own; items 7 and 8 have equal texts, item 9 has none."""
    rng = np.random.default_rng(seed)
    kind = np.arange(items) % 3
    titles = [" ".join(rng.choice(WORDS[4 * k : 4 * k + 4], 3)) + f" n{v}" for v, k in enumerate(kind)]
    titles[7], titles[8] = titles[6], "  ...  "
    brands = [["Unknown", "Deluxe"] if v % 5 else None for v in range(items)]
    brands[7], brands[8] = brands[6], ["Unknown"]
    text = pa.table({"asin": [f"B{v}" for v in range(items)], "title": titles, "attributes": brands})
    ids = np.arange(1, items + 1, dtype=np.int32)
    return EventLog(np.array([0, items]), {"item_id": ids}, {"item_id": Column("id")}, items, text=text)


def test_texts_are_the_columns_that_say_something():
    log = make_log()
    assert content.text_columns(log) == ("title", "attributes")
    texts = content.item_texts(log, ("title", "attributes"))
    assert texts[1].endswith("n1. Deluxe") and texts[0].endswith("n0") and texts[8] == "..."
    assert content.item_texts(log, ("attributes", "asin"), ignored=())[1] == "Unknown, Deluxe. B1"


def test_tfidf_vectors_and_what_is_counted():
    log = make_log()
    found = content.encode(log, "tfidf_svd", dim=6)
    x = found.vectors_VD
    assert x.shape == (61, 6) and x.dtype == np.float32 and not x[0].any()
    spoken = np.delete(np.arange(1, 61), 8)
    np.testing.assert_allclose(np.linalg.norm(x[spoken], axis=1), 1, rtol=1e-5)
    np.testing.assert_array_equal(x[7], x[8])  # equal texts
    np.testing.assert_allclose(x[9], x[spoken].mean(axis=0), atol=1e-6)  # no text
    wanted = {"items_without_text": 1, "items_with_the_text_of_another": 2, "distinct_texts": 58, "dim": 6}
    assert {key: found.facts[key] for key in wanted} == wanted
    assert found.facts["settings"] == {"dim": 6, "ngrams": 1, "min_count": 1, "seed": 0}
    assert found.facts["version"].startswith("scikit-learn ")
    similar = x[spoken] @ x[spoken].T
    same = (spoken[:, None] - spoken[None]) % 3 == 0
    assert similar[same].mean() > 0.3 + similar[~same].mean()


def test_the_same_log_gives_the_same_bits():
    log = make_log()
    first, again = (content.vectors(log, "tfidf_svd", dim=6, seed=s) for s in (1, 1))
    assert first.tobytes() == again.tobytes()


def test_further_items_get_vectors_in_the_space_of_the_first_ones():
    log, more = make_log(), make_log(80, seed=1)
    first = content.encode(log, "tfidf_svd", dim=6, columns=("title",))
    again, said = content.encode_again(log, first.facts, first.kept)
    np.testing.assert_allclose(again, first.vectors_VD, atol=1e-6)
    np.testing.assert_array_equal(again[9], first.vectors_VD[9])  # no text: the mean of then
    assert np.flatnonzero(~said).tolist() == [0, 9]
    again, said = content.encode_again(more, first.facts, first.kept)
    shared = [a == b for a, b in zip(*(content.item_texts(x, ("title",)) for x in (log, more)), strict=False)]
    assert again.shape == (81, 6) and shared[8] and said.sum() == 79
    np.testing.assert_array_equal(again[9], first.vectors_VD[9])


def test_a_pretrained_encoder_of_another_version_is_refused(monkeypatch):
    monkeypatch.setitem(content.ENCODERS, "odd", length_and_first)
    first = content.encode(make_log(), "odd")
    np.testing.assert_array_equal(content.encode_again(make_log(), first.facts, first.kept)[0], first.vectors_VD)
    with pytest.raises(ContentError, match=r"made with odd 0.1, here is odd, not installed as a package: install that"):
        content.encode_again(make_log(), {**first.facts, "version": "odd 0.1"}, first.kept)


def without_text() -> EventLog:
    return dataclasses.replace(make_log(), text=None)


WRONG = {
    "encoder": (make_log, "bert", {}, "encoder 'bert': expected one of tfidf_svd"),
    "setting": (make_log, "tfidf_svd", {"dims": 6}, "no setting dims; it has dim, ngrams, min_count, seed"),
    "no text": (without_text, "tfidf_svd", {}, "no item text"),
    "column": (make_log, "tfidf_svd", {"columns": ("price",)}, "no text column price .* it has asin, title, attr"),
    "silent": (make_log, "tfidf_svd", {"columns": ("attributes",), "ignored": ("Unknown", "Deluxe")}, "no item has a"),
    "dim": (make_log, "tfidf_svd", {"dim": 500}, r"dim = 500: expected 1..57, below the 58 distinct texts"),
    "rare words": (make_log, "tfidf_svd", {"min_count": 59}, "lower min_count = 59"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_refused_in_one_line(case):
    log, encoder, settings, message = WRONG[case]
    with pytest.raises(ContentError, match=message) as error:
        content.encode(log(), encoder, **settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (lambda texts: np.full((len(texts), 2), np.nan), "58 rows with NaN"),
        (lambda texts: np.zeros((3, 2)), r"shape \[3, 2\], expected \[58, width\]"),
        (lambda texts: np.zeros(len(texts)), r"shape \[58\]"),
        (lambda texts: np.array([["a"]] * len(texts)), "expected numbers"),
    ],
)
def test_wrong_vectors_of_an_encoder_are_refused(monkeypatch, found, message):
    monkeypatch.setitem(content.ENCODERS, "odd", found)
    with pytest.raises(ContentError, match=f"encoder odd: .*{message}"):
        content.encode(make_log(), "odd")


@pytest.mark.parametrize(
    ("encoder", "module", "package"),
    [
        ("wordllama", "wordllama", "wordllama"),
        ("sentence_transformers", "sentence_transformers", "sentence-transformers"),
        ("fastembed", "fastembed", "fastembed"),
        ("tfidf_svd", "sklearn.feature_extraction.text", "scikit-learn"),
    ],
)
def test_a_missing_package_is_named(monkeypatch, encoder, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ContentError, match=f"pip install {package}"):
        content.encode(make_log(), encoder)


def length_and_first(texts: list[str]) -> np.ndarray:
    return np.array([[len(text), ord(text[0])] for text in texts], np.float32)


def test_sentence_transformers_is_asked_for_unit_vectors(monkeypatch):
    class Model:
        def __init__(self, name, device):
            self.name, self.device = name, device
            if name == "gone":
                raise OSError("no such model\nand no network")

        def encode(self, texts, **settings):
            asked.update(settings, model=self.name, device=self.device)
            return length_and_first(texts)

    asked = {}
    monkeypatch.setitem(sys.modules, "sentence_transformers", types.SimpleNamespace(SentenceTransformer=Model))
    log = make_log()
    found = content.encode(log, "sentence_transformers", model="folder/model", batch_size=8)
    texts = content.item_texts(log, ("title", "attributes"))
    np.testing.assert_array_equal(found.vectors_VD[1:][:8], length_and_first(texts[:8]))
    assert (asked["model"], asked["batch_size"], asked["normalize_embeddings"]) == ("folder/model", 8, True)
    assert found.facts["settings"] == {"model": "folder/model", "batch_size": 8, "device": None}
    with pytest.raises(ContentError, match=r"model 'gone' cannot be loaded \(no such model and no network\); give"):
        content.encode(log, "sentence_transformers", model="gone")


def test_fastembed_yields_vectors(monkeypatch):
    class TextEmbedding:
        def __init__(self, model_name):
            assert model_name == "BAAI/bge-small-en-v1.5"

        def embed(self, texts, batch_size):
            assert batch_size == 256
            yield from length_and_first(texts)

    monkeypatch.setitem(sys.modules, "fastembed", types.SimpleNamespace(TextEmbedding=TextEmbedding))
    log = make_log()
    found = content.vectors(log, "fastembed", columns=("title",))
    np.testing.assert_array_equal(found[1:][:8], length_and_first(content.item_texts(log, ("title",))[:8]))


def test_wordllama_needs_no_network(monkeypatch, tmp_path):
    pytest.importorskip("wordllama")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("asked the network"))
    found = content.encode(make_log(), "wordllama")
    assert found.vectors_VD.shape == (61, 256) and found.facts["version"].startswith("wordllama ")
    np.testing.assert_allclose(np.linalg.norm(found.vectors_VD[1:9], axis=1), 1, rtol=1e-4)
    near = text_encoders.wordllama(["nail polish", "nail lacquer", "bicycle tyre"])
    assert near[0] @ near[1] > near[0] @ near[2] + 0.2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "folder", "columns", "copies"),
    [
        ("beauty", "amazon2014", ["keywords", "attributes"], 0),
        ("yelp", "yelp", ["title", "description"], 1_247),
        ("microlens", "microlens", ["title", "brand", "categories", "description"], 69),
    ],
)
def test_real_text(tmp_path, monkeypatch, recscale_data, recscale_data_file, name, folder, columns, copies):
    recscale_data_file(f"{folder}/{name}_items.parquet")
    log = prepare(name, tmp_path / "log", source=recscale_data)
    monkeypatch.setitem(content.ENCODERS, "odd", length_and_first)  # the text is what is looked at
    facts = content.encode(log, "odd").facts
    assert (facts["columns"], facts["items_without_text"]) == (columns, 0)
    assert facts["items_with_the_text_of_another"] == copies
