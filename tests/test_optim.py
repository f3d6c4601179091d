"""Table rules against dense numpy, and the learning-rate schedules' values."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from recscale import optim

V, D, N = 30, 4, 16


def steps(count: int = 5, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    """Touched rows (padding and repeats among them) and gradients of some steps; rows above 20 are never touched."""
    rng = np.random.default_rng(seed)
    return [(rng.integers(0, 20, N).astype(np.int32), rng.normal(size=(N, D)).astype(np.float32)) for _ in range(count)]


def start() -> np.ndarray:
    table = np.random.default_rng(9).normal(size=(V, D)).astype(np.float32)
    table[0] = 0.0
    return table


def dense_gradient(touched: np.ndarray, grads: np.ndarray) -> np.ndarray:
    dense = np.zeros((V, D))
    np.add.at(dense, touched, grads)
    dense[0] = 0.0
    return dense


def trained(name: str, lr: float = 0.1) -> np.ndarray:
    rule = optim.TABLE_RULES[name]
    table = jnp.asarray(start())
    state = rule.init(table)
    update = jax.jit(rule.update)
    for touched, grads in steps():
        table, state = update(table, state, touched, grads, lr)
    return np.asarray(table)


def test_rowwise_adagrad_equals_dense_numpy():
    table, total = start().astype(np.float64), np.zeros(V)
    for touched, grads in steps():
        dense = dense_gradient(touched, grads)
        total += np.square(dense).mean(axis=-1)
        table -= 0.1 * dense / np.sqrt(total + 1e-8)[:, None]
    np.testing.assert_allclose(trained("rowwise_adagrad"), table, atol=1e-5)


def test_sgd_equals_dense_numpy():
    table = start().astype(np.float64)
    for touched, grads in steps():
        table -= 0.1 * dense_gradient(touched, grads)
    np.testing.assert_allclose(trained("sgd"), table, atol=1e-5)


def test_adam_equals_optax_on_the_whole_table():
    table = jnp.asarray(start())
    adam = optax.adam(0.1, b1=0.9, b2=0.98)
    state = adam.init(table)
    for touched, grads in steps():
        updates, state = adam.update(jnp.asarray(dense_gradient(touched, grads), jnp.float32), state)
        table = optax.apply_updates(table, updates)
    np.testing.assert_allclose(trained("adam"), table, atol=1e-5)


@pytest.mark.parametrize("name", optim.TABLE_RULES)
def test_padding_and_untouched_rows_do_not_change(name):
    before, after = start(), trained(name)
    touched = np.unique(np.concatenate([touched for touched, _ in steps()]))
    untouched = np.setdiff1d(np.arange(V), touched[touched > 0])
    assert 0 in untouched and len(untouched) > 9
    np.testing.assert_array_equal(after[untouched], before[untouched])
    moved = np.any(after != before, axis=-1)
    assert moved[touched[touched > 0]].all() == (name != "frozen")


def test_a_step_of_padding_alone_changes_nothing():
    for name in ("rowwise_adagrad", "sgd"):
        rule = optim.TABLE_RULES[name]
        table = jnp.asarray(start())
        state = rule.init(table)
        zeros, ones = jnp.zeros(N, jnp.int32), jnp.ones((N, D))
        after, after_state = jax.jit(rule.update)(table, state, zeros, ones, 0.1)
        np.testing.assert_array_equal(after, table)
        assert all(
            np.array_equal(a, b) for a, b in zip(jax.tree.leaves(after_state), jax.tree.leaves(state), strict=True)
        )


@pytest.mark.parametrize(
    ("name", "warmup", "values"),
    [
        ("constant", 0, {0: 2.0, 99: 2.0}),
        ("constant", 10, {0: 0.0, 5: 1.0, 10: 2.0, 99: 2.0}),
        ("cosine", 0, {0: 2.0, 50: 1.0, 100: 0.0}),
        ("cosine", 20, {0: 0.0, 10: 1.0, 20: 2.0, 60: 1.0, 100: 0.0, 150: 0.0}),
        ("wsd", 0, {0: 2.0, 79: 2.0, 80: 2.0, 90: 1.0, 100: 0.0}),
        ("wsd", 50, {25: 1.0, 50: 2.0, 90: 2.0, 95: 1.0, 100: 0.0}),
    ],
)
def test_schedules(name, warmup, values):
    schedule = optim.schedule(name, 2.0, warmup, 100)
    for step, value in values.items():
        assert float(schedule(step)) == pytest.approx(value, abs=1e-6), step


def test_misspelt_schedule():
    with pytest.raises(ValueError, match=r"optim.schedule = 'cosin'.*'cosine'"):
        optim.schedule("cosin", 1.0, 0, 10)


def test_dense_rule_clips_the_global_norm_and_decays():
    parameters = {"a": jnp.asarray([3.0]), "b": jnp.asarray([1.0])}
    grads = {"a": jnp.asarray([30.0]), "b": jnp.asarray([40.0])}
    settings = {"b1": 0.9, "b2": 0.98, "weight_decay": 0.1}

    def second_step(clip, first, second):
        rule = optim.dense(optax.constant_schedule(0.5), clip=clip, **settings)
        state = rule.init(parameters)
        _, state = rule.update(first, state, parameters)
        return rule.update(second, state, parameters)[0]

    tenth = jax.tree.map(lambda g: g / 50, grads)  # the clipped gradient: its norm is 1
    clipped, by_hand = second_step(1.0, grads, tenth), second_step(0.0, tenth, tenth)
    unclipped = second_step(0.0, grads, tenth)
    for name in parameters:
        np.testing.assert_allclose(clipped[name], by_hand[name], rtol=1e-5)
        # Equal gradients twice: Adam's direction is 1, the decay 0.1 * parameter.
        np.testing.assert_allclose(by_hand[name], -0.5 * (1.0 + 0.1 * parameters[name]), rtol=1e-4)
        assert abs(float(unclipped[name][0] - clipped[name][0])) > 0.01
