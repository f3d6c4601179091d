"""TF-IDF and SVD against numpy, and further texts by what was learned of the first ones."""

import numpy as np
import pytest

from recscale.semantic_ids import text_encoders

TEXTS = ["a b b", "b c", "c c c d", "a d d", "e a", "d e e"]


def test_tfidf_is_the_svd_of_the_formula():
    """Inner products of the rows, against numpy on the counts: they do not depend on signs or rotations."""
    texts = TEXTS
    counts = np.array([[text.split().count(word) for word in "abcde"] for text in texts], float)
    idf = 1 + np.log((1 + len(texts)) / (1 + (counts > 0).sum(axis=0)))
    weights = np.where(counts > 0, 1 + np.log(np.maximum(counts, 1)), 0) * idf
    weights /= np.linalg.norm(weights, axis=1, keepdims=True)
    u, s, _ = np.linalg.svd(weights, full_matrices=False)
    expected = (u * s)[:, :3]
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    found = text_encoders.tfidf_svd(texts, dim=3)
    np.testing.assert_allclose(found @ found.T, expected @ expected.T, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"ngrams": 2}, {"min_count": 3, "dim": 1}])
def test_a_text_is_encoded_again_by_itself(settings):
    known = {"dim": 2, "ngrams": 1, "min_count": 1, "seed": 0} | settings
    first, learned = text_encoders.fit_tfidf_svd(TEXTS, **known)
    np.testing.assert_array_equal(first, text_encoders.tfidf_svd(TEXTS, **known))
    for text, row in zip(TEXTS, first, strict=True):
        found = text_encoders.tfidf_svd_again([text, "zzz"], learned, **known)
        np.testing.assert_allclose(found[0], row, atol=1e-6)
        assert not found[1].any()  # no known word


def test_unknown_words_count_for_nothing():
    known = {"dim": 2, "ngrams": 1, "min_count": 1, "seed": 0}
    first, learned = text_encoders.fit_tfidf_svd(TEXTS, **known)
    found = text_encoders.tfidf_svd_again(["a zzz b yyy b"], learned, **known)
    np.testing.assert_allclose(found[0], first[0], atol=1e-6)
