"""Item tables whose rows belong to codes: where config.table.codes points, and runs that train on them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recscale.data.splits import runs
from recscale.mesh import place_batch
from recscale.run import build, costs, init_state, table_facts
from recscale.semantic_ids import catalogue
from recscale.step import make_train_step
from tests.tiny_run import ITEMS, SAMPLED, make_codes, make_log, tiny

SLOW = pytest.mark.slow
KINDS = {"ngram": 30, "unigram": 12, "bigram": 40, "pieces": 40}


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return make_log(tmp_path_factory.mktemp("planted") / "log")


@pytest.fixture(scope="module")
def codes(log, tmp_path_factory):
    return make_codes(log, tmp_path_factory.mktemp("codes") / "codes")


def built(log, codes, kind: str, **changes):
    table = {"table__kind": kind, "table__rows": KINDS[kind], "table__parts": 3, "table__codes": str(codes)}
    return build(tiny("sasrec", log, **(SAMPLED | table | changes)))


@pytest.mark.parametrize("kind", [pytest.param(k, marks=SLOW) if k.endswith("igram") else k for k in KINDS])
def test_a_run_trains_on_codes_of_a_folder(kind, log, codes):
    run = built(log, codes, kind)
    kept = run.fixed["item.codes"]
    if kind == "pieces":
        assert kept.max() <= 40 and (kept[1:, 0] > 0).all()
    else:
        np.testing.assert_array_equal(kept, catalogue.read(codes).codes_VQ)
    state, train_step = init_state(run), make_train_step(run)
    before = {name: np.asarray(state["tables"][name]) for name in ("item", "item.codes")}
    for i in range(2):
        state, metrics = train_step(state, place_batch(run.mesh, run.loader[i]))
    assert np.isfinite(metrics["loss"])
    assert (np.asarray(state["tables"]["item"]) != before["item"]).any()
    np.testing.assert_array_equal(state["tables"]["item.codes"], before["item.codes"])
    facts = table_facts(run)
    assert facts["kind"] == kind and facts["bytes"] == 4 * 8 * KINDS[kind] + 3 * ITEMS  # a byte per code
    assert facts["arrays"]["item"]["collisions_any"] > 0.5
    ids = costs(run, 2)["semantic_ids"]
    assert ids["method"] == "random" and ids["sha256"] == catalogue.read(codes).sha256


def test_items_of_equal_codes_have_equal_vectors_and_padding_has_none(log, codes):
    of_items = catalogue.read(codes).codes_VQ
    for kind in ("ngram", "pieces"):
        run = built(log, codes, kind)
        state = init_state(run)
        spec, by_slot = run.tables.specs["item"], run.tables.arrays["item"].values(state["tables"]["item"])
        slots = spec.slots(np.arange(ITEMS + 1), run.fixed["item.codes"])
        vectors = np.asarray(spec.compose({"": jnp.asarray(by_slot[slots[""]])}, {}))
        assert not vectors[0].any() and vectors[1:].any(axis=1).all()
        _, place = np.unique(of_items[1:], axis=0, return_inverse=True)
        for group in range(place.max() + 1):
            assert (vectors[1:][place == group] == vectors[1:][place == group][0]).all()


def test_pieces_are_learned_on_training_events_alone(log, codes):
    run = built(log, codes, "pieces")
    view = run.views["train"]
    trained = np.unique(run.log.events["item_id"][runs(view.start, view.stop - view.start)])
    assert len(trained) < run.log.num_events
    again = built(log, codes, "pieces", seed=5)
    np.testing.assert_array_equal(run.fixed["item.codes"], again.fixed["item.codes"])
    fewer = built(log, codes, "pieces", data__users=20)
    assert (fewer.fixed["item.codes"] != run.fixed["item.codes"]).any()


def test_wide_codes_and_a_plain_file(log, tmp_path):
    made = np.random.default_rng(0).integers(0, 2000, (ITEMS, 3))
    np.save(tmp_path / "codes.npy", made)
    run = built(log, tmp_path / "codes.npy", "ngram", table__inner=2048)
    np.testing.assert_array_equal(run.fixed["item.codes"][1:], made)
    place = run.tables.arrays["item.codes"]
    assert place.dtype == "uint16"
    np.testing.assert_array_equal(place.values(init_state(run)["tables"]["item.codes"])[1:], made)
    with pytest.raises(ValueError, match=r"codes\.npy: values \d+\.\.\d+, expected 0\.\.255; .*table\.inner"):
        built(log, tmp_path / "codes.npy", "ngram")


def test_codes_that_do_not_fit_are_refused(log, codes, tmp_path):
    other = make_log(tmp_path / "other", items=ITEMS + 1, items_per_interest=20)
    with pytest.raises(ValueError, match=r"made for 64 items .* has 63 items"):
        built(log, make_codes(other, tmp_path / "codes"), "ngram")
    with pytest.raises(ValueError, match=r"3 codes per item, but table\.parts = 4"):
        built(log, codes, "bigram", table__parts=4)
    with pytest.raises(ValueError, match=r"table.rows = 40, but the catalogue's codes have 189 values together"):
        built(log, "", "pieces")  # who took what: every item has a value of its own in so small a catalogue
    with pytest.raises(ValueError, match=r"nowhere: no codes here"):
        built(log, tmp_path / "nowhere", "ngram")


@SLOW
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_same_on_a_mesh(kind, log, codes):
    losses = []
    for shape in ((1, 1, 1), (2, 2, 2)):
        mesh = dict(zip(("mesh__replica", "mesh__data", "mesh__model"), shape, strict=True))
        run = built(log, codes, kind, **mesh, table__warmup=0, optim__warmup=0)
        state, train_step = init_state(run), make_train_step(run)
        for i in range(3):
            state, metrics = train_step(state, place_batch(run.mesh, run.loader[i]))
        losses.append(float(metrics["loss"]))
        assert not np.asarray(jax.device_get(state["overflow"])).any()
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
