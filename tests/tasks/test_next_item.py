"""Losses against published formulas in numpy, samplers against the frequencies they claim."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recscale.tasks import next_item
from recscale.tasks.next_item import FREQUENCY, Config, Task

BASE = Config(
    loss="sampled", negatives=4, sampler="uniform", shared="token", logq="none", similarity="dot", temperature=1.0,
    gbce_t=0.0,
)  # fmt: skip
QUICK = {"xla_backend_optimization_level": 0}  # these tests compile much and compute little
ITEMS, DIM = 12, 3
BATCH = {
    "item_id": np.array([[3, 7, 1, 0], [5, 5, 9, 2]], np.int32),
    "target": np.array([[7, 1, 0, 0], [5, 9, 2, 12]], np.int32),
}


def task(items: int = ITEMS, queries: tuple[str, ...] = (), **changes) -> Task:
    return Task(dataclasses.replace(BASE, **changes), items, queries=queries)


def with_negatives(t: Task, negative) -> Task:
    """The task with these negatives in the place of drawn ones; negative: an array, or a function of the batch."""
    t.draw = lambda batch, key: batch | {"negative": jnp.asarray(negative(batch) if callable(negative) else negative)}
    return t


def embeddings(seed: int = 0) -> np.ndarray:
    table = np.random.default_rng(seed).normal(size=(ITEMS + 1, DIM)).astype(np.float32)
    table[0] = 0.0
    return table


def history(x, batch, key):
    """A model that hands back what it is given."""
    return x


def step_loss(t: Task, tables, batch, model):
    """What a step computes: draws, the vectors of the ids that are wanted, then `loss`."""
    key = jax.random.key(0)
    batch = t.draw(batch, key)
    rows = {name: tables[owner][ids] for name, (owner, ids) in t.wanted(batch).items()}

    def full_softmax(query_TD, target_T):
        scores_TV = query_TD @ t.item(tables["item"][1:]).T
        return -jnp.take_along_axis(jax.nn.log_softmax(scores_TV), jnp.maximum(target_T - 1, 0)[:, None], 1)[:, 0]

    return t.loss(model, rows, batch, key, full_softmax)


def loss_of(t: Task, table: np.ndarray, batch=BATCH, frequency=None, model=history, context=None):
    """Loss and metrics of a step."""
    tables = {"item": table, FREQUENCY: frequency, "surface": context}
    run = jax.jit(lambda tables, batch: step_loss(t, tables, batch, model), compiler_options=QUICK)
    return run(tables, batch)


def draws(t: Task, seed: int = 0) -> np.ndarray:
    run = jax.jit(lambda batch: t.draw(batch, jax.random.key(seed))["negative"], compiler_options=QUICK)
    return np.asarray(run(BATCH))


# Golden numbers


def test_gbce_exponent():
    assert next_item.gbce_beta(256, 3416, 0.75) == pytest.approx(0.30622254758418743, abs=1e-14)
    assert next_item.gbce_beta(256, 3416, 0.0) == 1.0  # BCE
    assert next_item.gbce_beta(256, 3416, 1.0) == pytest.approx(0.07496339677891654, abs=1e-15)  # alpha


def test_gbce_and_bce():
    beta = next_item.gbce_beta(256, 3416, 0.75)
    negatives = jnp.asarray([0.0, -1.0, 2.0])
    bce = jax.jit(next_item.bce)
    assert float(bce(1.0, negatives, beta)) == pytest.approx(0.8073161678, abs=3e-7)
    assert float(bce(1.0, negatives)) == pytest.approx(0.8616496417, abs=3e-7)
    # gBCE is BCE of a transformed positive score: beta log sigma(s+) = log sigma(s').
    for score, transformed in [(-2, 0.0854945043), (0, 1.4419509238), (1, 2.2958122479), (5, 6.1857743432)]:
        expected = float(bce(transformed, negatives))
        assert float(bce(float(score), negatives, beta)) == pytest.approx(expected, abs=3e-7)


def test_logq():
    counts, scores = np.array([0, 40, 30, 20, 10.0]), np.array([0, 1.2, 0.3, -0.5, 0.8])
    drawn, q = np.array([2, 3, 3, 4, 1]), counts / 100
    valid = drawn != 1
    shifted = jnp.asarray(np.where(valid, scores[drawn] - np.log(q[drawn]), next_item.MASKED), jnp.float32)
    textbook = next_item.sampled_softmax(jnp.float32(1.2 - np.log(q[1])), shifted)
    assert float(textbook) == pytest.approx(1.6002169618, abs=5e-7)

    def corrected(positive):
        log_q = jnp.asarray(np.log(q[drawn]) - np.log1p(-q[1]), jnp.float32)
        return next_item.corrected_softmax(positive, jnp.asarray(scores[drawn], jnp.float32), log_q, jnp.asarray(valid))

    loss, slope = jax.jit(jax.value_and_grad(corrected))(jnp.float32(1.2))
    assert float(loss) == pytest.approx(1.0631960209, abs=5e-7)
    assert -float(slope) == pytest.approx(1 - 0.4027726572, abs=5e-7)  # l falls with the positive at rate one
    assert float(loss) / -float(slope) == pytest.approx(1.7802199342, abs=2e-6)


def test_logq_through_the_task():
    """The same example from ids to loss: scores are 1-d item vectors, the proposal comes from the frequency table."""
    t = with_negatives(task(4, negatives=5, sampler="in_batch", logq="standard"), [[[2, 3, 3, 4, 1]]])
    batch = {"item_id": np.array([[4]], np.int32), "target": np.array([[1]], np.int32)}
    table = np.array([[0], [1.5], [0.375], [-0.625], [1.0]], np.float32)  # the query is 0.8: 1.2 .3 -.5 .8
    frequency = np.array([[0], [0.4], [0.3], [0.2], [0.1]], np.float32)
    for logq, expected in {"standard": 1.6002169618, "corrected": 1.0631960209}.items():
        t.config = dataclasses.replace(t.config, logq=logq)
        loss, metrics = loss_of(t, table, batch, frequency, model=lambda x, batch, key: 0.8 * x)
        assert float(loss) == pytest.approx(expected, abs=1e-6)
        assert float(metrics["targets"]) == 1


# Samplers


@pytest.mark.parametrize("shared", next_item.SHARED)
@pytest.mark.parametrize("sampler", next_item.SAMPLERS)
def test_negatives_have_the_frequencies_they_claim(sampler, shared):
    t = task(sampler=sampler, shared=shared, negatives=4000)
    drawn = draws(t)
    assert drawn.shape == {"token": (2, 4, 4000), "row": (2, 4000), "batch": (4000,)}[shared]
    np.testing.assert_array_equal(drawn, draws(t))  # the same for the same key
    uniform, in_batch = np.full(ITEMS, 1 / ITEMS), np.bincount([7, 1, 5, 9, 2, 12], minlength=13)[1:] / 6
    share = next_item.SAMPLERS[sampler]
    counts = np.bincount(drawn.ravel(), minlength=ITEMS + 1)
    assert counts[0] == 0 and len(counts) == ITEMS + 1
    expected = (share * uniform + (1 - share) * in_batch) * drawn.size
    possible = expected > 0
    assert counts[1:][~possible].sum() == 0
    chi2 = ((counts[1:] - expected)[possible] ** 2 / expected[possible]).sum()
    assert chi2 < possible.sum() + 5 * np.sqrt(2 * possible.sum())
    if shared == "batch":
        return
    first, second = drawn[0].reshape(-1, 4000)[0], drawn[1].reshape(-1, 4000)[-1]
    halves = (uniform**2).sum() * share + (in_batch**2).sum() * (1 - share)
    # Rows are drawn apart: equal as often as chance says.
    assert (first == second).mean() == pytest.approx(halves, abs=5 * np.sqrt(0.15 / 4000))


def test_in_batch_negatives_of_a_batch_without_targets_are_in_range():
    batch = BATCH | {"target": np.zeros((2, 4), np.int32)}
    loss, metrics = loss_of(task(sampler="in_batch"), embeddings(), batch)
    assert float(loss) == 0.0 and float(metrics["targets"]) == 0


# Losses in numpy


def in_numpy(t: Task, table: np.ndarray, batch=BATCH) -> float:
    """Mean loss of the target positions, written out pair by pair."""
    c, table = t.config, table.astype(np.float64)
    unit = np.linalg.norm if c.similarity == "cosine" else lambda x: 1.0
    negatives, losses = None if c.loss == "full" else draws(t), []
    for b, i in np.argwhere(batch["target"] > 0):
        target, x = batch["target"][b, i], table[batch["item_id"][b, i]]
        score = np.array([0.0] + [x @ v / (unit(x) * unit(v) * c.temperature) for v in table[1:]])
        place = {"token": (b, i), "row": (b,), "batch": ()}[c.shared]
        others = None if negatives is None else negatives[place]
        if c.loss == "full":
            losses.append(np.log(np.exp(score[1:]).sum()) - score[target])
        elif c.loss == "sampled":
            kept = np.append(score[others[others != target]], score[target])
            losses.append(np.log(np.exp(kept).sum()) - score[target])
        else:
            beta = 1.0 if c.loss == "bce" else 1 - c.gbce_t * (1 - c.negatives / (ITEMS - 1))
            total = beta * np.log1p(np.exp(-score[target])) + np.log1p(np.exp(score[others])).sum()
            losses.append(total / (c.negatives + 1))
    return float(np.mean(losses))


LOSSES = [
    {"loss": "full"},
    {"loss": "full", "similarity": "cosine", "temperature": 0.2},
    {"loss": "sampled"},
    {"loss": "sampled", "similarity": "cosine", "temperature": 0.2, "shared": "row"},
    {"loss": "sampled", "negatives": 40, "shared": "batch"},  # accidental hits are certain, and masked
    {"loss": "sampled", "negatives": 40, "sampler": "mixed"},
    {"loss": "bce", "shared": "row"},
    {"loss": "gbce", "gbce_t": 0.75},
]


@pytest.mark.parametrize("changes", LOSSES, ids=lambda c: "-".join(map(str, c.values())))
def test_loss_equals_numpy(changes):
    t, table = task(**changes), embeddings()
    loss, metrics = loss_of(t, table)
    assert float(loss) == pytest.approx(in_numpy(t, table), rel=2e-5)
    assert float(metrics["loss"]) == float(loss) and float(metrics["targets"]) == 6


def test_padding_and_unsupervised_positions_have_no_weight():
    table = embeddings()
    t = task(loss="full")
    loss, _ = loss_of(t, table)
    other = BATCH | {"item_id": np.array([[3, 7, 11, 4], [5, 5, 9, 2]], np.int32)}  # only where target is 0
    assert float(loss_of(t, table, other)[0]) == float(loss)


def test_a_negative_that_equals_the_target_has_no_gradient():
    t = with_negatives(task(negatives=3), lambda batch: jnp.broadcast_to(batch["target"][:, :, None], (2, 4, 3)))
    loss, _ = loss_of(t, embeddings())
    assert float(loss) == 0.0


@pytest.mark.parametrize("logq", next_item.LOGQ)
def test_layouts_of_the_negatives_agree_where_the_negatives_are_equal(logq):
    fixed, losses = jnp.asarray([4, 7, 7, 12]), []
    frequency = np.linspace(0, 1, ITEMS + 1, dtype=np.float32)[:, None] / (ITEMS + 1) * 2
    for shared, shape in {"token": (2, 4, 4), "row": (2, 4), "batch": (4,)}.items():
        t = with_negatives(task(shared=shared, sampler="mixed", logq=logq), jnp.broadcast_to(fixed, shape))
        losses.append(float(loss_of(t, embeddings(), frequency=frequency)[0]))
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


# Many samples


def proposal(sampler: str) -> tuple[np.ndarray, np.ndarray]:
    """In-batch frequencies as a table, and the sampler's exact distribution over items 1..ITEMS."""
    rng = np.random.default_rng(3)
    frequency = rng.dirichlet(np.full(ITEMS, 3.0))
    share = next_item.SAMPLERS[sampler]
    table = np.concatenate([[0.0], frequency]).astype(np.float32)[:, None]
    return table, share / ITEMS + (1 - share) * frequency


def sampled_exactly(sampler: str, logq: str, count: int, seed: int) -> tuple[Task, np.ndarray]:
    table, q = proposal(sampler)
    t = task(loss="sampled", sampler=sampler, logq=logq, negatives=count)
    drawn = np.random.default_rng(seed).choice(np.arange(1, ITEMS + 1), size=(2, 4, count), p=q)
    return with_negatives(t, drawn.astype(np.int32)), table


def gradient(t: Task, frequency) -> np.ndarray:
    """Gradient of the loss with respect to the queries alone."""

    def total(bias):
        tables = {"item": jnp.asarray(embeddings()), FREQUENCY: jnp.asarray(frequency)}
        return step_loss(t, tables, BATCH, lambda x, batch, key: x + bias)[0]

    return np.asarray(jax.jit(jax.grad(total), compiler_options=QUICK)(jnp.zeros((2, 4, DIM))))


@pytest.mark.parametrize("sampler", next_item.SAMPLERS)
def test_logq_converges_to_full_cross_entropy(sampler):
    """A sum of exp(s) / Q over n draws is n times the sum over the catalogue, the target left out.

    Standard: the target, shifted too, adds its own term once. Corrected: up to log n the logit of the target's full
    softmax probability, weighted by 1 - that probability, which makes the gradient that of the full cross-entropy.
    """
    count = 40_000
    table, (_, q) = embeddings().astype(np.float64), proposal(sampler)
    standard, corrected = [], []
    for b, i in np.argwhere(BATCH["target"] > 0):
        scores = table[1:] @ table[BATCH["item_id"][b, i]]
        target = BATCH["target"][b, i] - 1
        others = np.delete(np.exp(scores), target).sum()
        positive = np.exp(scores[target]) / q[target]
        standard.append(np.log(positive + count * others) - np.log(positive))
        share = others / (others + np.exp(scores[target]))
        corrected.append(share * (np.log(count * (1 - q[target]) * others) - scores[target]))
    for logq, expected in {"standard": standard, "corrected": corrected}.items():
        t, frequency = sampled_exactly(sampler, logq, count, seed=0)
        loss = float(loss_of(t, embeddings(), frequency=frequency)[0])
        assert loss == pytest.approx(np.mean(expected), abs=0.03), logq

    exact = gradient(task(loss="full"), frequency)
    np.testing.assert_allclose(gradient(t, frequency), exact, atol=0.02 * np.abs(exact).max())
    if sampler != "uniform":  # without the correction the gradient goes elsewhere
        t, _ = sampled_exactly(sampler, "none", count, seed=1)
        assert np.abs(gradient(t, frequency) - exact).max() > 0.05 * np.abs(exact).max()


# What a step reads, prediction, errors


def test_a_step_wants_what_its_loss_reads():
    """Ids of the batch with its draws, each for the table that holds it."""

    def wanted(**changes):
        t = task(queries=("surface",), **changes)
        batch = t.draw(BATCH | {"query_surface": BATCH["target"] % 3}, jax.random.key(0))
        return t, {name: (owner, ids.shape) for name, (owner, ids) in t.wanted(batch).items()}

    always = {"history": ("item", (2, 4)), "query_surface": ("surface", (2, 4))}
    t, found = wanted(loss="full")
    assert found == always and t.needs_catalogue and not t.needs_frequency
    drawn = {"target": ("item", (2, 4)), "negative": ("item", (2, 4))}
    t, found = wanted(shared="row")
    assert found == always | drawn and not t.needs_catalogue and not t.needs_frequency
    t, found = wanted(shared="row", sampler="mixed", logq="standard")
    assert found == always | drawn | {f"{name}_frequency": (FREQUENCY, shape) for name, (_, shape) in drawn.items()}
    assert t.needs_frequency


def test_queries_and_item_vectors_give_the_scores_of_the_loss():
    table, context = embeddings(), np.random.default_rng(5).normal(size=(4, DIM)).astype(np.float32)
    t = task(queries=("surface",), loss="full", similarity="cosine", temperature=0.5)
    batch = BATCH | {"query_surface": np.array([[1, 2, 0, 0], [3, 3, 1, 2]], np.int32)}
    tables = {"item": jnp.asarray(table), "surface": jnp.asarray(context)}
    query, vectors = jax.jit(
        lambda tables, batch: (
            t.queries(history, lambda name, ids: tables[name][ids], batch),
            t.item(tables["item"][1:]),
        )
    )(tables, batch)
    scores = np.einsum("bld,vd->blv", query, vectors).astype(np.float64)
    nats = np.log(np.exp(scores).sum(-1)) - np.take_along_axis(
        scores, np.maximum(batch["target"] - 1, 0)[:, :, None], -1
    ).squeeze(-1)
    loss, _ = loss_of(t, table, batch, context=context)
    assert float(loss) == pytest.approx(nats[batch["target"] > 0].mean(), rel=1e-5)
    x = table[3].astype(np.float64) + context[1]
    np.testing.assert_allclose(query[0, 0], x / np.linalg.norm(x) / 0.5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "value"),
    [("loss", "ful"), ("sampler", "unifrom"), ("shared", "tokens"), ("logq", "yes"), ("similarity", "cos")],
)
def test_misspelt_options(name, value):
    with pytest.raises(ValueError, match=rf"task\.{name} = '{value}': expected one of"):
        dataclasses.replace(BASE, **{name: value})


@pytest.mark.parametrize(("name", "value"), [("negatives", 0), ("temperature", 0.0)])
def test_impossible_numbers(name, value):
    with pytest.raises(ValueError, match=rf"task\.{name} = {value}"):
        dataclasses.replace(BASE, **{name: value})
    assert dataclasses.replace(BASE, loss="full", negatives=0).negatives == 0
