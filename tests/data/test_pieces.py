"""Pieces of codes: every item is spelt, popular ones with fewer pieces, and training events alone decide how."""

import importlib

import numpy as np
import pytest

from recscale.data import pieces

LEVELS, PLACES, ITEMS = 8, 4, 400


def catalogue(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Codes [ITEMS + 1, PLACES] with common beginnings, and counts of which a few are large and some zero."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, LEVELS, (ITEMS + 1, PLACES))
    codes[1:200, :2] = codes[1, :2]
    codes[0] = 0
    counts = np.minimum(rng.zipf(1.5, ITEMS + 1) - 1, 500)
    counts[0] = 0
    return codes, counts


def spelt(codes: np.ndarray, found: np.ndarray) -> dict[int, tuple]:
    """Piece -> the (place, code) pairs that it stands for; fails where an item gives a piece another meaning.

    The meaning follows from items one by one: of an item whose pieces are all known but one, that one is the rest.
    """
    meaning: dict[int, tuple] = {}
    waiting = [
        (list(enumerate(row)), [int(p) for p in ids if p])
        for row, ids in zip(codes[1:].tolist(), found[1:], strict=True)
    ]
    while waiting:
        later = []
        for letters, ids in waiting:
            while ids and ids[0] in meaning:
                assert tuple(letters[: len(meaning[ids[0]])]) == meaning[ids[0]]
                letters, ids = letters[len(meaning[ids[0]]) :], ids[1:]
            while ids and ids[-1] in meaning:
                assert tuple(letters[-len(meaning[ids[-1]]) :]) == meaning[ids[-1]]
                letters, ids = letters[: -len(meaning[ids[-1]])], ids[:-1]
            if len(ids) == len(letters):
                meaning |= {p: (letter,) for p, letter in zip(ids, letters, strict=True)}
            elif len(ids) == 1:
                meaning[ids[0]] = tuple(letters)
            elif ids:
                later.append((letters, ids))
            assert bool(ids) == bool(letters)
        assert len(later) < len(waiting), "no item says what its pieces are"
        waiting = later
    return meaning


def test_every_item_is_the_sum_of_its_codes():
    codes, counts = catalogue()
    found = pieces.learn(codes, counts, 120)
    assert found.shape == codes.shape and found.dtype == np.uint8 and not found[0].any()
    used = (found > 0).sum(axis=1)[1:]
    assert used.min() >= 1 and found.max() <= 120
    for row, count in zip(found[1:], used, strict=True):
        assert (row[:count] > 0).all() and not row[count:].any()
    meaning = spelt(codes, found)
    assert len(set(meaning.values())) == len(meaning)
    assert any(len(letters) > 1 for letters in meaning.values())


def test_items_are_known_by_their_pieces_as_by_their_codes():
    codes, counts = catalogue(1)
    found = pieces.learn(codes, counts, 150)
    both = np.concatenate([codes, found], axis=1)[1:]
    assert len(np.unique(both, axis=0)) == len(np.unique(codes[1:], axis=0)) == len(np.unique(found[1:], axis=0))


def test_popular_items_need_fewer_pieces():
    codes, counts = catalogue()
    used = (pieces.learn(codes, counts, 120) > 0).sum(axis=1)
    top = np.argsort(-counts[1:])[:10] + 1
    rare = 1 + np.flatnonzero(counts[1:] <= 1)
    assert used[top].mean() < used[rare].mean() - 0.5
    none_merged = pieces.learn(codes, counts, LEVELS * PLACES)
    assert ((none_merged > 0).sum(axis=1)[1:] == PLACES).all()
    with_more = [(pieces.learn(codes, counts, rows)[1:] > 0).sum(axis=1) @ counts[1:] for rows in (32, 60, 120, 300)]
    assert with_more == sorted(with_more, reverse=True) and with_more[-1] < with_more[0]


def test_the_same_counts_give_the_same_pieces_and_items_without_events_decide_nothing():
    codes, counts = catalogue()
    first = pieces.learn(codes, counts, 120)
    np.testing.assert_array_equal(first, pieces.learn(codes, counts, 120))
    unseen = 1 + np.flatnonzero(counts[1:] == 0)
    assert len(unseen) > 20
    changed = codes.copy()
    changed[unseen] = codes[np.random.default_rng(3).permutation(unseen)]
    again = pieces.learn(changed, counts, 120)
    seen = np.setdiff1d(np.arange(ITEMS + 1), unseen)
    np.testing.assert_array_equal(again[seen], first[seen])
    moved = counts.copy()
    moved[unseen[0]] = 10_000
    assert ((pieces.learn(codes, moved, 120) > 0).sum(axis=1)[unseen[0]]) == 1


def test_items_with_the_same_codes_have_the_same_pieces_and_count_together():
    codes, counts = catalogue()
    codes[7] = codes[8] = codes[9]
    counts[7:10] = 300
    found = pieces.learn(codes, counts, 120)
    assert (found[7] == found[8]).all() and (found[8] == found[9]).all() and (found[7] > 0).sum() == 1


@pytest.mark.parametrize("width", [300, 2048, 30_000])
def test_wide_codes_are_spelt_too(width):
    codes = np.random.default_rng(0).integers(0, width, (60, 4))
    codes[0] = 0
    codes[1] = width - 1
    rows = len({(place, code) for row in codes[1:].tolist() for place, code in enumerate(row)})
    found = pieces.learn(codes, np.ones(60), rows)
    assert (found[1:, 0] > 0).all() and found.max() <= rows
    assert len(np.unique(found[1:], axis=0)) == 59


def test_rows_are_for_pieces_that_items_are_spelt_with():
    codes, counts = catalogue()
    for rows in (60, 120, 200):
        found = pieces.learn(codes, counts, rows)
        used = np.unique(found[1:])
        used = used[used > 0]
        assert used.tolist() == list(range(1, len(used) + 1)) and 0.9 * rows <= len(used) <= rows


def test_wrong_input_is_refused_in_one_line():
    codes, counts = catalogue()
    with pytest.raises(ValueError, match=r"table.rows = 31, but the catalogue's codes have 32 values together"):
        pieces.learn(codes, counts, 31)
    with pytest.raises(ValueError, match="no item has a training event"):
        pieces.learn(codes, np.zeros(ITEMS + 1), 100)
    wide = np.full((3, 5), 30_000)
    with pytest.raises(ValueError, match="5 codes of 30001 values: expected 131,068 together"):
        pieces.learn(wide, np.ones(3), 10)


def test_without_the_package_there_is_one_clear_line(monkeypatch):
    def missing(name: str):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ValueError, match=r"needs the package sentencepiece .*pip install 'recscale\[pieces\]'$"):
        pieces.learn(*catalogue(), 100)


def test_no_file_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pieces.learn(*catalogue(), 100)
    assert not list(tmp_path.iterdir())
