"""Vectors to codes: planted structure, seeds, duplicates, collapse, and vectors that cannot be quantised."""

import dataclasses

import numpy as np
import pytest

from recscale.models import rqkmeans, rqvae
from recscale.semantic_ids import fit as fitting
from recscale.semantic_ids.fit import VectorsError, fit_product, fit_rqkmeans, fit_rqvae, random_codes
from recscale.semantic_ids.rqvae_training import Training

KMEANS = rqkmeans.Config(levels=2, codebook=8, iterations=10)
RQVAE = rqvae.Config(input_dim=6, hidden=(16,), latent=4, levels=2, codebook=16, straight_through="sum")
TRAINING = Training(steps=60, batch_size=32, chunk=20, learning_rate=3e-3, kmeans_iterations=10, restart_every=10)


def vectors(rows: int = 100) -> np.ndarray:
    rng = np.random.default_rng(0)
    found = rng.normal(size=(6, 6))[rng.integers(0, 6, rows)] + 0.2 * rng.normal(size=(rows, 6))
    found[-5:] = found[:5]  # duplicates
    return found.astype(np.float32)


def assert_same(a: fitting.Fit, b: fitting.Fit) -> None:
    np.testing.assert_array_equal(a.codes_NQ, b.codes_NQ)
    for one, two in zip(a.codebooks, b.codebooks, strict=True):
        np.testing.assert_array_equal(one, two)
    assert a.history == b.history


@pytest.mark.parametrize("fit", [fit_rqkmeans, fit_product])
def test_same_seed_same_bits_and_duplicates_share_a_tuple(fit):
    one, two = fit(vectors(), KMEANS, 3), fit(vectors(), KMEANS, 3)
    assert_same(one, two)
    assert one.facts["duplicates"] == 5 and one.sizes == (8, 8)
    np.testing.assert_array_equal(one.codes_NQ[-5:], one.codes_NQ[:5])
    assert one.codes_NQ.dtype == np.int32 and one.facts["parameters"] == {
        "codebooks": sum(b.size for b in one.codebooks)
    }
    objectives = [row["objective"] for row in one.history if row["level"] == 0]
    assert objectives[-1] < objectives[0]


def test_an_rqvae_learns_uses_its_codes_and_gives_the_same_bits_again():
    one, two = (fit_rqvae(vectors(), RQVAE, TRAINING, 3, inputs="standard") for _ in range(2))
    assert_same(one, two)
    first, last = one.history[0], one.history[-1]
    assert [row["step"] for row in one.history] == [20, 40, 60]
    assert last["reconstruction"] < first["reconstruction"]
    assert min(last["usage"]) > 0.6 and last["perplexity"][0] > 6
    np.testing.assert_array_equal(one.codes_NQ[-5:], one.codes_NQ[:5])
    x = vectors()
    assert np.square(x - one.reconstruction_ND).sum() < 0.9 * np.square(x - x.mean(axis=0)).sum()
    last_level = ((one.last_Nd[:, None] - one.codebooks[-1][None]) ** 2).sum(axis=2)
    np.testing.assert_array_equal(one.codes_NQ[:, -1], last_level.argmin(axis=1))


def test_chunks_do_not_change_the_run():
    """60 steps in chunks of 20 are 60 steps at once, but for the mean loss of a longer row."""
    parts = fit_rqvae(vectors(), RQVAE, TRAINING, 0)
    whole = fit_rqvae(vectors(), RQVAE, dataclasses.replace(TRAINING, chunk=60), 0)
    for a, b in zip(parts.codebooks, whole.codebooks, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.mean([row["loss"] for row in parts.history]), whole.history[0]["loss"], rtol=1e-4)


def test_restarts_bring_a_collapsed_codebook_back():
    """From a random start near zero few codes are used, and unevenly; restarts mend it."""
    start = dataclasses.replace(TRAINING, kmeans_iterations=0, restart_every=0, steps=60, chunk=20)
    dead = fit_rqvae(vectors(), RQVAE, start, 0).history[-1]
    alive = fit_rqvae(vectors(), RQVAE, dataclasses.replace(start, restart_every=5), 0).history[-1]
    assert dead["usage"][0] <= 0.6 and dead["perplexity"][0] < 6
    assert alive["usage"] == [1.0, 1.0] and alive["perplexity"][0] > 9


def test_moving_averages_sinkhorn_rotation_and_alignment_run_together():
    c = dataclasses.replace(
        RQVAE, learning="ema", assignment="sinkhorn", straight_through="rotation", align_dim=3, align_weight=0.1
    )
    known = np.random.default_rng(1).normal(size=(100, 3)).astype(np.float32)
    known[7] = 0
    t = dataclasses.replace(TRAINING, optimizer="adagrad", learning_rate=0.05, schedule="cosine", warmup=5)
    found = fit_rqvae(vectors(), c, t, 0, behaviour_NE=known)
    assert found.facts["items_with_behaviour"] == 99
    assert found.history[-1]["alignment"] < found.history[0]["alignment"]
    assert found.history[-1]["usage"][1] == 1.0


def test_settings_that_do_not_fit_the_vectors_are_refused():
    x = vectors()
    with pytest.raises(ValueError, match=r"model.input_dim = 6, but the vectors have 5"):
        fit_rqvae(x[:, :5], RQVAE, TRAINING, 0)
    with pytest.raises(ValueError, match=r"inputs = 'whiten'"):
        fit_rqvae(x, RQVAE, TRAINING, 0, inputs="whiten")
    with pytest.raises(ValueError, match=r"model.align_dim = 0 .*but there are some"):
        fit_rqvae(x, RQVAE, TRAINING, 0, behaviour_NE=x)
    c = dataclasses.replace(RQVAE, align_dim=6, align_weight=1.0)
    with pytest.raises(ValueError, match=r"behaviour vectors: shape \[99, 6\], expected finite numbers \[100, 6\]"):
        fit_rqvae(x, c, TRAINING, 0, behaviour_NE=x[1:])
    with pytest.raises(ValueError, match=r"fit.kmeans_points = 3: expected at least model.codebook = 16"):
        fit_rqvae(x, RQVAE, dataclasses.replace(TRAINING, kmeans_points=3), 0)


@pytest.mark.parametrize("change", [{"steps": 0}, {"clip": -1.0}, {"optimizer": "sgd"}, {"warmup": 60}])
def test_a_training_that_cannot_be_is_refused(change: dict):
    (name,) = change
    with pytest.raises(ValueError, match=rf"fit\.{name}"):
        dataclasses.replace(TRAINING, **change)


def test_a_run_that_diverges_says_so():
    with pytest.raises(ValueError, match=r"the loss is (nan|inf) at step 20: lower fit.learning_rate"):
        fit_rqvae(1e25 * vectors(), RQVAE, TRAINING, 0)


def bad(at: int, value: float) -> np.ndarray:
    x = vectors()
    x[at:, 2] = value
    return x


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (bad(98, np.nan), "2 of 100 have NaN or infinite values, first 98"),
        (bad(99, np.inf), "1 of 100 have NaN or infinite values, first 99"),
        (np.ones((50, 3)), "all 50 rows are equal"),
        (vectors(9), "5 distinct for 8 codes a level: use model.codebook = 5 or fewer"),
        (np.ones(5), r"float64 \[5\], expected numbers \[items, dimensions\]"),
        (np.ones((0, 5)), r"\[0, 5\]"),
        (np.array([["a", "b"]]), "expected numbers"),
    ],
)
def test_vectors_that_cannot_be_quantised_are_refused_in_one_line(x: np.ndarray, words: str):
    with pytest.raises(VectorsError, match=words) as error:
        fit_rqkmeans(x, KMEANS, 0)
    assert "\n" not in str(error.value)


def test_first_equal_finds_repeats_and_takes_minus_zero_for_zero():
    x = np.array([[1, 2], [0.0, 1], [1, 2], [-0.0, 1], [2, 1]], np.float32)
    assert fitting.first_equal(x).tolist() == [0, 1, 0, 1, 4]
    x = np.random.default_rng(0).integers(0, 9, (70_000, 2)).astype(np.float32)
    _, first, index = np.unique(x, axis=0, return_index=True, return_inverse=True)
    np.testing.assert_array_equal(fitting.first_equal(x), first[index])


def test_balanced_codes_have_equal_sizes_whatever_repeats():
    found = fit_rqkmeans(vectors(), dataclasses.replace(KMEANS, balanced_iterations=2), 0)
    counts = np.stack([np.bincount(level, minlength=8) for level in found.codes_NQ.T])
    assert set(counts.reshape(-1).tolist()) == {12, 13} and found.facts["balanced"]


@pytest.mark.parametrize("sizes", [(4, 4, 8), (64, 64, 64), (2**20, 2**20, 2**20, 2**20)])
def test_unique_random_codes_are_distinct_even_and_seeded(sizes: tuple[int, ...]):
    one, two = (random_codes(100, sizes, 1, unique=True).codes_NQ for _ in range(2))
    np.testing.assert_array_equal(one, two)
    assert len(np.unique(one, axis=0)) == 100
    assert (one >= 0).all() and (one < np.array(sizes)).all()
    assert (one != random_codes(100, sizes, 2, unique=True).codes_NQ).any()


def test_random_codes_are_uniform_and_may_collide():
    codes = random_codes(4000, (8, 8), 0).codes_NQ
    assert np.abs(np.bincount(codes[:, 0] * 8 + codes[:, 1], minlength=64) - 62.5).max() < 5 * 62.5**0.5
    assert random_codes(64, (8, 8), 0, unique=True).codes_NQ.shape == (64, 2)
    with pytest.raises(ValueError, match=r"65 items, but levels \(8, 8\) make 64 tuples"):
        random_codes(65, (8, 8), 0, unique=True)
