"""What a config may say: every section, choice and size is checked before anything is compiled."""

import jax
import pytest

from recscale.program import abstract_batch, abstract_state, check_config, parameters, program
from tests.tiny_run import FULL, ITEMS, SAMPLED, tiny


def config(**changes):
    """A tiny config that no data is read for."""
    return tiny("hstu", "log", **(SAMPLED | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh__data": 0}, r"mesh = .*'data': 0.*: expected replica, data, model and accumulate of at least 1"),
        ({"mesh__replica": 0}, r"mesh = .*'replica': 0.*of at least 1"),
        ({"mesh__model": -1}, r"mesh = .*'model': -1.*of at least 1"),
        ({"mesh__accumulate": 0}, r"mesh = .*'accumulate': 0.*of at least 1"),
        ({"mesh__data": 3}, r"loader\.batch_size = 8: expected a multiple of the 3 devices of the mesh$"),
        (
            {"mesh__data": 2, "mesh__model": 2, "mesh__accumulate": 4},
            r"loader\.batch_size = 8: expected a multiple of the 4 devices of the mesh x mesh\.accumulate = 4",
        ),
        ({"mesh__data": 8, "eval__batch_size": 12}, r"eval\.batch_size = 12: expected a multiple of the 8 devices"),
        ({"model_name": "hsut"}, r"model_name = 'hsut': expected one of"),
        ({"task_name": "next"}, r"task_name = 'next': expected one of"),
        ({"loader__window": "first"}, r"loader\.window = 'first': expected one of \('last', 'random', 'all', "),
        ({"eval__protocols": ("full", "unsen")}, r"eval\.protocols = 'unsen': expected one of \('full', 'unseen', "),
        ({"table__optimizer": "adamw"}, r"table\.optimizer = 'adamw': expected one of .*'frozen'"),
        ({"train__select": "ndcg@10"}, r"train\.select = 'ndcg@10': expected 'METRIC max' or 'METRIC min'"),
        ({"train__patience": 3}, r"train\.patience needs train\.select"),
    ],
)
def test_a_config_that_says_what_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        check_config(config(**changes))


def test_unknown_and_missing_keys_are_named():
    wrong = config().unlock()
    wrong.table.row = 3
    del wrong.mesh["remat"]
    with pytest.raises(ValueError, match=r"\['mesh\.remat', 'table\.row'\] are missing or unknown"):
        check_config(wrong)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "hash"}, r"table\.kind = 'hash': expected one of \('full', 'hashed'"),
        ({"kind": "hashed"}, r"table\.kind = 'hashed' needs table\.rows, found 0"),
        ({"kind": "hashed", "rows": 64}, r"table\.rows = 64 is beyond the 63 ids: use kind 'full'"),
        ({"rows": 9}, r"table\.kind = 'full' has no table\.rows, found 9"),
        ({"parts": 2}, r"table\.kind = 'full' has no table\.parts, found 2"),
        ({"kind": "low_rank"}, r"table\.kind = 'low_rank' needs table\.inner, found 0"),
        ({"kind": "multi", "inner": -4}, r"table\.kind = 'multi' needs table\.inner, found -4"),
        ({"kind": "pq", "parts": 3}, r"table\.dim = 8 does not divide into 3 parts"),
        ({"kind": "capped", "rows": 4, "combine": "concat"}, r"'capped' has no table\.combine: leave it at 'sum'"),
        ({"kind": "hashed", "rows": 4, "combine": "mean"}, r"table\.combine = 'mean': expected 'sum' or 'concat'"),
        ({"dtype": "float16"}, r"table\.dtype = 'float16': expected 'float32' or 'bfloat16'"),
    ],
)
def test_a_table_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        program(config(**{f"table__{key}": value for key, value in changes.items()}), ITEMS, {}, 10)


def test_a_program_needs_no_data():
    """The shapes of state and batch, and the parameters, from the config and a few counts."""
    run = program(
        config(loader__queries=("surface",), table__kind="low_rank", table__inner=4), ITEMS, {"surface": 4}, 9
    )
    state, batch = abstract_state(run), abstract_batch(run)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves((state, batch)))
    assert set(state["tables"]) == {"item", "item_frequency", "surface"} and "query_surface" in batch
    assert batch["item_id"].shape == (8, 16)
    counted = parameters(run)
    assert counted["tables"] == ITEMS * 4 + 4 * 8 and counted["context_tables"] == 3 * 8
    assert counted["dense"] == sum(leaf.size for leaf in jax.tree.leaves(state["model"]))


def test_a_history_beyond_the_model_is_refused():
    with pytest.raises(ValueError, match=r"loader\.length = 17 is beyond model\.max_length = 16"):
        program(config(loader__length=17), ITEMS, {}, 10)
    program(config(**FULL), ITEMS, {}, 10)
