"""Beam search over a trie: equal to full scoring and to a plain beam search, to the last tie; items; exclusion."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recscale.layers import beam
from recscale.layers import trie as tries
from recscale.layers.code_sampling import sample

QUICK = settings(max_examples=25, deadline=None, derandomize=True)
SIZES = {1: (6,), 2: (3, 4), 3: (3, 2, 4), 4: (2, 3, 1, 3), 5: (2, 2, 2, 1, 3)}
"""Codebook sizes by number of levels."""
ITEMS, BATCH, SEEN = 9, 3, 5


def tables(rng: np.random.Generator, sizes: tuple[int, ...], ties: bool) -> list[np.ndarray]:
    """log p(code | prefix) of each row: float32 [B, number of prefixes, K] per level; some codes are impossible."""
    out, prefixes = [], 1
    for size in sizes:
        values = rng.normal(size=(BATCH, prefixes, size)).astype(np.float32) - 1
        values = np.round(values) if ties else values
        out.append(np.where(rng.random(values.shape) < 0.1, -np.inf, values).astype(np.float32))
        prefixes *= size
    return out


def step_of(log_probs: list, sizes: tuple[int, ...]):
    """The step that reads the tables; the prefix so far is the cache, as a number of the mixed radix."""

    def step(cache, code_BW, level):
        prefix = cache["prefix"][..., 0] * sizes[level - 1] + code_BW if level else cache["prefix"][..., 0]
        log_prob = jax.vmap(lambda table, at: table[at])(jnp.asarray(log_probs[level]), prefix)
        return log_prob, {"prefix": prefix[..., None]}

    return step


@functools.partial(jax.jit, static_argnames=("width", "sizes"))
def search(log_probs, trie, excluded_BE, width, sizes):
    batch = log_probs[0].shape[0]
    cache = {"prefix": jnp.zeros((batch, width, 1), jnp.int32)}
    return beam.beam_search(step_of(log_probs, sizes), cache, trie, batch, width, excluded_BE)


def plain_beams(log_probs, codes_VQ, sizes, width, row, excluded=()):
    """Beam search over dictionaries and tuples: [(score, tuple)]."""
    live = [tuple(codes.tolist()) for item, codes in enumerate(codes_VQ) if item and item not in excluded]
    beams = [(np.float32(0), ())] if live else []
    for level in range(len(sizes)):
        found = []
        for score, prefix in beams:
            place = int(np.ravel_multi_index(prefix, sizes[:level])) if level else 0
            for child in sorted({codes[: level + 1] for codes in live if codes[:level] == prefix}):
                found.append((np.float32(score + log_probs[level][row, place, child[-1]]), child))
        beams = sorted(found, key=lambda x: (-x[0], x[1]))[:width]
    return beams


def full_ranking(log_probs, codes_VQ, sizes, row, excluded=()):
    """Every live tuple by its summed log-probability."""
    live = {tuple(codes.tolist()) for item, codes in enumerate(codes_VQ) if item and item not in excluded}
    scored = []
    for codes in live:
        score = np.float32(0)
        for level, code in enumerate(codes):
            place = int(np.ravel_multi_index(codes[:level], sizes[:level])) if level else 0
            score = np.float32(score + log_probs[level][row, place, code])
        scored.append((score, codes))
    return sorted(scored, key=lambda x: (-x[0], x[1]))


def listed(beams: beam.Beams, trie: tries.Trie, row: int):
    """[(score, tuple)] of a row; the tuple is held against the leaf, and what stays empty must come last."""
    leaves = np.asarray(beams.leaf_BW)[row]
    scores, codes = np.asarray(beams.score_BW)[row], np.asarray(beams.codes_BWQ)[row]
    count = int((leaves >= 0).sum())
    assert (leaves[:count] >= 0).all() and (scores[count:] == -np.inf).all() and (codes[count:] == -1).all()
    assert len(set(leaves[:count].tolist())) == count
    assert (codes[:count] == tries.leaf_codes(trie)[leaves[:count]]).all()
    return [(score, tuple(code.tolist())) for score, code in zip(scores[:count], codes[:count], strict=True)]


def catalogue(rng: np.random.Generator, sizes: tuple[int, ...]) -> np.ndarray:
    """Codes [V + 1, Q], several items to some tuples. The tree has one form for each `sizes`: only its labels and the
    items at its leaves are random, so that a search is compiled once."""
    fixed = np.random.default_rng(len(sizes))
    codes = np.stack([fixed.permutation(np.arange(ITEMS + 1) % size) for size in sizes], axis=1)
    codes[[2, 5, 6]] = codes[[1, 4, 4]]
    for level, size in enumerate(sizes):
        codes[:, level] = rng.permutation(size)[codes[:, level]]
    return np.concatenate([np.zeros((1, len(sizes))), rng.permutation(codes[1:])]).astype(np.int32)


def problem(seed: int, levels: int):
    """Codes, tables (every other one full of ties) and excluded items (rows of few and of many) drawn from a seed."""
    rng = np.random.default_rng(seed)
    excluded = np.sort(rng.integers(0, ITEMS + 1, (BATCH, SEEN)), axis=1).astype(np.int32)
    excluded[1] = np.sort(np.append(rng.permutation(np.arange(1, ITEMS + 1))[: SEEN - 1], 0))
    codes = catalogue(rng, SIZES[levels])
    return codes, tables(rng, SIZES[levels], ties=seed % 2 == 0), excluded


@pytest.mark.parametrize("levels", SIZES)
@QUICK
@given(seed=st.integers(0, 2**32 - 1))
def test_a_wide_beam_is_full_scoring_and_a_narrow_one_a_plain_beam_search(levels, seed):
    sizes = SIZES[levels]
    codes, log_probs, excluded = problem(seed, levels)
    trie = tries.build(codes)
    for width in (2, ITEMS):
        for seen in (np.zeros_like(excluded), excluded):
            beams = search(log_probs, trie, seen, width, sizes)
            for row in range(BATCH):
                found = listed(beams, trie, row)
                assert found == plain_beams(log_probs, codes, sizes, width, row, seen[row])
                if width == ITEMS:
                    assert found == full_ranking(log_probs, codes, sizes, row, seen[row])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_the_same_for_trees_of_any_form(seed):
    rng = np.random.default_rng(seed)
    sizes = SIZES[1 + seed % 5]
    codes = np.stack([rng.integers(0, size, ITEMS + 1) for size in sizes], axis=1).astype(np.int32)
    log_probs, trie, width = tables(rng, sizes, seed % 3 == 0), tries.build(codes), int(rng.integers(1, 8))
    seen = np.sort(rng.integers(0, ITEMS + 1, (BATCH, SEEN)), axis=1).astype(np.int32)
    beams = search(log_probs, trie, seen, width, sizes)
    for row in range(BATCH):
        assert listed(beams, trie, row) == plain_beams(log_probs, codes, sizes, width, row, seen[row])


def test_a_row_does_not_depend_on_its_company():
    codes, log_probs, excluded = problem(4, 3)
    trie = tries.build(codes)
    together = search(log_probs, trie, excluded, 3, SIZES[3])
    for row in range(BATCH):
        alone = search([table[row : row + 1] for table in log_probs], trie, excluded[row : row + 1], 3, SIZES[3])
        for a, b in zip(alone, together, strict=True):
            np.testing.assert_array_equal(np.asarray(a)[0], np.asarray(b)[row])


def test_without_a_list_of_excluded_items_nothing_is_excluded():
    codes, log_probs, excluded = problem(5, 2)
    trie = tries.build(codes)
    none, empty, zeros = (search(log_probs, trie, x, 4, SIZES[2]) for x in (None, excluded[:, :0], 0 * excluded))
    for a, b, c in zip(none, empty, zeros, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, c)


def test_impossible_tuples_come_last_in_order_and_before_empty_places():
    codes = np.array([[0, 0], [1, 0], [0, 1], [0, 0], [1, 1]], np.int32)
    first = np.full((1, 1, 2), [-np.inf, -1.0], np.float32)
    second = np.full((1, 2, 2), [-np.inf, -np.inf], np.float32)
    second[0, 1, 1] = -2.0
    beams = search([first, second], tries.build(codes), None, 6, (2, 2))
    assert np.asarray(beams.leaf_BW)[0].tolist() == [3, 0, 1, 2, -1, -1]
    assert np.asarray(beams.score_BW)[0].tolist() == [-3.0] + [-np.inf] * 5
    assert np.asarray(beams.codes_BWQ)[0].tolist() == [[1, 1], [0, 0], [0, 1], [1, 0], [-1, -1], [-1, -1]]


def test_zero_of_either_sign_is_one_score():
    codes = np.array([[0], [2], [0], [1]], np.int32)
    beams = search([np.array([[[-0.0, 0.0, -0.0]]], np.float32)], tries.build(codes), None, 3, (3,))
    assert np.asarray(beams.leaf_BW)[0].tolist() == [0, 1, 2]


def test_a_row_of_nan_has_no_tuples_and_says_so_and_spoils_no_other():
    codes, log_probs, _ = problem(7, 2)
    trie = tries.build(codes)
    clean = search(log_probs, trie, None, ITEMS, SIZES[2])
    log_probs[1][1, :, :] = np.nan
    beams = search(log_probs, trie, None, ITEMS, SIZES[2])
    assert (np.asarray(beams.leaf_BW)[1] == -1).all() and np.isnan(np.asarray(beams.score_BW)[1]).all()
    for row in (0, 2):
        np.testing.assert_array_equal(clean.leaf_BW[row], beams.leaf_BW[row])
        np.testing.assert_array_equal(clean.score_BW[row], beams.score_BW[row])


@QUICK
@given(seed=st.integers(0, 2**32 - 1))
def test_items_follow_their_tuples_and_every_target_finds_its_place(seed):
    codes, log_probs, excluded = problem(seed, 3)
    trie = tries.build(codes)
    beams = search(log_probs, trie, excluded, 3, SIZES[3])
    ranked = beam.ranked_items(beams, trie, ITEMS, excluded)
    expected, buckets = np.zeros((BATCH, ITEMS), np.int32), []
    for row in range(BATCH):
        live = [i for i in range(1, ITEMS + 1) if i not in excluded[row]]
        buckets.append([[i for i in live if tuple(codes[i].tolist()) == x] for _, x in listed(beams, trie, row)])
        items = [item for bucket in buckets[row] for item in bucket]
        expected[row, : len(items)] = items
    np.testing.assert_array_equal(ranked, expected)
    np.testing.assert_array_equal(beam.ranked_items(beams, trie, 2, excluded), expected[:, :2])
    for target in range(ITEMS + 1):
        found = jax.device_get(jitted_places(beams, trie, np.full(BATCH, target, np.int32), excluded))
        for row in range(BATCH):
            at = [n for n, bucket in enumerate(buckets[row]) if target in bucket]
            assert bool(found.found_B[row]) == bool(at)
            live = [i for i in range(1, ITEMS + 1) if i not in excluded[row]]
            assert found.bucket_B[row] == sum((codes[i] == codes[target]).all() for i in live if target)
            before = 1 + sum(map(len, buckets[row][: at[0]])) if at else 0
            assert (found.tuple_rank_B[row], found.first_rank_B[row]) == (1 + at[0] if at else 0, before)


jitted_places = jax.jit(beam.places)


def test_draws_follow_the_renormalised_and_tempered_distribution():
    codes, log_probs, _ = problem(2, 2)
    sizes, trie, count, temperature = SIZES[2], tries.build(codes), 20_000, 1.5
    rng = np.random.default_rng(0)
    log_probs = [np.where(np.isfinite(table), table, rng.normal(size=table.shape)) for table in log_probs]
    cache = {"prefix": jnp.zeros((BATCH, 1, 1), jnp.int32)}
    draw = jax.jit(lambda key: sample(step_of(log_probs, sizes), cache, trie, BATCH, key, count, temperature))
    beams = draw(jax.random.key(1))
    leaves = tries.leaf_codes(trie)
    for row in range(BATCH):
        chance = np.ones(len(leaves))
        for level in range(2):
            for n, leaf in enumerate(leaves):
                siblings = {tuple(x[: level + 1].tolist()) for x in leaves if (x[:level] == leaf[:level]).all()}
                place = leaf[0] if level else 0
                mass = {x[-1]: np.exp(log_probs[level][row, place, x[-1]] / temperature) for x in siblings}
                chance[n] *= mass[leaf[level]] / sum(mass.values())
        drawn = np.bincount(np.asarray(beams.leaf_BW)[row], minlength=len(leaves)) / count
        assert (np.abs(drawn - chance) < 5 * np.sqrt(chance * (1 - chance) / count)).all()
        exact = {codes: score for score, codes in full_ranking(log_probs, codes, sizes, row)}
        for n in range(20):
            found = tuple(np.asarray(beams.codes_BWQ)[row, n].tolist())
            assert found == tuple(leaves[beams.leaf_BW[row, n]].tolist())
            np.testing.assert_allclose(beams.score_BW[row, n], exact[found], rtol=1e-6)
    assert (draw(jax.random.key(1)).leaf_BW == beams.leaf_BW).all()
    assert not (draw(jax.random.key(2)).leaf_BW == beams.leaf_BW).all()


def test_draws_never_take_what_is_impossible():
    codes = np.array([[0, 0], [1, 0], [0, 1], [0, 0], [1, 1]], np.int32)
    log_probs = [np.full((1, 1, 2), [-1.0, -1.0]), np.array([[[-np.inf, -np.inf], [-np.inf, -1.0]]])]
    cache = {"prefix": jnp.zeros((1, 1, 1), jnp.int32)}
    beams = jax.jit(lambda trie: sample(step_of(log_probs, (2, 2)), cache, trie, 1, jax.random.key(0), 40))(
        tries.build(codes)
    )
    assert set(np.asarray(beams.leaf_BW)[0].tolist()) == {-1, 3}
    assert set(np.asarray(beams.score_BW)[0].tolist()) == {-np.inf, -2.0}


def test_what_cannot_be_searched_is_refused():
    codes, log_probs, _ = problem(0, 2)
    trie, cache = tries.build(codes), {"prefix": jnp.zeros((BATCH, 1, 1), jnp.int32)}
    step = step_of(log_probs, SIZES[2])
    with pytest.raises(ValueError, match="width: found 0"):
        beam.beam_search(step, cache, trie, BATCH, 0)
    narrow = step_of([log_probs[0], log_probs[1][..., :3]], SIZES[2])
    with pytest.raises(ValueError, match="level 1: the step gave log-probabilities of 3 codes"):
        jax.eval_shape(lambda: beam.beam_search(narrow, cache, trie, BATCH, 2))
    with pytest.raises(ValueError, match="level 1: the step gave log-probabilities of 3 codes"):
        jax.eval_shape(lambda: sample(narrow, cache, trie, BATCH, jax.random.key(0), 2))
    with pytest.raises(ValueError, match="count: found 0"):
        sample(step, cache, trie, BATCH, jax.random.key(0), 0)
    with pytest.raises(ValueError, match="temperature: found 0"):
        sample(step, cache, trie, BATCH, jax.random.key(0), 1, 0)
