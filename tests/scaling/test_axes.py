"""Axes change what they say and nothing else; every cell of the planted study builds."""

import importlib.util
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from configs import dreamrec_yc, hstu_planted, tiger_beauty
from recscale.models import MODELS
from recscale.scaling import axes, recipes
from recscale.tasks import TASKS
from recscale.tasks.denoising import Config

STUDY = Path(__file__).resolve().parents[2] / "experiments" / "0001_four_axes_planted" / "study.py"


def flat(config: ConfigDict) -> dict[str, object]:
    """Every leaf by its dotted path; empty groups too."""
    found: dict[str, object] = {}

    def walk(prefix: str, node) -> None:
        for key, value in node.items():
            if isinstance(value, ConfigDict) and len(value):
                walk(f"{prefix}{key}.", value)
            else:
                found[prefix + key] = {} if isinstance(value, ConfigDict) else value

    walk("", config)
    return found


def difference(base: ConfigDict, other: ConfigDict) -> dict[str, object]:
    before, after = flat(base), flat(other)
    assert not set(before) - set(after) - {"cell.coordinates"}
    return {key: value for key, value in after.items() if key not in before or before[key] != value}


def base(**model) -> ConfigDict:
    config = hstu_planted.get_config().unlock()
    config.model.update(model)
    return config.lock()


CHANGES = [
    ("table", "rows", 250, "table_rows", {"table.rows": 250, "table.kind": "hashed"}),
    ("table", "dim", 8, "table_dim", {"model.embed_dim": 8}),
    ("data", "users", 500, "users", {"data.users": 500}),
    ("data", "events", 20, "events_per_user", {"data.events_per_user": 20}),
    ("context", "history", 4, "history", {"loader.length": 4}),
    ("encoder", "depth", 4, "depth", {"model.depth": 4}),
    (
        "encoder", "width", 128, "width",
        {"model.width": 128, "model.heads": 4, "optim.learning_rate": 3e-3 / 2},
    ),
    (
        "encoder", "width", 8, "width",
        {"model.width": 8, "model.qk_dim": 8, "model.v_dim": 8, "optim.learning_rate": 3e-3 * 2},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("axis", "name", "value", "coordinate", "expected"), CHANGES)
def test_an_axis_changes_what_it_says_and_nothing_else(axis, name, value, coordinate, expected):
    start = base()
    before = flat(start)
    cell = axes.AXES[axis][name](start, value)
    expected = expected | {f"cell.coordinates.{coordinate}": value}
    assert difference(start, cell) == pytest.approx(expected)
    assert flat(start) == before and start.is_locked
    assert cell.is_locked
    with pytest.raises(AttributeError):
        cell.model.depht = 3


GENERATIVE = [
    (
        "codes", ("codes/x", 2, 32, 90), {"id_levels": 2, "id_codebook": 32},
        {"table.codes": "codes/x", "model.levels": 3, "model.codebook": 90},
    ),
    (
        "codes", ("codes/x", 5, 512), {"id_levels": 5, "id_codebook": 512},
        {"table.codes": "codes/x", "model.levels": 5, "model.codebook": 512},
    ),
    (
        "width", (512,), {"width": 512},
        {"model.embed_dim": 512, "model.heads": 8, "model.ffn": 4096, "optim.learning_rate": 1e-3 / 2},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "values", "coordinates", "expected"), GENERATIVE)
def test_the_axis_of_generative_models_changes_what_it_says_and_nothing_else(name, values, coordinates, expected):
    start = tiger_beauty.get_config()
    cell = axes.SEMANTIC_ID[name](start, *values)
    noted = {f"cell.coordinates.{key}": value for key, value in coordinates.items()}
    assert difference(start, cell) == pytest.approx(expected | noted)
    MODELS["tiger"].Config(**cell.model)


def test_a_width_that_heads_of_their_size_do_not_divide_is_an_error():
    with pytest.raises(ValueError, match="width 100 does not divide into heads of 64"):
        axes.semantic_id_width(tiger_beauty.get_config(), 100)


DENOISING = [
    ("steps", (100,), {"diffusion_steps": 100}, {"task.steps": 100}),
    ("sampling", ("ddim", 20), {"sampling_steps": 20}, {"task.sampler": "ddim", "task.sampling_steps": 20}),
    ("guidance", (4.5,), {"guidance": 4.5}, {"task.guidance": 4.5}),
    ("width", (256,), {"denoiser_width": 256}, {"task.width": 256, "task.ffn": 512, "task.heads": 4}),
]


@pytest.mark.parametrize(("name", "values", "coordinates", "expected"), DENOISING)
def test_the_axis_of_diffusion_changes_what_it_says_and_nothing_else(name, values, coordinates, expected):
    start = dreamrec_yc.get_config()
    cell = axes.DIFFUSION[name](start, *values)
    noted = {f"cell.coordinates.{key}": value for key, value in coordinates.items()}
    assert difference(start, cell) == pytest.approx(expected | noted)
    Config(**cell.task)
    assert axes.cell(cell, "study", "cell", ("diffusion",)).cell.axes == ("diffusion",)


def test_a_denoiser_that_heads_of_their_size_do_not_divide_is_an_error():
    with pytest.raises(ValueError, match="width 100 does not divide into heads of 64"):
        axes.denoiser_width(dreamrec_yc.get_config(), 100)


def test_context_features_note_how_many():
    start = base()
    cell = axes.context_features(start, ["surface"])
    assert difference(start, cell) == {"loader.queries": ("surface",), "cell.coordinates.context_features": 1}
    assert axes.context_features(cell, []).cell.coordinates.context_features == 0


def test_axes_add_up():
    cell = axes.encoder_depth(axes.data_users(base(), 500), 4)
    assert cell.cell.coordinates.to_dict() == {"users": 500, "depth": 4}
    assert (cell.data.users, cell.model.depth) == (500, 4)


def test_a_width_keeps_the_shape_of_the_feed_forward_block():
    config = ConfigDict({"cell": {"coordinates": {}}, "optim": {"learning_rate": 1e-3, "parametrisation": "sp"}})
    config.model = ConfigDict({"embed_dim": 64, "width": 64, "heads": 2, "ffn": 256})
    cell = axes.encoder_width(config.lock(), 128)
    assert cell.model.to_dict() == {"embed_dim": 64, "width": 128, "heads": 4, "ffn": 512}


def test_a_history_longer_than_the_model_is_an_error():
    assert axes.context_history(base(), 64).loader.length == 64
    with pytest.raises(ValueError, match=r"history of 65 events.*model.max_length = 64"):
        axes.context_history(base(), 65)


def test_a_width_that_its_heads_do_not_divide_is_an_error():
    with pytest.raises(ValueError, match="width 100 does not divide into 3 heads"):
        axes.encoder_width(base(), 100)


def test_recipes():
    assert [recipes.heads(width) for width in (4, 31, 32, 63, 64, 256)] == [1, 1, 1, 1, 2, 8]
    assert recipes.learning_rate(1e-3, 32, 32) == 1e-3
    assert recipes.learning_rate(1e-3, 32, 128) == pytest.approx(5e-4)
    assert recipes.learning_rate(1e-3, 32, 8) == pytest.approx(2e-3)


def test_a_cell_is_named_and_seeded():
    start = base()
    cell = axes.cell(start, "study", "users-500", ("data",), seed=3)
    expected = {"study": "study", "seed": 3, "cell.name": "users-500", "cell.axes": ("data",)}
    assert difference(start, cell) == expected
    assert start.study == "" and cell.is_locked
    with pytest.raises(ValueError, match=r"'users-500': unknown axes \['date'\], expected some of .*'data'"):
        axes.cell(start, "study", "users-500", ("data", "date"))


# The planted study


@pytest.fixture(scope="module")
def study():
    spec = importlib.util.spec_from_file_location("planted_study", STUDY)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def configs(study) -> dict[str, ConfigDict]:
    return {name: study.get_config(name) for name in study.cells()}


def test_every_cell_of_the_study_builds_and_is_unique(study, configs):
    assert len(study.cells()) == len(configs)
    contents = set()
    for name, config in configs.items():
        assert config.is_locked and config.study == study.NAME
        assert name == f"{config.cell.name}-s{config.seed}"
        MODELS[config.model_name].Config(**config.model)
        TASKS[config.task_name].Config(**config.task)
        assert config.loader.length <= config.model.max_length
        contents.add(str({k: v for k, v in flat(config).items() if not k.startswith("cell.")}))
    assert len(contents) == len(configs)
    assert {tuple(c.cell.coordinates) for c in configs.values()} == {tuple(configs["base-s0"].cell.coordinates)}


def test_the_study_has_five_cells_on_every_axis_and_five_seeds_at_the_base(configs):
    for axis in axes.AXES:
        assert len({c.cell.name for c in configs.values() if axis in c.cell.axes}) >= 5
    assert sum(c.cell.name == "base" for c in configs.values()) == 5
    start = configs["base-s0"].cell.coordinates
    for config in configs.values():  # one axis at a time
        moved = [k for k, v in config.cell.coordinates.items() if v != start[k]]
        assert len(moved) == (config.cell.name != "base"), config.cell.name


def test_an_unknown_cell_names_the_known_ones(study):
    with pytest.raises(ValueError, match="no cell 'width-5'; it has base-s0"):
        study.get_config("width-5")
