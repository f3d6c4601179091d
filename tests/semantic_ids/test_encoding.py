"""A quantizer that is kept gives the vectors that it was fitted to their own codes again, and says so of others."""

import numpy as np
import pytest

from recscale.models import rqkmeans, rqvae
from recscale.semantic_ids import encoding
from recscale.semantic_ids.catalogue import Codes
from recscale.semantic_ids.fit import Fit, fit_product, fit_rqkmeans, fit_rqvae, random_codes
from recscale.semantic_ids.rqvae_training import Training

KMEANS = rqkmeans.Config(levels=2, codebook=8, iterations=10)
UNIT = rqkmeans.Config(levels=2, codebook=8, iterations=10, normalize_residuals=True)
RQVAE = rqvae.Config(input_dim=6, hidden=(8,), latent=4, levels=2, codebook=8)
TRAINING = Training(steps=20, batch_size=32, chunk=20, restart_every=0)
MEAN = {"mean": np.zeros(6, np.float32)}


def vectors(rows: int = 100, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    found = 3 + rng.normal(size=(rows, 6)) * np.arange(1, 7)[None]
    found[-5:] = found[:5]  # duplicates
    return found.astype(np.float32)


def as_codes(fit: Fit) -> Codes:
    codes = np.pad(fit.codes_NQ, ((1, 0), (0, 0)))
    return Codes(codes, fit.sizes, fit.facts, fit.codebooks, encoder=encoding.keep(MEAN, fit))


FITS = {
    "rqkmeans": lambda x: fit_rqkmeans(x, KMEANS, 0),
    "rqkmeans of unit residuals": lambda x: fit_rqkmeans(x, UNIT, 0),
    "product": lambda x: fit_product(x, KMEANS, 0),
    "rqvae": lambda x: fit_rqvae(x, RQVAE, TRAINING, 0),
    "rqvae of standard inputs": lambda x: fit_rqvae(x, RQVAE, TRAINING, 0, inputs="standard"),
    "rqvae of unit inputs": lambda x: fit_rqvae(x, RQVAE, TRAINING, 0, inputs="unit"),
}


@pytest.mark.parametrize("name", FITS)
def test_what_was_fitted_gets_its_codes_again_alone_and_among_others(name):
    x = vectors()
    fit = FITS[name](x)
    again = encoding.encode(as_codes(fit), x)
    np.testing.assert_array_equal(again.codes_NQ, fit.codes_NQ)
    np.testing.assert_allclose(again.reconstruction_ND, fit.reconstruction_ND, rtol=1e-4, atol=1e-4)
    mixed = encoding.encode(as_codes(fit), np.concatenate([100 * vectors(7, seed=1), x[40:60]]))
    np.testing.assert_array_equal(mixed.codes_NQ[7:], fit.codes_NQ[40:60])  # the others' statistics play no part


def test_equal_vectors_get_equal_codes():
    x = vectors()
    found = encoding.encode(as_codes(fit_rqkmeans(x, KMEANS, 0)), np.repeat(vectors(3, seed=1)[:1], 5, axis=0))
    assert len(np.unique(found.codes_NQ, axis=0)) == len(np.unique(found.reconstruction_ND, axis=0)) == 1


def test_what_cannot_encode_is_not_kept():
    assert encoding.keep(MEAN, random_codes(9, (4, 4), 0)) == {}
    assert encoding.keep({}, fit_rqkmeans(vectors(), KMEANS, 0)) == {}
