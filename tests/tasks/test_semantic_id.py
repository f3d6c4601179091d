"""The loss of generated items: -log p of whole tuples, at targets alone, whatever the packing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recscale.models import tiger, tiger_decoder
from recscale.tasks.next_item import slots
from recscale.tasks.semantic_id import CODES, Config, Task

ITEMS, Q, K, DIM = 9, 3, 4, 8
QUICK = {"xla_backend_optimization_level": 0}
CODES_VQ = np.concatenate([np.zeros((1, Q)), np.random.default_rng(0).integers(0, K, (ITEMS, Q))]).astype(np.float32)
USERS = np.random.default_rng(1).normal(size=(6, DIM)).astype(np.float32)
SIZES = {"embed_dim": DIM, "depth": 1, "heads": 2, "head_dim": 4, "ffn": 8, "levels": Q, "codebook": K}
MODELS = {"tiger": tiger, "tiger_decoder": tiger_decoder}
BATCH = {  # two examples of one target each, a user's slot before the second
    "item_id": np.array([[3, 4, 5, 0, 1, 0]], np.int32),
    "target": np.array([[0, 0, 6, 0, 2, 0]], np.int32),
    "segment_ids": np.array([[1, 1, 1, 2, 2, 0]], np.int32),
    "positions": np.array([[0, 1, 2, 0, 1, 0]], np.int32),
    "users/hash5": np.array([[0, 0, 0, 4, 0, 0]], np.int32),
}


def task(segments: int = 0, users: bool = True, **changes) -> Task:
    config = Config(**{"label_smoothing": 0.0} | changes)
    return Task(config, ITEMS, ("users/hash5",) if users else (), (), segments)


def network(name: str):
    module = MODELS[name]
    config = module.Config(**SIZES, max_length=8, dropout=0.0, dtype="float32")
    return module.Model(config, jax.random.key(1))


def lookup(table: str, ids) -> jax.Array:
    return jnp.asarray(CODES_VQ if table == CODES else np.concatenate([np.zeros((1, DIM)), USERS[1:]]))[ids]


def loss(t: Task, model, batch):
    rows = {name: lookup(*owned) for name, owned in t.wanted(batch).items()}
    run = jax.jit(lambda rows, batch: t.loss(model, rows, batch, None)[0], compiler_options=QUICK)
    return float(run(rows, batch))


def nats(t: Task, model, batch) -> np.ndarray:
    return np.asarray(jax.jit(lambda batch: t.nats(model, lookup, batch), compiler_options=QUICK)(batch))


def rows_of_one(batch, segment: int, length: int = 6) -> dict[str, np.ndarray]:
    """One example of a batch in a row of its own."""
    mine = batch["segment_ids"][0] == segment
    alone = {name: np.pad(x[:, mine], ((0, 0), (0, length - mine.sum()))) for name, x in batch.items()}
    return alone | {"segment_ids": (alone["segment_ids"] > 0).astype(np.int32)}


@pytest.mark.parametrize("name", MODELS)
def test_loss_is_the_mean_of_the_targets_nats_and_packing_changes_nothing(name):
    model = network(name)
    packed = nats(task(), model, BATCH)
    alone = [nats(task(), model, rows_of_one(BATCH, segment)) for segment in (1, 2)]
    np.testing.assert_allclose([packed[0, 2], packed[0, 4]], [alone[0][0, 2], alone[1][0, 1]], rtol=2e-5)
    np.testing.assert_allclose(loss(task(), model, BATCH), (packed[0, 2] + packed[0, 4]) / 2, rtol=1e-5)
    few = nats(task(segments=2), model, BATCH)  # the model is asked about two slots instead of six
    np.testing.assert_allclose(few[0, [2, 4]], packed[0, [2, 4]], rtol=1e-5)
    np.testing.assert_allclose(loss(task(segments=2), model, BATCH), loss(task(), model, BATCH), rtol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_nats_are_those_of_the_codes_one_by_one(name):
    """-log p of a tuple, from the model's own way of generating it."""
    model, batch = network(name), rows_of_one(BATCH, 2)
    t = task()
    memory = t.remember(model, lookup, batch)
    cache, total = model.begin(memory, 1), 0.0
    code = jnp.zeros((1, 1), jnp.int32)
    for level, wanted in enumerate(CODES_VQ[2].astype(int)):
        log_p_BWK, cache = model.advance(memory, cache, code, level)
        assert log_p_BWK.shape == (1, 1, K)
        total -= float(log_p_BWK[0, 0, wanted])
        code = jnp.full((1, 1), wanted, jnp.int32)
    np.testing.assert_allclose(nats(t, model, batch)[0, 1], total, rtol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_probabilities_of_all_tuples_sum_to_one(name):
    model, t = network(name), task(users=False)
    tuples = np.stack(np.meshgrid(*[np.arange(K)] * Q, indexing="ij"), -1).reshape(-1, Q)
    codes = np.concatenate([np.zeros((1, Q)), tuples]).astype(np.float32)
    batch = {name: np.repeat(x, len(tuples), axis=0) for name, x in rows_of_one(BATCH, 1).items()}
    batch["target"][:, 2] = np.arange(1, len(tuples) + 1)

    def look(table, ids):
        return jnp.asarray(codes)[ids]

    found = jax.jit(lambda b: t.nats(model, look, b), compiler_options=QUICK)(batch)[:, 2]
    np.testing.assert_allclose(np.exp(-np.asarray(found)).sum(), 1.0, rtol=1e-5)


def test_an_item_that_follows_in_the_row_is_read_as_history_and_no_other_example_is():
    history = jnp.asarray(CODES_VQ)[BATCH["item_id"]].astype(int)
    target = jnp.asarray(CODES_VQ)[BATCH["target"]].astype(int)
    found = np.asarray(Task._next(history, target, {name: jnp.asarray(x) for name, x in BATCH.items()}))[0]
    wanted = [4, 5, 6, 1, 2, 0]  # after items 3, 4, 5; after the user's slot; after item 1; padding
    np.testing.assert_array_equal(found, CODES_VQ[wanted])


def test_user_tokens_matter_and_learn():
    model, t = network("tiger"), task()
    other = BATCH | {"users/hash5": np.array([[0, 0, 0, 3, 0, 0]], np.int32)}
    before, after = nats(t, model, BATCH), nats(t, model, other)
    assert before[0, 2] == after[0, 2] and before[0, 4] != after[0, 4]
    rows = {name: lookup(*owned) for name, owned in t.wanted(BATCH).items()}
    gradient = jax.grad(lambda rows: t.loss(model, rows, BATCH, None)[0])(rows)
    reached = np.abs(np.asarray(gradient["users/hash5"][0])).sum(-1) > 0
    assert reached.tolist() == [False, False, False, True, False, False]
    assert not np.asarray(gradient["history"]).any() and not np.asarray(gradient["target"]).any()  # codes are fixed


def test_label_smoothing_mixes_in_the_mean_over_the_codes():
    model = network("tiger")
    plain, uniform = loss(task(), model, BATCH), []
    for code in range(K):
        codes = np.full((ITEMS + 1, Q), code, np.float32)
        t = task()
        rows = {name: lookup(*owned) for name, owned in t.wanted(BATCH).items()}
        slots_BS = slots(jnp.asarray(BATCH["target"]), t.segments)
        next_BLQ = t._next(rows["history"].astype(int), rows["target"].astype(int), BATCH)
        logits = model(t.history(rows, BATCH), next_BLQ, slots_BS, None)
        log_p = jax.nn.log_softmax(logits, axis=-1)
        uniform.append(-float(log_p[0, [2, 4]][:, :, int(codes[0, 0])].sum(-1).mean()))
    np.testing.assert_allclose(
        loss(task(label_smoothing=0.2), model, BATCH), 0.8 * plain + 0.2 * np.mean(uniform), rtol=1e-5
    )


def test_what_the_task_cannot_read_is_refused():
    with pytest.raises(ValueError, match=r"task 'semantic_id' reads codes .* found \['hour', 'tab'\]"):
        Task(Config(label_smoothing=0.0), ITEMS, ("users/hash5", "hour"), ("tab",))
    with pytest.raises(ValueError, match=r"table.kind = 'hashed': task 'semantic_id' has no item vectors"):
        task().tables(network("tiger").config, {"kind": "hashed"})
    with pytest.raises(ValueError, match=r"label_smoothing = 1.0"):
        Config(label_smoothing=1.0)
