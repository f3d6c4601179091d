"""Table rules against training the whole table, what a missed step of lazy Adam costs, and the schedules' values."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from recscale import optim
from recscale.layers.embedding import Array, accumulate, init_slots, write, write_whole
from recscale.program import program, updates
from tests.tiny_run import ITEMS, SAMPLED, tiny

V, D, N = 30, 4, 16
ARRAY = Array(V, D)
Steps = list[tuple[np.ndarray, np.ndarray]]


def steps(count: int = 6, seed: int = 0) -> Steps:
    """Touched ids (padding and repeats among them) and gradients of some steps; ids above 20 are never touched."""
    rng = np.random.default_rng(seed)
    return [(rng.integers(0, 20, N).astype(np.int32), rng.normal(size=(N, D)).astype(np.float32)) for _ in range(count)]


def start() -> np.ndarray:
    table = np.random.default_rng(9).normal(size=(V + 1, D)).astype(np.float32)
    table[0] = 0.0
    return table


def dense_gradient(touched: np.ndarray, grads: np.ndarray) -> np.ndarray:
    """Of the whole table, float32, summed in the order of the lookups; padding has none."""
    dense = np.zeros((V + 1, D), np.float32)
    np.add.at(dense, touched, grads)
    dense[0] = 0.0
    return dense


def history(name: str, given: Steps, rates: list[float], decay: float = 0.0) -> list[np.ndarray]:
    """The table by id after every step."""
    rule = optim.TABLE_RULES[name]
    table = jnp.asarray(ARRAY.place(start()))
    slots = init_slots(ARRAY, rule)

    @jax.jit
    def one(table, slots, ids, grads, rate, step):
        how = {"learning_rate": rate, "weight_decay": decay, "step": step, "key": jax.random.key(0)}
        position = ARRAY.touched(ids)
        if not rule.whole:
            return write(ARRAY, rule, table, slots, position, grads, **how)
        total = accumulate(ARRAY, jnp.zeros(ARRAY.shape), position, grads)
        return write_whole(ARRAY, rule, table, slots, total, **how)

    found = []
    for i, ((ids, grads), rate) in enumerate(zip(given, rates, strict=True)):
        table, slots = one(table, slots, ids, grads, jnp.float32(rate), jnp.int32(i))
        found.append(ARRAY.values(table))
        assert not np.asarray(table)[ARRAY.position(np.arange(V + 1, ARRAY.size))].any()  # spare rows
    return found


def trained(name: str, decay: float = 0.0, lr: float = 0.1) -> np.ndarray:
    return history(name, steps(), [lr] * 6, decay)[-1]


def ulps(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest distance in units of the last place of the larger of the two."""
    return float((np.abs(found - expected) / np.spacing(np.maximum(np.abs(found), np.abs(expected)))).max())


# Against training the whole table ------------------------------------------------------------------------------------


def test_sgd_is_dense_sgd_to_the_bit():
    """With a learning rate that is a power of two: a compiler that fuses product and sum has nothing to round."""
    table = start()
    for touched, grads in steps():
        table = table - np.float32(0.125) * dense_gradient(touched, grads)
    np.testing.assert_array_equal(trained("sgd", lr=0.125), table)
    dense, rule = jnp.asarray(start()), optax.sgd(0.125)
    state = rule.init(dense)
    for touched, grads in steps():
        change, state = rule.update(jnp.asarray(dense_gradient(touched, grads)), state)
        dense = optax.apply_updates(dense, change)
    np.testing.assert_array_equal(trained("sgd", lr=0.125), dense)


def test_one_step_of_sgd_is_dense_sgd_to_one_unit_of_the_last_place():
    table = start() - np.float32(0.1) * dense_gradient(*steps()[0])
    got = history("sgd", steps(1), [0.1])[0]
    np.testing.assert_allclose(got, table, rtol=0, atol=np.spacing(np.float32(1.0)))
    assert ulps(got, start()) > 1000


def test_rowwise_adagrad_is_dense_adagrad():
    """Padding and untouched rows to the bit; the others up to the rounding of a square root and of fused sums."""
    table, total = start(), np.zeros(V + 1, np.float32)
    for i, (touched, grads) in enumerate(steps()):
        dense = dense_gradient(touched, grads)
        total += np.square(dense).mean(axis=-1, dtype=np.float32)
        table -= np.float32(0.1) * dense / np.sqrt(total + np.float32(1e-8))[:, None]
        got = history("rowwise_adagrad", steps(i + 1), [0.1] * (i + 1))[-1]
        np.testing.assert_allclose(got, table, rtol=0, atol=(i + 1) * 2 * np.spacing(np.float32(1.0)))


@pytest.mark.parametrize("name", ["sgd", "rowwise_adagrad"])
def test_a_sparse_step_is_the_step_of_the_whole_table(name):
    """The same rule on every row with zero gradients where none arrived: SGD to the bit, Adagrad to a unit of the last
    place per step (its products and sums are fused in another order)."""
    rule, sparse = optim.TABLE_RULES[name], history(name, steps(), [0.1] * 6)
    table = jnp.asarray(ARRAY.place(start()))
    slots = init_slots(ARRAY, rule)

    @jax.jit
    def one(table, slots, total, step):
        how = {"learning_rate": jnp.float32(0.1), "weight_decay": 0.0, "step": step, "key": jax.random.key(0)}
        return write_whole(ARRAY, rule, table, slots, total, **how)

    for i, (touched, grads) in enumerate(steps()):
        table, slots = one(table, slots, jnp.asarray(ARRAY.place(dense_gradient(touched, grads))), jnp.int32(i))
        allowed = 0.0 if name == "sgd" else (i + 1) * np.spacing(np.float32(1.0))
        np.testing.assert_allclose(sparse[i], ARRAY.values(table), rtol=0, atol=allowed)


def optax_adam(given: Steps, rate: float) -> list[np.ndarray]:
    """The table after every step of dense Adam."""
    table, adam, found = jnp.asarray(start()), optax.adam(rate, b1=0.9, b2=0.98), []
    state = adam.init(table)
    for touched, grads in given:
        change, state = adam.update(jnp.asarray(dense_gradient(touched, grads)), state)
        table = optax.apply_updates(table, change)
        found.append(np.asarray(table))
    return found


def test_adam_is_optax_on_the_whole_table():
    for got, expected in zip(history("adam", steps(), [0.1] * 6), optax_adam(steps(), 0.1), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)
    assert not np.array_equal(trained("lazy_adam")[1:20], trained("adam")[1:20])


def test_lazy_adam_is_optax_on_rows_that_every_step_touches():
    rng = np.random.default_rng(1)
    given = [(np.arange(N, dtype=np.int32), rng.normal(size=(N, D)).astype(np.float32)) for _ in range(20)]
    for got, expected in zip(history("lazy_adam", given, [0.1] * 20), optax_adam(given, 0.1), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)


# Lazy Adam on rows that a step misses --------------------------------------------------------------------------------

B1, B2 = 0.9, 0.98


def missed(t: int, rate: float) -> float:
    """The bound that optim.py states for step t (from 1)."""
    return rate * (1 - B1) / np.sqrt((1 - B2) * (1 - B1**2 / B2)) * np.sqrt(1 - B2**t) / (1 - B1**t)


def worst(seen: int) -> Steps:
    """Id 1 is touched `seen` times, with the gradients that make the step after them as long as can be; then never."""
    given = [(np.array([1], np.int32), np.full((1, D), (B2 / B1) ** i, np.float32)) for i in range(seen)]
    return given + [(np.array([2], np.int32), np.ones((1, D), np.float32))] * 30


@pytest.mark.parametrize("given", [steps(40), worst(60), worst(2)], ids=["random", "worst", "worst of two"])
def test_an_untouched_row_of_lazy_adam_differs_by_no_more_than_the_bound(given):
    rate = 0.01
    lazy, dense = history("lazy_adam", given, [rate] * len(given)), history("adam", given, [rate] * len(given))
    for first in (5, 20, 60):  # both from the same state: the dense one's moves are what the lazy one misses
        if first >= len(given):
            continue
        allowed, last = 0.0, dense[first - 1]
        untouched = np.ones(V + 1, bool)
        for t in range(first + 1, len(given) + 1):
            untouched[given[t - 1][0]] = False
            allowed += missed(t, rate)
            assert np.abs(dense[t - 1] - last)[untouched].max() <= allowed * (1 + 1e-5)
            np.testing.assert_array_equal(lazy[t - 1][untouched], lazy[first - 1][untouched])
    for t in range(2, len(given) + 1):  # any step of either
        for table in (lazy, dense):
            assert np.abs(table[t - 1] - table[t - 2]).max() <= missed(t, rate) * (1 + 1e-4)


def test_the_bound_is_nearly_reached():
    """And the cruder lr (1 - b1) / sqrt(1 - b2) is exceeded."""
    rate, seen = 0.01, 60
    dense = history("adam", worst(seen), [rate] * (seen + 30))
    move = np.abs(dense[seen] - dense[seen - 1])[1].max()
    assert 0.9 * missed(seen + 1, rate) < move <= missed(seen + 1, rate)
    assert move > rate * (1 - B1) / np.sqrt(1 - B2)


# What does not move --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.5])
@pytest.mark.parametrize("name", optim.TABLE_RULES)
def test_padding_never_moves_and_untouched_rows_only_where_the_rule_is_for_the_whole_table(name, decay):
    before, after = start(), trained(name, decay)
    touched = np.unique(np.concatenate([touched for touched, _ in steps()]))
    untouched = np.setdiff1d(np.arange(1, V + 1), touched)
    assert 0 in touched and len(untouched) > 9
    assert not after[0].any()
    if optim.TABLE_RULES[name].whole:
        np.testing.assert_allclose(after[untouched], before[untouched] * (1 - 0.1 * decay) ** 6, rtol=1e-5)
    else:
        np.testing.assert_array_equal(after[untouched], before[untouched])
    assert np.any(after != before, axis=-1)[touched[touched > 0]].all()


@pytest.mark.parametrize("name", ["sgd", "rowwise_adagrad", "lazy_adam"])
def test_weight_decay_is_decoupled_and_reaches_touched_rows_once_a_step(name):
    given, rate, decay = steps(1), 0.1, 0.3
    plain, decayed = history(name, given, [rate])[0], history(name, given, [rate], decay)[0]
    touched = np.setdiff1d(given[0][0], [0])
    assert len(touched) < len(given[0][0])  # repeats among them
    expected = plain[touched] - rate * decay * start()[touched]
    np.testing.assert_allclose(decayed[touched], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["sgd", "rowwise_adagrad", "lazy_adam"])
def test_a_step_of_padding_alone_changes_nothing(name):
    rule = optim.TABLE_RULES[name]
    table = jnp.asarray(ARRAY.place(start()))
    slots = {slot: jnp.ones_like(x) for slot, x in init_slots(ARRAY, rule).items()}
    how = {"learning_rate": jnp.float32(0.1), "weight_decay": 0.1, "step": jnp.int32(0), "key": jax.random.key(0)}
    position = ARRAY.touched(jnp.zeros(N, jnp.int32))
    run = jax.jit(lambda table, slots: write(ARRAY, rule, table, slots, position, jnp.ones((N, D)), **how))
    after, after_slots = run(table, slots)
    np.testing.assert_array_equal(after, table)
    for slot, values in slots.items():
        np.testing.assert_array_equal(after_slots[slot], values)


# Schedules -----------------------------------------------------------------------------------------------------------


def test_tables_warm_up_on_their_own():
    peaks = {"optim__learning_rate": 0.5, "table__learning_rate": 2.0, "optim__schedule": "constant"}
    weights = {"table__optimizer": "rowwise_adagrad", "table__weight_decay": 0.25, "optim__weight_decay": 0.0}
    config = tiny("sasrec", Path("unused"), **SAMPLED, **peaks, **weights, optim__warmup=4, table__warmup=10)
    run = program(config, ITEMS, {}, 100)
    found, decay, rate = updates(run)["item"]
    assert found is optim.TABLE_RULES["rowwise_adagrad"] and decay == 0.25
    for step, (dense, table) in {0: (0.0, 0.0), 2: (0.25, 0.4), 4: (0.5, 0.8), 10: (0.5, 2.0), 99: (0.5, 2.0)}.items():
        assert float(run.learning_rate(step)) == pytest.approx(dense, abs=1e-6)
        assert float(rate(step)) == pytest.approx(table, abs=1e-6)
    rows = history("sgd", steps(3), [float(rate(i)) for i in range(3)])
    np.testing.assert_array_equal(rows[0], start())  # the first step of a warm-up is none
    assert not np.array_equal(rows[1], rows[0])


@pytest.mark.parametrize(
    ("name", "warmup", "values"),
    [
        ("constant", 0, {0: 2.0, 99: 2.0}),
        ("constant", 10, {0: 0.0, 5: 1.0, 10: 2.0, 99: 2.0}),
        ("cosine", 0, {0: 2.0, 50: 1.0, 100: 0.0}),
        ("cosine", 20, {0: 0.0, 10: 1.0, 20: 2.0, 60: 1.0, 100: 0.0, 150: 0.0}),
        ("wsd", 0, {0: 2.0, 79: 2.0, 80: 2.0, 90: 1.0, 100: 0.0}),
        ("wsd", 50, {25: 1.0, 50: 2.0, 80: 2.0, 90: 1.0, 100: 0.0}),
    ],
)
def test_schedules(name, warmup, values):
    schedule = optim.schedule(name, 2.0, warmup, 100)
    for step, value in values.items():
        assert float(schedule(step)) == pytest.approx(value, abs=1e-6), step


def test_the_beginning_of_wsd_does_not_depend_on_its_length():
    """To the bit: that is what lets runs of several lengths share a trunk."""
    short, long = (optim.schedule("wsd", 0.3, 7, steps, 0.25) for steps in (40, 4000))
    constant = optim.schedule("constant", 0.3, 7, 40)
    for step in range(31):
        assert short(jnp.int32(step)) == long(jnp.int32(step)) == constant(jnp.int32(step))
    assert short(jnp.int32(31)) < long(jnp.int32(31)) and short(jnp.int32(40)) == 0.0


@pytest.mark.parametrize(
    ("name", "warmup", "decay", "decay_start"),
    [
        ("constant", 10, 0.2, 100),
        ("cosine", 10, 0.2, 10),
        ("wsd", 10, 0.2, 80),
        ("wsd", 10, 0.001, 99),
        ("wsd", 0, 1.0, 0),
    ],
)
def test_phases(name, warmup, decay, decay_start):
    found = optim.phases(name, warmup, 100, decay)
    assert (found.horizon, found.warmup, found.decay_start) == (100, warmup, decay_start)
    assert found.decay_steps == 100 - decay_start


@pytest.mark.parametrize(
    ("warmup", "decay", "message"),
    [
        (0, 0.0, r"optim.decay = 0.0: expected the share of the steps that decay, above 0 and at most 1"),
        (0, 1.5, r"optim.decay = 1.5: expected"),
        (50, 0.6, r"the decay begins at step 40 of 100, before the warm-up of 50 steps ends"),
    ],
)
def test_a_decay_that_cannot_be(warmup, decay, message):
    with pytest.raises(ValueError, match=message):
        optim.phases("wsd", warmup, 100, decay)


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


def test_rates_by_name_scale_steps_but_not_the_decay():
    """The parameter that is named moves half as far; both lose the same share to weight decay."""
    parameters = ({"a": jnp.asarray([3.0]), "b": jnp.asarray([3.0])}, {})
    grads = ({"a": jnp.asarray([0.2]), "b": jnp.asarray([0.2])}, {})
    settings = {"b1": 0.9, "b2": 0.98, "weight_decay": 0.1, "clip": 0.0}

    def step(rates):
        rule = optim.dense(optax.constant_schedule(0.5), rates=rates, **settings)
        return rule.update(grads, rule.init(parameters), parameters)[0][0]

    found, plain = step({"0.b": 0.5}), step(None)
    np.testing.assert_array_equal(found["a"], plain["a"])
    np.testing.assert_allclose(plain["a"], -0.5 * (1.0 + 0.3), rtol=1e-5)
    np.testing.assert_allclose(found["b"], -0.5 * (0.5 + 0.3), rtol=1e-5)


def test_dense_is_adamw():
    parameters, grads = {"a": jnp.asarray([3.0, -1.0])}, {"a": jnp.asarray([0.2, 0.3])}
    ours = optim.dense(optax.constant_schedule(0.5), b1=0.9, b2=0.98, weight_decay=0.1, clip=0.0)
    theirs = optax.chain(optax.adamw(0.5, b1=0.9, b2=0.98, weight_decay=0.1))
    one, other = (
        ours.update(grads, ours.init(parameters), parameters),
        theirs.update(grads, theirs.init(parameters), parameters),
    )
    np.testing.assert_array_equal(one[0]["a"], other[0]["a"])
