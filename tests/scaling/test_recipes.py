"""Recipes compute what their sources say, and change nothing else."""

import dataclasses
import math

import pytest

from configs import hstu_planted, sasrec_ml1m
from recscale.models import MODELS
from recscale.program import check_config, program
from recscale.scaling import axes, recipes
from tests.scaling.test_axes import difference

BASES = {"hstu": hstu_planted.get_config, "sasrec": sasrec_ml1m.get_config}


def batch_of(rows: int):
    config = hstu_planted.get_config().unlock()
    config.loader.batch_size = rows
    return config.lock()


@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
@pytest.mark.parametrize("name", recipes.RECIPES)
def test_every_recipe_gives_a_config_that_builds(name, base):
    start = base().unlock()
    start.loader.batch_size = 32
    start.model.heads = 1
    config = recipes.apply(name, start.lock(), 256, events=10_000_000)
    assert config.is_locked and start.model.width != 256
    assert config.model.width == 256 and config.cell.coordinates.to_dict() == {"recipe": name, "width": 256}
    check_config(config)
    assert program(config, 1000, {}, 200_000).model_config.width == 256
    changed = set(difference(start, config)) - {"cell.coordinates", "cell.coordinates.recipe", "cell.coordinates.width"}
    assert changed <= {rule.key for rule in recipes.RECIPES[name].rules}
    assert recipes.apply(name, start, 256, events=10_000_000) == config


def test_square_root_is_the_encoder_axis():
    base = hstu_planted.get_config()
    by_recipe, by_axis = recipes.apply("square_root", base, 128), axes.encoder_width(base, 128)
    assert difference(by_axis, by_recipe) == {"cell.coordinates.recipe": "square_root"}
    assert by_recipe.optim.learning_rate == pytest.approx(1.5e-3)


def test_width_transfer_keeps_the_rate_and_notes_the_shape_it_was_tuned_at():
    base = hstu_planted.get_config()
    config = recipes.apply("width_transfer", base, 128)
    expected = {"optim.parametrisation": "mup", "optim.base_width": 32, "optim.base_embed_dim": 32}
    expected |= {"optim.base_head_dim": 32, "model.width": 128, "model.heads": 4}
    expected |= {"cell.coordinates.recipe": "width_transfer", "cell.coordinates.width": 128}
    assert difference(base, config) == expected
    by_axis = axes.encoder_width(recipes.width_transfer(base), 128)
    assert difference(by_axis, config) == {"cell.coordinates.recipe": "width_transfer"}


def test_the_ladder_follows_its_formulas():
    """2048 * 160 events and 0.00235 at 108e6 parameters; N events of warm-up, 20 N in all."""
    base = batch_of(4)
    config = recipes.apply("olmo_ladder", base, 256, events=1_000_000)
    model = MODELS["hstu"]
    n = model.param_groups(model.Config(**config.model))["dense"]
    events = 2048 * 160 * (n / 108e6) ** (2 / 3)
    assert config.loader.batch_size == round(events / 64)
    assert config.optim.learning_rate == pytest.approx(0.0047 * (n / 108e6) ** (-1 / 3) / 2)
    assert config.optim.warmup == pytest.approx(n / (64 * config.loader.batch_size), abs=0.5)
    assert config.train.epochs == pytest.approx(20 * n / 1_000_000)
    assert (config.optim.schedule, config.optim.decay, config.optim.b2) == ("wsd", 0.1, 0.99)
    assert recipes.Scale(config, base, 256, None).parameters == n


def test_batches_fit_the_mesh():
    base = batch_of(4).unlock()
    base.mesh.update({"data": 4, "accumulate": 2})
    assert recipes.apply("olmo_ladder", base.lock(), 256, events=1_000_000).loader.batch_size % 8 == 0


def test_marin_follows_its_formulas_and_knows_its_limits():
    config = recipes.apply("marin", batch_of(32), 512, events=2048 * 1000)
    assert config.model.depth == round(512 / (64 + 4 * 9 - 9)) == 6
    assert (config.model.heads, config.model.qk_dim) == (4, 128)
    assert config.optim.learning_rate == pytest.approx(0.33 * math.sqrt(32) / 512)
    assert config.optim.b2 == pytest.approx(0.98**0.25)
    assert config.optim.warmup == 100  # of 1,000 steps of 32 rows of 64 events
    with pytest.raises(ValueError, match=r"rate 0.02917 with a batch of 32 rows; it holds for rates of at most 0\.01"):
        recipes.apply("marin", batch_of(32), 64, events=2048 * 1000)
    with pytest.raises(ValueError, match="with a batch of 4 rows"):
        recipes.apply("marin", batch_of(4), 512, events=2048 * 1000)


@pytest.mark.parametrize(
    ("name", "width", "message"),
    [
        ("olmo", 64, r"recipe 'olmo': expected one of \('square_root', 'width_transfer', 'released', 'olmo_ladder'"),
        ("square_root", 100, "width 100 does not divide into 3 heads"),
        ("olmo_ladder", 64, r"counts steps: call apply\(..., events="),
    ],
)
def test_what_a_recipe_cannot_do_is_one_line(name, width, message):
    with pytest.raises(ValueError, match=message):
        recipes.apply(name, hstu_planted.get_config(), width)


def test_recipes_are_frozen_and_say_their_formulas():
    for recipe in recipes.RECIPES.values():
        with pytest.raises(dataclasses.FrozenInstanceError):
            recipe.name = "other"
        text = recipe.text
        assert text.startswith(recipe.name) and recipe.source in text
        assert all(f"{rule.key} = {rule.formula}" in text for rule in recipe.rules)
