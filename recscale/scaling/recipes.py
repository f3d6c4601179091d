"""Named recipes: numbers that follow from other numbers, each with its formula and where it comes from.

A recipe is a frozen table of rules. `apply("marin", config, width=256, events=10**7)` works through it: each rule sets
one key of the config from what is set already. A recipe never changes once a study has used it; another rule gets
another name.
"""

import dataclasses
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from recscale.models import MODELS

HEAD_WIDTH = 32


def heads(width: int) -> int:
    """Heads of width 32, at least one: max(1, width // 32). HSTU's released shapes use 25 to 64."""
    return max(1, width // HEAD_WIDTH)


def learning_rate(base: float, base_width: int, width: int) -> float:
    """base * sqrt(base_width / width): Adam's learning rate falls with width, more gently than muP's 1 / width.

    A choice, not a law: the square root keeps small models fast and large ones stable over one decade of width.
    """
    return base * (base_width / width) ** 0.5


def head_dim(config: ConfigDict) -> int:
    """Width of the queries of one head of the config's model."""
    return config.model.qk_dim if "qk_dim" in config.model else config.model.width // config.model.heads


ARGUS = {
    "nano": (2, 64),
    "micro": (3, 128),
    "mini": (4, 256),
    "small": (6, 512),
    "medium": (10, 1024),
    "large": (20, 2048),
}
"""Dial of the ARGUS encoder -> (depth, width): 12 depth width^2 parameters. From mini on arXiv 2507.15994 (3.2 M, small
unpublished, 126 M, 1 B); below it ours, each half as wide."""


def argus(base: ConfigDict, size: str) -> ConfigDict:
    """A locked copy of the config with the encoder of this size: depth, width, heads, and learning rate by sqrt rule.

    Raises ValueError for a size that is not in ARGUS.
    """
    if size not in ARGUS:
        raise ValueError(f"size {size!r}: expected one of {tuple(ARGUS)}")
    config = base.copy_and_resolve_references().unlock()
    depth, width = ARGUS[size]
    if config.optim.parametrisation == "sp":
        config.optim.learning_rate = learning_rate(base.optim.learning_rate, base.model.width, width)
    config.model.update({"depth": depth, "width": width, "heads": heads(width)})
    return config.lock()


def width_transfer(config: ConfigDict) -> ConfigDict:
    """A locked copy of the config whose own shape is the base of width transfer (layers/width_transfer.py).

    At its own width it trains as before; after a change of width it keeps its learning rate.
    """
    config = config.copy_and_resolve_references().unlock()
    config.optim.update(
        {
            "parametrisation": "mup",
            "base_width": config.model.width,
            "base_embed_dim": config.model.embed_dim,
            "base_head_dim": head_dim(config),
        }
    )
    return config.lock()


@dataclasses.dataclass(frozen=True)
class Scale:
    """What a rule reads: the config as far as it is set, the one that the recipe is applied to, events of an epoch."""

    config: ConfigDict
    base: ConfigDict
    width: int
    events: int | None

    @property
    def parameters(self) -> int:
        """N: dense parameters of the model, without tables and positions."""
        model: ModuleType = MODELS[self.config.model_name]
        return model.param_groups(model.Config(**self.config.model))["dense"]

    @property
    def row_tokens(self) -> int:
        """Events that a row of the batch holds."""
        return self.config.loader.row_length or self.config.loader.length

    @property
    def rows(self) -> int:
        """B: rows of a batch."""
        return self.config.loader.batch_size

    @property
    def batch_tokens(self) -> int:
        """Events of a full batch."""
        return self.rows * self.row_tokens

    @property
    def steps(self) -> int:
        """Steps of the whole run, rows taken to be full."""
        return max(1, round(self.config.train.epochs * self.events_per_epoch / self.batch_tokens))

    @property
    def events_per_epoch(self) -> int:
        """Training events of an epoch; raises ValueError where `apply` was not told."""
        if self.events is None:
            raise ValueError("this recipe counts steps: call apply(..., events=training events of an epoch)")
        return self.events


@dataclasses.dataclass(frozen=True)
class Rule:
    """key: of the config, skipped where the config's model has none; formula: for readers; value: what computes it."""

    key: str
    formula: str
    value: Callable[[Scale], Any]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A frozen recipe. `rules` in the order in which they are applied; `limits` raises ValueError beyond its range."""

    name: str
    source: str
    rules: tuple[Rule, ...]
    limits: Callable[[Scale], None] = lambda scale: None

    @property
    def text(self) -> str:
        """The recipe as lines "key = formula"."""
        return "\n".join([f"{self.name} ({self.source})", *(f"  {rule.key} = {rule.formula}" for rule in self.rules)])


def apply(name: str, base: ConfigDict, width: int, events: int | None = None) -> ConfigDict:
    """A locked copy of `base` at this width by a recipe, noted in cell.coordinates as `recipe` and `width`.

    events: training events of an epoch, for recipes that count steps. Raises ValueError for an unknown recipe, a width
    that the heads do not divide, and beyond the limits of the recipe.
    """
    if name not in RECIPES:
        raise ValueError(f"recipe {name!r}: expected one of {tuple(RECIPES)}")
    config = base.copy_and_resolve_references().unlock()
    scale = Scale(config, base, width, events)
    for rule in RECIPES[name].rules:
        section, key = rule.key.split(".")
        if key in config[section]:
            config[section][key] = rule.value(scale)
    if width % config.model.heads:
        raise ValueError(f"width {width} does not divide into {config.model.heads} heads: choose a multiple of them")
    RECIPES[name].limits(scale)
    config.cell.coordinates.update({"recipe": name, "width": width})
    return config.lock()


def _batch_rows(tokens: float, scale: Scale) -> int:
    """Rows that hold about so many events; a multiple of what the mesh divides a batch into."""
    mesh = scale.config.mesh
    parts = mesh.replica * mesh.data * mesh.model * mesh.accumulate
    return parts * max(1, round(tokens / scale.row_tokens / parts))


def _constant(key: str, value: Any) -> Rule:
    return Rule(key, repr(value), lambda scale: value)


WIDTH = Rule("model.width", "width", lambda s: s.width)
HEADS = Rule("model.heads", "max(1, width // 32)", lambda s: heads(s.width))
HEAD_DIMS = tuple(Rule(f"model.{key}", "width // heads", lambda s: s.width // s.config.model.heads)
                  for key in ("qk_dim", "v_dim"))  # fmt: skip
FFN = Rule(
    "model.ffn", "ffn of the base x width / its width", lambda s: s.base.model.ffn * s.width // s.base.model.width
)
SHAPE = (WIDTH, HEADS, *HEAD_DIMS, FFN)


def _marin_depth(scale: Scale) -> int:
    return max(1, round(scale.width / (64 + 4 * math.log2(scale.width) - 9)))


def _marin_limits(scale: Scale) -> None:
    rate = scale.config.optim.learning_rate
    if rate > 0.01 or scale.rows < 8:
        raise ValueError(
            f"recipe 'marin': rate {rate:.4g} with a batch of {scale.rows} rows; it holds for rates of at most "
            "0.01 and batches of at least 8 rows: change the width or loader.batch_size"
        )


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "square_root",
            "a choice of this project, used by the encoder axis and study 0001",
            (
                *SHAPE,
                Rule(
                    "optim.learning_rate",
                    "rate of the base x sqrt(its width / width)",
                    lambda s: learning_rate(s.base.optim.learning_rate, s.base.model.width, s.width),
                ),
            ),
        ),
        Recipe(
            "width_transfer",
            "arXiv 2203.03466: muP for Adam; the learning rate stays that of the base",
            (
                _constant("optim.parametrisation", "mup"),
                Rule("optim.base_width", "width of the base", lambda s: s.base.model.width),
                Rule("optim.base_embed_dim", "embed_dim of the base", lambda s: s.base.model.embed_dim),
                Rule("optim.base_head_dim", "query width of a head of the base", lambda s: head_dim(s.base)),
                *SHAPE,
            ),
        ),
        Recipe(
            "released",
            "the public runs of HSTU and SASRec (arXiv 2402.17152 and its code): one rate at every width",
            (
                WIDTH,
                *HEAD_DIMS,
                FFN,
                _constant("optim.learning_rate", 1e-3),
                _constant("optim.b2", 0.98),
                _constant("optim.weight_decay", 0.0),
                _constant("optim.warmup", 0),
            ),
        ),
        Recipe(
            "olmo_ladder",
            "OLMo-core's ladder after arXiv 2406.19146; N dense parameters; constants fitted to language models",
            (
                *SHAPE,
                Rule(
                    "loader.batch_size",
                    "2048 * 160 * (N / 108e6)^(2/3) events, in rows",
                    lambda s: _batch_rows(2048 * 160 * (s.parameters / 108e6) ** (2 / 3), s),
                ),
                Rule(
                    "optim.learning_rate",
                    "0.0047 * (N / 108e6)^(-1/3) / 2",
                    lambda s: 0.0047 * (s.parameters / 108e6) ** (-1 / 3) / 2,
                ),
                Rule("optim.b2", "0.95 from batches of 524288 events on, else 0.99",
                     lambda s: 0.95 if s.batch_tokens >= 524_288 else 0.99),
                _constant("optim.weight_decay", 0.1),
                Rule("optim.warmup", "N events", lambda s: round(s.parameters / s.batch_tokens)),
                _constant("optim.schedule", "wsd"),
                _constant("optim.decay", 0.1),
                Rule("train.epochs", "20 N events", lambda s: 20 * s.parameters / s.events_per_epoch),
            ),
        ),
        Recipe(
            "marin",
            "marin's 2025 recipe (Apache-2.0 source); B rows; constants fitted to language models",
            (
                WIDTH,
                Rule("model.depth", "round(width / (64 + 4 log2(width) - 9)), at least 1", _marin_depth),
                Rule("model.heads", "max(1, width // 128)", lambda s: max(1, s.width // 128)),
                *HEAD_DIMS,
                Rule("model.ffn", "4 width", lambda s: 4 * s.width),
                Rule("optim.learning_rate", "0.33 sqrt(B) / width", lambda s: 0.33 * math.sqrt(s.rows) / s.width),
                Rule("optim.b2", "0.98^(B / 128)", lambda s: 0.98 ** (s.rows / 128)),
                _constant("optim.b1", 0.95),
                _constant("optim.weight_decay", 0.1),
                _constant("optim.schedule", "wsd"),
                _constant("optim.decay", 0.2),
                Rule("optim.warmup", "a tenth of the steps", lambda s: round(0.1 * s.steps)),
            ),
            _marin_limits,
        ),
    )
}  # fmt: skip
