"""The denoising task: what its loss sees, what its samples follow, and how they are scored."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import dreamrec_yc
from recscale.layers.samplers import affine_chain
from recscale.models import dreamrec
from recscale.tasks.denoising import Config, Task

ITEMS, DIM, LENGTH = 9, 4, 7
QUICK = {"xla_backend_optimization_level": 0}
ITEMS_VD = np.random.default_rng(0).normal(size=(ITEMS + 1, DIM)).astype(np.float32)
ITEMS_VD[0] = 0.0
BASE = dreamrec_yc.get_config().task.to_dict() | {"steps": 20, "sampler": "ddpm"}
ALWAYS = {"drop": 0.0, "guidance": 0.0}  # no condition is dropped
BATCH = {  # two histories, every event of which is a target, and padding
    "item_id": np.array([[3, 4, 5, 2, 1, 6, 0]], np.int32),
    "target": np.array([[4, 5, 7, 1, 6, 8, 0]], np.int32),
    "segment_ids": np.array([[1, 1, 1, 2, 2, 2, 0]], np.int32),
    "positions": np.array([[0, 1, 2, 0, 1, 2, 0]], np.int32),
}
ONE_EACH = {  # one target a row
    "item_id": np.array([[3, 4, 0], [5, 0, 0], [2, 1, 6]], np.int32),
    "target": np.array([[0, 5, 0], [7, 0, 0], [0, 0, 8]], np.int32),
    "segment_ids": np.array([[1, 1, 0], [1, 0, 0], [1, 1, 1]], np.int32),
    "positions": np.array([[0, 1, 0], [0, 0, 0], [0, 1, 2]], np.int32),
}
ROWS = jnp.asarray([11, 12, 13], jnp.int32)


def task(segments: int = 0, **changes) -> Task:
    return Task(Config(**(BASE | changes)), ITEMS, segments=segments)


def network(t: Task, dropout: float = 0.0):
    encoder = dreamrec.Model(dreamrec.Config(DIM, 5, dropout, "float32"), jax.random.key(1))
    model = t.join(encoder, DIM, jax.random.key(2))
    leaves, tree = jax.tree.flatten(model)
    keys = jax.random.split(jax.random.key(3), len(leaves))
    moved = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]  # no gate is zero
    return jax.tree.unflatten(tree, moved)


def lookup(table: str, ids) -> jax.Array:
    del table
    return jnp.asarray(ITEMS_VD)[ids]


def loss_of_rows(t: Task, model, batch, weight=None):
    """rows -> loss, with the targets outside `weight` left out."""
    kept = batch if weight is None else batch | {"target": batch["target"] * weight}
    return lambda rows: t.loss(model, rows, kept, jax.random.key(5))[0]


def rows_of(t: Task, batch) -> dict[str, jax.Array]:
    return {name: lookup(*owned) for name, owned in t.wanted(batch).items()}


@pytest.mark.parametrize("denoiser", ["mlp1", "dit"])
def test_a_target_is_learnt_from_its_own_past_alone(denoiser):
    """The gradient of one target's loss is exactly zero at later events, other histories and other targets."""
    t = task(denoiser=denoiser, **ALWAYS)
    only = np.array([[0, 1, 0, 0, 0, 0, 0]])
    found = jax.jit(jax.grad(loss_of_rows(t, network(t), BATCH, only)), compiler_options=QUICK)(rows_of(t, BATCH))
    touched = {name: np.abs(np.asarray(g)).sum(axis=-1)[0] > 0 for name, g in found.items()}
    assert touched["history"].tolist() == [True, True, False, False, False, False, False]
    assert touched["target"].tolist() == [False, True, False, False, False, False, False]


def test_a_dropped_condition_says_nothing_of_the_history():
    t = task(drop=1.0)
    found = jax.jit(jax.grad(loss_of_rows(t, network(t), BATCH)), compiler_options=QUICK)(rows_of(t, BATCH))
    assert not np.asarray(found["history"]).any() and np.asarray(found["target"]).any()


def test_detached_targets_take_no_gradient():
    t = task(target="detached")
    found = jax.jit(jax.grad(loss_of_rows(t, network(t), BATCH)), compiler_options=QUICK)(rows_of(t, BATCH))
    assert not np.asarray(found["target"]).any() and np.asarray(found["history"]).any()


def errors_by_hand(t: Task, model, batch, x0) -> np.ndarray:
    """|x0 - f(x_t)|^2 / D of these clean vectors, with the noise and the times of the loss."""
    keys = jax.random.split(jax.random.key(5), 4)
    time = jax.random.randint(keys[2], (1, LENGTH), 0, 20)
    abar = t.process.table.abar[np.asarray(time)][..., None]
    x = np.sqrt(abar) * x0 + np.sqrt(1 - abar) * np.asarray(jax.random.normal(keys[3], x0.shape))
    h = model.encoder(rows_of(t, batch)["history"], batch)
    head = model.head
    joined = jnp.concatenate([jnp.asarray(x, jnp.float32), h, head.time(time.astype(jnp.float32), "float32")], axis=-1)
    return np.square(np.asarray(head.out(joined)) - x0).mean(axis=-1)


def test_the_loss_is_the_plain_formula():
    """x0 and weight 1: mean over targets of |x0 - f(x_t)|^2 / D, computed here by hand."""
    t = task(**ALWAYS)
    model, rows = network(t), rows_of(t, BATCH)
    loss = jax.jit(loss_of_rows(t, model, BATCH), compiler_options=QUICK)(rows)
    error = errors_by_hand(t, model, BATCH, np.asarray(rows["target"]))
    np.testing.assert_allclose(loss, error[BATCH["target"] > 0].mean(), rtol=1e-5)


def test_slots_hold_the_targets_of_a_row():
    """With loader.segments only as many slots are denoised; noise differs, so errors of no noise are compared."""
    sparse = BATCH | {"target": np.array([[0, 0, 7, 0, 0, 8, 0]], np.int32)}
    few, all_ = (task(segments, **ALWAYS, process="linear", steps=1, predicts="x0") for segments in (2, 0))
    model = network(few)
    with jax.default_matmul_precision("highest"):
        a, b = (jax.jit(loss_of_rows(t, model, sparse))(rows_of(t, sparse)) for t in (few, all_))
    np.testing.assert_allclose(a, b, rtol=0.05)  # one step of the schedule: x_t is nearly x0


@pytest.mark.parametrize("sampler", ["ddpm", "closed_form"])
def test_samples_follow_the_closed_form_of_the_linear_denoiser(sampler):
    """mlp1 is an affine Gaussian chain: mean and covariance of 8,192 guided samples, within 5 standard errors."""
    K = 8192
    t = task(samples=K, guidance=1.5, sampler=sampler)
    model = network(t)
    x = np.asarray(jax.jit(lambda: t.generate(model, lookup, ONE_EACH, ROWS), compiler_options=QUICK)())
    memory, null = t._memory(model, lookup, ONE_EACH, 1, None)

    def shift(time):
        time = jnp.asarray(time, jnp.float32).reshape(1, 1)
        conditional, free = (model.head.affine(part, time)[1] for part in (memory, null))
        return (2.5 * conditional - 1.5 * free)[:, 0]

    weight = model.head.affine(memory, jnp.zeros((1, 1)))[0]
    mean, covariance = (np.asarray(part) for part in affine_chain(weight, shift, t.process))
    error = np.sqrt(np.diagonal(covariance) / K)
    assert (np.abs(x.mean(axis=1) - mean) < 5 * error).all()
    for b in range(3):
        np.testing.assert_allclose(np.cov(x[b].T), covariance, atol=5 * np.sqrt(2 / K) * covariance.max())


def test_the_estimated_density_has_the_exact_one_as_its_mean():
    N = 2048
    batch = {name: np.repeat(value[:1], N, axis=0) for name, value in ONE_EACH.items()}
    found = {}
    for probes in (0, 1, 4):
        t = task(process="cosine", guidance=0.5, likelihood_steps=20, likelihood_probes=probes)
        model = network(t)
        density = jax.jit(lambda row_N, t=t, model=model: t.density_nats(model, lookup, batch, row_N))
        found[probes] = np.asarray(density(jnp.arange(N)))
    assert np.ptp(found[0]) < 1e-3  # one target, one history
    one, four = found[1] - found[0], found[4] - found[0]
    assert abs(one.mean()) < 4 * one.std() / np.sqrt(N)
    assert four.std() == pytest.approx(one.std() / 2, rel=0.15)


def test_a_sample_depends_on_seed_and_row_not_on_the_batch():
    t, again = task(samples=2), task(samples=2, seed=1)
    model = network(t)
    x = np.asarray(t.generate(model, lookup, ONE_EACH, ROWS))
    part = {name: value[1:] for name, value in ONE_EACH.items()}
    np.testing.assert_allclose(t.generate(model, lookup, part, ROWS[1:]), x[1:], rtol=1e-5, atol=1e-6)
    assert np.abs(np.asarray(again.generate(model, lookup, ONE_EACH, ROWS)) - x).min() > 0
    assert np.abs(x[:, 0] - x[:, 1]).min() > 0


@pytest.mark.parametrize("similarity", ["dot", "cosine", "l2"])
@pytest.mark.parametrize("combine", ["mean", "max"])
def test_scores_against_numpy(similarity, combine):
    t = task(similarity=similarity, combine=combine, samples=3, temperature=0.5, normalise=True)
    x = np.random.default_rng(1).normal(size=(2, 3, DIM)).astype(np.float32)
    items = ITEMS_VD[1:] / np.linalg.norm(ITEMS_VD[1:], axis=1, keepdims=True) * 2.0  # sqrt(D)
    if similarity == "l2":
        every = -np.square(x[:, :, None] - items).sum(-1)
    else:
        y = (x, items)
        if similarity == "cosine":
            y = tuple(z / np.linalg.norm(z, axis=-1, keepdims=True) for z in y)
        every = y[0] @ y[1].T
    expected = getattr(every, combine)(axis=1) / 0.5
    found = t.scores(t.queries_of(jnp.asarray(x)), t.item(jnp.asarray(ITEMS_VD[1:])))
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"process": "cosin"}, r"task.process = 'cosin': expected one of \('linear'"),
        ({"process": "straight"}, r"task.steps = 20 with process 'straight': expected T >= 1 for .* and 0 for"),
        ({"steps": 0}, r"task.steps = 0 with process 'exp'"),
        ({"drop": 0.0}, r"task.guidance = 2.0 needs an unconditional network: expected task.drop > 0"),
        ({"sampler": "closed_form", "denoiser": "mlp2"}, r"task.sampler = 'closed_form' with denoiser 'mlp2' that"),
        ({"ranking": 1.5}, r"task.ranking = 1.5: expected a number from 0 to 1"),
        ({"samples": 0}, r"task.samples = 0: expected at least 1"),
        ({"temperature": 0.0}, r"task.temperature = 0.0, deviation = 1.0, guidance = 2.0: expected finite numbers"),
        ({"temperature": float("nan")}, r"task.temperature = nan, deviation"),
        ({"guidance": float("inf")}, r"guidance = inf: expected finite numbers"),
        ({"sampling_steps": 21}, r"sampler steps: found 21, expected 1 to 20"),
        ({"likelihood_steps": 21}, r"task.likelihood_steps = 21: expected at most task.steps = 20"),
        ({"sampler": "langevin", "eta": 0.0}, r"task.eta = 0.0 with sampler 'langevin': its steps would stand still"),
    ],
)
def test_a_wrong_choice_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        task(**changes)


def test_the_ranking_term_wants_the_own_target_found_better():
    """(1 - r) error + r log(1 + exp(error - error of the others' mean)), by hand; log 2 where all agree."""
    t = task(ranking=0.25, **ALWAYS)
    model, rows, real = network(t), rows_of(t, BATCH), BATCH["target"] > 0
    x0 = np.asarray(rows["target"])
    others = (x0[real].sum(axis=0) - x0) / (real.sum() - 1)
    error, worse = (errors_by_hand(t, model, BATCH, x) for x in (x0, others))
    expected = 0.75 * error + 0.25 * np.log1p(np.exp(error - worse))
    found = jax.jit(loss_of_rows(t, model, BATCH), compiler_options=QUICK)(rows)
    np.testing.assert_allclose(found, expected[real].mean(), rtol=1e-5)
    alone = task(ranking=1.0, **ALWAYS)
    same = BATCH | {"target": np.full_like(BATCH["target"], 4) * real}
    np.testing.assert_allclose(loss_of_rows(alone, model, same)(rows_of(t, same)), np.log(2), rtol=1e-5)


def test_the_blocks_of_the_denoiser_are_wrapped_as_those_of_the_encoder():
    """What gathers weights over the mesh and says what is kept for the backward pass."""
    t, wrapped = task(denoiser="adaln"), []

    def wrap(body):
        wrapped.append(body)
        return body

    jax.eval_shape(lambda rows: t.loss(network(t), rows, BATCH, jax.random.key(0), wrap=wrap)[0], rows_of(t, BATCH))
    assert len(wrapped) == 1  # DreamRec's encoder has one block and wraps nothing


@pytest.mark.parametrize(
    ("changes", "calls", "passes"),
    [
        ({}, 20, 2),
        ({"guidance": 0.0}, 20, 1),
        ({"sampler": "ode", "sampling_steps": 5}, 9, 2),
        ({"sampler": "closed_form"}, 0, 0),
    ],
)
def test_the_cost_of_a_sample_counts_every_pass_of_the_denoiser(changes, calls, passes):
    """By hand for mlp1: x times D x D in every pass; closed form: two products in place of the chain."""
    t = task(samples=3, **changes)
    remembered = 2 * DIM**2
    each = calls * passes * 2 * DIM**2 if calls else 2 * 2 * DIM**2
    assert t.sampling(DIM, 5) == {"denoiser_calls": calls * passes, "flops_per_target": 3 * (remembered + each)}


def test_what_a_sample_reads_is_the_history_once_and_nothing_where_it_is_guided_away_from():
    t = task(denoiser="dit", width=8, ffn=16, depth=2, samples=3)
    without = task(denoiser="dit", width=8, ffn=16, depth=2, samples=3, guidance=0.0)
    longer, one = (t.sampling(DIM, n)["flops_per_target"] for n in (7, 6))
    projected = 2 * 2 * 2 * DIM * 8  # keys and values of a state in both blocks
    assert longer - one == projected + 3 * 20 * 2 * 2 * 2 * 8  # read by every conditional pass of every sample
    passes = [x.sampling(DIM, 7)["flops_per_target"] for x in (t, without)]
    modulated = 2 * (2 + 2 * 6) * DIM * 8  # by the time and the null vector: the same for all
    read = 7 * 2 * 2 * 2 * 8
    assert passes[0] - passes[1] == passes[1] - projected * 8 - 3 * 20 * (read + modulated)


@pytest.mark.parametrize(
    ("changes", "queries"), [({}, 1), ({"combine": "max"}, 3), ({"similarity": "l2"}, 3), ({"similarity": "cosine"}, 1)]
)
def test_the_catalogue_is_ranked_once_for_every_vector_it_is_compared_with(changes, queries):
    assert task(samples=3, **changes).ranking_flops(DIM) == queries * 2 * DIM * ITEMS


def test_a_sample_is_drawn_without_a_look_at_its_target():
    t, asked = task(), []

    def noted(table: str, ids) -> jax.Array:
        asked.append(np.asarray(ids))
        return lookup(table, ids)

    t.generate(network(t), noted, ONE_EACH, ROWS)
    assert set(np.concatenate([ids.ravel() for ids in asked])) == set(ONE_EACH["item_id"].ravel())


def test_the_closed_form_serves_a_denoiser_that_keeps_one_direction():
    """Its covariance is singular: samples are finite, and on a line."""
    t = task(samples=64, sampler="closed_form")
    model = network(t)
    line = np.array([1.0, 0.7, -0.3, 0.1], np.float32)
    kernel = model.head.out.kernel[...]
    model.head.out.kernel[...] = kernel.at[:DIM].set(np.outer(line, 0.9 * line / (line @ line)))
    x = np.asarray(jax.jit(lambda: t.generate(model, lookup, ONE_EACH, ROWS), compiler_options=QUICK)())
    assert np.isfinite(x).all()
    across = x - x.mean(axis=1, keepdims=True)
    values = np.linalg.svd(across[0], compute_uv=False)
    assert values[1] < 1e-2 * values[0]
