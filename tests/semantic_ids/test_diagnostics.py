"""Diagnostics of codes against closed forms and plain numpy."""

import json
import math

import numpy as np
import pytest

from recscale.semantic_ids.diagnostics import describe, level_use, neighbours_kept, reconstruction_error, sharing


def with_padding(rows: list) -> np.ndarray:
    return np.array([[0] * len(rows[0]), *rows], np.int32)


def test_use_of_a_level():
    even = level_use(np.repeat(np.arange(8), 5), 8)
    assert even["perplexity"] == pytest.approx(8) and even["entropy"] == pytest.approx(math.log(8))
    assert (even["used"], even["dead"], even["entropy_share"], even["largest"]) == (8, 0, pytest.approx(1), 5)
    collapsed = level_use(np.zeros(40, np.int32), 8)
    assert (collapsed["used"], collapsed["dead"], collapsed["entropy"], collapsed["perplexity"]) == (1, 7, 0, 1)
    uneven = level_use(np.array([0] * 9 + [1]), 4)
    assert uneven["entropy"] == pytest.approx(-(0.9 * math.log(0.9) + 0.1 * math.log(0.1)))
    assert uneven["entropy_share"] == pytest.approx(uneven["entropy"] / math.log(4))
    assert level_use(np.zeros(3, np.int32), 1)["entropy_share"] == 1


def test_sharing_of_tuples():
    codes = with_padding([[0, 1], [0, 1], [0, 1], [0, 2], [1, 0], [2, 2], [2, 2], [3, 0]])
    assert sharing(codes) == {
        "levels": 2,
        "distinct": 5,
        "largest_bucket": 3,
        "items_sharing": 5,
        "unique_share": pytest.approx(3 / 8),
    }
    assert sharing(codes[:, :1])["largest_bucket"] == 4


def test_reconstruction_error():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(101, 6)).astype(np.float32)
    noise = 0.1 * rng.normal(size=x.shape).astype(np.float32)
    noise[0], x[0] = 1e6, 0  # padding does not count
    found = reconstruction_error(x, x + noise)
    assert found["mse"] == pytest.approx((noise[1:] ** 2).mean(), rel=1e-4)
    assert found["relative"] == pytest.approx((noise[1:] ** 2).sum() / ((x[1:] - x[1:].mean(0)) ** 2).sum(), rel=1e-4)
    assert reconstruction_error(x, x) == {"mse": 0, "relative": 0}
    mean = np.tile(x[1:].mean(0), (101, 1))
    assert reconstruction_error(x, mean)["relative"] == pytest.approx(1, rel=1e-5)


def neighbours_in_plain_python(codes, x, decoded, k):
    """The definition, item by item, sorting tuples."""
    recall = []
    for i in range(1, len(x)):
        others = [j for j in range(1, len(x)) if j != i]

        def prefix(j, i=i):
            same = 0
            while same < codes.shape[1] and codes[i, same] == codes[j, same]:
                same += 1
            return same

        near = sorted(others, key=lambda j: (((x[i] - x[j]) ** 2).sum(), j))[:k]
        by_code = sorted(others, key=lambda j: (-prefix(j), ((decoded[i] - decoded[j]) ** 2).sum(), j))[:k]
        recall.append(len(set(near) & set(by_code)) / k)
    return np.array(recall)


@pytest.mark.parametrize("with_decoded", [True, False])
def test_neighbours_kept_is_its_definition(monkeypatch, with_decoded):
    monkeypatch.setattr("recscale.semantic_ids.diagnostics.BLOCK_ENTRIES", 500)  # several blocks
    rng = np.random.default_rng(0)
    x = rng.normal(size=(61, 5)).astype(np.float32)
    codes = np.concatenate([np.zeros((1, 3)), rng.integers(0, 3, (60, 3))]).astype(np.int32)
    decoded = x + 0.5 * rng.normal(size=x.shape).astype(np.float32)
    expected = neighbours_in_plain_python(codes, x, decoded if with_decoded else 0 * x, 7)
    found = neighbours_kept(codes, x, decoded if with_decoded else None, k=7)
    assert found["recall"] == pytest.approx(expected.mean())
    assert found["stderr"] == pytest.approx(expected.std(ddof=1) / math.sqrt(60))
    assert (found["k"], found["items"], found["chance"]) == (7, 60, pytest.approx(7 / 59))


def test_codes_that_say_everything_keep_all_neighbours_and_random_ones_none():
    rng = np.random.default_rng(0)
    centre = 100 * np.repeat(rng.normal(size=(20, 4)), 11, axis=0)
    x = np.concatenate([np.zeros((1, 4)), centre + rng.normal(size=centre.shape)]).astype(np.float32)
    codes = np.concatenate([[[0]], np.repeat(np.arange(20), 11)[:, None]]).astype(np.int32)
    assert neighbours_kept(codes, x, k=10)["recall"] == 1
    shuffled = codes.copy()
    shuffled[1:] = rng.permutation(codes[1:])
    found = neighbours_kept(shuffled, x, k=10)
    assert abs(found["recall"] - found["chance"]) < 0.06
    assert neighbours_kept(codes, x, k=10, sample=50)["items"] == 50


def test_a_digit_does_not_describe_content():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(41, 3)).astype(np.float32)
    codes = np.concatenate([np.zeros((1, 2)), rng.integers(0, 2, (40, 2))]).astype(np.int32)
    both = describe(codes, (2, 2), vectors_VD=x, learned=1)
    alone = describe(codes[:, :1], (2,), vectors_VD=x)
    assert both["neighbours"] == alone["neighbours"]


def test_describe_is_plain_json():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(31, 3)).astype(np.float32)
    codes = np.concatenate([np.zeros((1, 3)), rng.integers(0, 4, (30, 3))]).astype(np.int32)
    found = describe(codes, (4, 4, 5), vectors_VD=x, reconstruction_VD=0.5 * x)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert set(found) == {"levels", "prefixes", "reconstruction", "neighbours"}
    assert [level["size"] for level in found["levels"]] == [4, 4, 5]
    assert [prefix["levels"] for prefix in found["prefixes"]] == [1, 2, 3]
    assert set(describe(codes, (4, 4, 5))) == {"levels", "prefixes"}
    one = describe(with_padding([[2]]), (4,), vectors_VD=np.ones((2, 2), np.float32))
    assert json.dumps(one, allow_nan=False)
