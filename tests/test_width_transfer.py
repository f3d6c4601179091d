"""Width transfer: at the base shape nothing changes; beyond it a step changes hidden states and scores by as much."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from recscale.program import Program, draw_dense, program
from tests.steps import QUICK
from tests.tiny_run import FULL, ITEMS, tiny

BASE = 16
WIDTHS = (16, 32, 64, 128)
STEPS, SEEDS = (1, 3, 10), 4
STACK = {"hstu": "layers", "sasrec": "blocks"}
B, L, BATCHES = 8, 12, 11


def width_program(model: str, width: int, parametrisation: str, tied: bool) -> Program:
    """Two layers of a width, one head; tied: the item vectors are as wide as the hidden states."""
    shape = {"width": width, "embed_dim": width if tied else BASE, "depth": 2, "heads": 1, "dropout": 0.0}
    shape |= {"qk_dim": width, "v_dim": width} if model == "hstu" else {"ffn": 2 * width}
    rates = {"schedule": "constant", "warmup": 0, "learning_rate": 1e-2, "clip": 0.0, "weight_decay": 0.0}
    rates |= {"parametrisation": parametrisation, "base_width": BASE, "base_embed_dim": BASE, "base_head_dim": BASE}
    changes = {f"model__{k}": v for k, v in shape.items()} | {f"optim__{k}": v for k, v in rates.items()}
    dot = {"task__similarity": "dot", "task__temperature": 1.0}
    return program(tiny(model, Path("unused"), **changes, **FULL, **dot), ITEMS, {}, 100)


def make_batches(seed: int = 0) -> dict[str, jax.Array]:
    """Batches of full rows; what follows an item is mostly decided by it."""
    rng = np.random.default_rng(seed)
    follows = rng.permutation(ITEMS) + 1
    ids = np.zeros((BATCHES, B, L + 1), np.int32)
    ids[..., 0] = rng.integers(1, ITEMS + 1, (BATCHES, B))
    for i in range(L):
        ids[..., i + 1] = np.where(rng.random((BATCHES, B)) < 0.8, follows[ids[..., i] - 1], rng.integers(1, ITEMS + 1))
    ones, places = np.ones((BATCHES, B, L), np.int32), np.broadcast_to(np.arange(L, dtype=np.int32), (BATCHES, B, L))
    found = {"item_id": ids[..., :-1], "target": ids[..., 1:], "segment_ids": ones, "positions": places}
    return {name: jnp.asarray(x) for name, x in found.items()}


def hidden_states(run: Program, model: Any, table: jax.Array, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """What leaves the layers, [depth, B, L, width], and the scores of all items, [B, L, V]."""
    c, name = run.model_config, run.config.model_name
    scale = (c.base.embed_dim if c.base else c.embed_dim) ** 0.5
    x = table[batch["item_id"]] * scale + model.positions[...][None, :L]
    if model.up is not None:
        x = x @ (model.up[...] if isinstance(model.up, nnx.Param) else model.up.kernel[...])

    def step(x, layer):
        x = layer(c, x, batch, None)
        return x, x

    _, layers = jax.lax.scan(step, x, getattr(model, STACK[name]))
    return {"layers": layers, "scores": model(table[batch["item_id"]], batch) @ table[1:].T}


@functools.cache
def changes(model: str, width: int, parametrisation: str, tied: bool) -> dict[str, np.ndarray]:
    """Root mean squares per coordinate: of the start, and of its change after 1, 3 and 10 steps, on the first batch.

    Geometric means over seeds.
    """
    run = width_program(model, width, parametrisation, tied)
    batches = make_batches()
    first = jax.tree.map(lambda x: x[0], batches)
    tables = optax.adam(1e-3)  # the rate of the item vectors is the same at every width

    def loss(parameters, batch):
        (model, _), table = parameters
        scores = model(table[batch["item_id"]], batch) @ table[1:].T
        return optax.softmax_cross_entropy_with_integer_labels(scores, batch["target"] - 1).mean()

    def step(carry, batch):
        dense, table, (own, slots) = carry
        before = hidden_states(run, dense[0], table, first)
        dense_gradient, table_gradient = jax.grad(loss)((dense, table), batch)
        dense_change, own = run.optimizer.update(dense_gradient, own, dense)
        table_change, slots = tables.update(table_gradient, slots)
        dense, table = optax.apply_updates((dense, table), (dense_change, table_change))
        return (dense, table, (own, slots)), before

    def train(seed):
        dense = (draw_dense(run, seed, {})["model"], {})
        table = 0.02 * jax.random.normal(
            jax.random.fold_in(jax.random.key(1), seed), (ITEMS + 1, run.tables.specs["item"].dim)
        )
        states = run.optimizer.init(dense), tables.init(table)
        _, found = jax.lax.scan(step, (dense, table, states), batches)
        return jax.tree.map(lambda x: rms(jnp.concatenate([x[:1], x[jnp.array(STEPS)] - x[:1]])), found)

    seeds = np.arange(SEEDS, dtype=np.uint32)
    found = jax.jit(jax.vmap(train)).lower(seeds).compile(compiler_options=QUICK)(seeds)
    return {name: np.exp(np.log(np.asarray(x)).mean(axis=0)) for name, x in found.items()}


def rms(x: jax.Array) -> jax.Array:
    """Root mean square over all but the first axis."""
    return jnp.sqrt(jnp.square(x).reshape(x.shape[0], -1).mean(axis=1))


def slopes(model: str, parametrisation: str, tied: bool, widths: tuple[int, ...]) -> dict[str, np.ndarray]:
    """d log rms / d log width of what `changes` returns: of the start, then of the changes."""
    found = [changes(model, width, parametrisation, tied) for width in widths]
    return {name: np.polyfit(np.log(widths), np.log([f[name] for f in found]), 1)[0] for name in found[0]}


SLOW = pytest.mark.slow


@pytest.mark.parametrize("model", ["hstu", pytest.param("sasrec", marks=SLOW)])
def test_at_the_base_shape_both_parametrisations_are_the_same_run(model):
    found, expected = (changes(model, BASE, kind, False) for kind in ("mup", "sp"))
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value)


@pytest.mark.parametrize(
    ("model", "tied", "widths"),
    [
        ("hstu", False, (BASE, 128)),
        pytest.param("hstu", False, WIDTHS, marks=SLOW),
        pytest.param("hstu", True, WIDTHS, marks=SLOW),
        pytest.param("sasrec", False, WIDTHS, marks=SLOW),
        pytest.param("sasrec", True, WIDTHS, marks=SLOW),
    ],
)
def test_a_step_changes_as_much_at_every_width(model, tied, widths):
    """Hidden states by as much, scores by no more. With the standard parametrisation the changes grow with the width.

    tied: the item vectors are as wide as the hidden states; else they have width 16, as on the encoder axis. What stems
    from the random start of vectors that are scored fades as the width grows, so slopes may be below 0.
    """
    standard, transferred = (slopes(model, kind, tied, widths) for kind in ("sp", "mup"))
    for name, slope in transferred.items():
        lowest, highest = (-0.4, 0.2) if name == "scores" else (-0.25 if tied else -0.15, 0.15)
        assert np.all((slope[1:] > lowest) & (slope[1:] < highest)), (name, slope)
        assert np.all(standard[name][1:] > 0.35), (name, standard[name])
        assert np.all(standard[name][1:] > slope[1:] + 0.3), (name, standard[name], slope)
    assert np.abs(transferred["layers"][0]) < 0.1  # nor does the start depend on the width


@pytest.mark.parametrize("model", STACK)
def test_every_matrix_of_the_model_is_named_and_no_bias_learns_more_slowly(model):
    """Matrices that read the width learn m times more slowly; what is named is there."""
    run = width_program(model, 64, "mup", tied=False)
    shapes = jax.eval_shape(lambda: run.model.Model(run.model_config, jax.random.key(0)))
    leaves, _ = jax.tree_util.tree_flatten_with_path(shapes)
    names = {jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value"): x for path, x in leaves}
    factors = run.model.width_factors(run.model_config)
    assert set(factors) <= set(names)
    for name, leaf in names.items():
        stacked = name.startswith(STACK[model])
        matrix = leaf.ndim - stacked == 2 and leaf.shape[-2] >= 64  # reads at least the width
        assert (factors[name].rate if name in factors else 1.0) == (0.25 if matrix else 1.0), name
    assert factors["up" if model == "hstu" else "up.kernel"].rate == 1.0


def test_width_transfer_needs_the_shape_that_was_tuned():
    config = width_program("hstu", 32, "sp", tied=False).config.copy_and_resolve_references().unlock()
    config.optim.update({"parametrisation": "mup", "base_width": 0})
    with pytest.raises(ValueError, match=r"optim.base_width = 0: .*recipes.width_transfer\(config\) writes it"):
        program(config.lock(), ITEMS, {}, 100)
    with pytest.raises(ValueError, match=r"optim.parametrisation = 'mupp': expected one of \('sp', 'mup'\)"):
        width_program("hstu", 32, "mupp", tied=False)
