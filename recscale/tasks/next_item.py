"""Next item: full and sampled softmax, BCE and gBCE over the user's next event.

Names: s+ is the score of the true next item, s- of a negative. `draw` adds the negatives to a batch, `wanted` says
which ids a step touches; `loss` sees only their vectors. Sources: sampled softmax with cosine scores arXiv 2402.17152;
gBCE arXiv 2308.07192; the corrected logQ loss arXiv 2507.09331.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from recscale.layers.kinds import Table
from recscale.layers.norms import l2_normalize
from recscale.layers.ranking import dot_products

MASKED = -5e4  # score of a negative that equals the target, as in the HSTU reference
FREQUENCY = "item_frequency"  # a table that is never trained
SAMPLERS = {"uniform": 1.0, "in_batch": 0.0, "mixed": 0.5}  # share of uniform draws
SHARED = ("token", "row", "batch")
LOGQ = ("none", "standard", "corrected")
SIMILARITIES = ("dot", "cosine")
USER_FEATURE, ITEM_FEATURE = "users/", "items/"  # what names of features of users and items begin with
QUERY, LABEL = "query_", "label_"  # what the keys of features of the next event, and of its feedback, begin with


@dataclasses.dataclass(frozen=True)
class Config:
    """What is optimised.

    loss: "full", "sampled", "bce" or "gbce". negatives: N draws, for every token, row or batch (`shared`). sampler:
    "uniform" over the catalogue, "in_batch" (the batch's own targets) or "mixed" (half and half). logq: "none",
    "standard" (log Q subtracted from every score) or "corrected" (arXiv 2507.09331). similarity and temperature: score
    = <query, item> / temperature, "cosine" normalises both. gbce_t: calibration t of gBCE.
    """

    loss: str
    negatives: int
    sampler: str
    shared: str
    logq: str
    similarity: str
    temperature: float
    gbce_t: float

    def __post_init__(self):
        allowed = {"loss": LOSSES, "sampler": SAMPLERS, "shared": SHARED, "logq": LOGQ, "similarity": SIMILARITIES}
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(f"task.{name} = {getattr(self, name)!r}: expected one of {tuple(values)}")
        if self.loss != "full" and self.negatives < 1:
            raise ValueError(f"task.negatives = {self.negatives}: loss {self.loss!r} needs at least one negative")
        if self.temperature <= 0:
            raise ValueError(f"task.temperature = {self.temperature}: expected a positive number")


def sampled_softmax(positive_BL, negative_BLN):
    """Cross-entropy over the target and its negatives; masked negatives carry a very low score."""
    return jnp.logaddexp(positive_BL, jax.nn.logsumexp(negative_BLN, axis=-1)) - positive_BL


def bce(positive_BL, negative_BLN, beta=1.0):
    """-(beta log sigma(s+) + sum log(1 - sigma(s-))) / (N + 1). beta < 1 gives gBCE (arXiv 2308.07192)."""
    total = beta * jax.nn.log_sigmoid(positive_BL) + jax.nn.log_sigmoid(-negative_BLN).sum(axis=-1)
    return -total / (negative_BLN.shape[-1] + 1)


def gbce_beta(negatives: int, num_items: int, t: float) -> float:
    """Exponent of the positive probability in gBCE: 1 - t (1 - alpha), alpha = negatives / (num_items - 1)."""
    return 1.0 - t * (1.0 - negatives / (num_items - 1))


def corrected_softmax(positive_BL, negative_BLN, log_q_BLN, valid_BLN):
    """Sampled softmax with the corrected logQ (arXiv 2507.09331): the positive is not in the denominator.

    negative: raw scores; log_q: log Q'(j) = log(Q(j) / (1 - Q(target))); valid: negatives that differ from the target.
    """
    shifted = jnp.where(valid_BLN, negative_BLN - log_q_BLN, MASKED)
    denominator = jax.nn.logsumexp(shifted, axis=-1)
    log_n = jnp.log(jnp.maximum(valid_BLN.sum(axis=-1), 1))
    weight = 1.0 - jax.nn.sigmoid(positive_BL - (denominator - log_n))
    return jax.lax.stop_gradient(weight) * (denominator - positive_BL)


def slots(target_BL: jax.Array, segments: int) -> jax.Array:
    """Positions of the targets of every row [B, S], and any others after them; segments = 0: all positions."""
    length = target_BL.shape[1]
    if segments == 0 or segments >= length:
        return jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), target_BL.shape)
    return jnp.argsort(target_BL == 0, axis=1, stable=True)[:, :segments].astype(jnp.int32)


LOSSES = ("full", "sampled", "bce", "gbce")


class Task:
    """The task: which ids a step needs, its loss, and how it scores the catalogue."""

    catalogue = "item"  # the table whose ids are ranked

    tokens_per_event = 1
    inside = ""  # where in the trained network the encoder is
    heads: tuple[Any, ...] = ()  # feedback that is predicted too; see tasks/feedback.py
    ranks_catalogue = True
    generates = False  # whether an item is generated code by code instead; see tasks/semantic_id.py
    denoises = False  # whether its vector is; see tasks/denoising.py

    def __init__(
        self,
        config: Any,
        num_items: int,
        inputs: tuple[str, ...] = (),
        queries: tuple[str, ...] = (),
        segments: int = 0,
    ):
        """inputs: features of past events, queries: of the event to predict, each with a small table of that name.

        segments: the most examples in a row of a batch, 0 = as many as fit.
        """
        self.config = config
        self.num_items = num_items
        self.input_features, self.query_features = inputs, queries
        self.segments = segments

    def tables(self, model_config: Any, shape: dict[str, Any]) -> dict[str, Table]:
        """Tables by item id: the catalogue's, of config.table's kind and sizes `shape`, and the frequencies."""
        found = {self.catalogue: Table(self.num_items, model_config.embed_dim, **shape)}
        return found | ({FREQUENCY: Table(self.num_items, 1, fixed=True)} if self.needs_frequency else {})

    @property
    def features(self) -> tuple[str, ...]:
        """Names of the features that are embedded."""
        return tuple(dict.fromkeys((*self.input_features, *self.query_features)))

    @property
    def prefix(self) -> int:
        """Positions that an encoder finds before the first event of a user: one per feature of users and token."""
        return self.tokens_per_event * sum(name.startswith(USER_FEATURE) for name in self.input_features)

    @property
    def columns(self) -> dict[str, tuple[str, ...]]:
        """What a loader has to read: its arguments inputs, queries and labels."""
        return {"inputs": self.input_features, "queries": self.query_features, "labels": ()}

    def feature_deviation(self, model_config: Any) -> float:
        """Standard deviation of the vectors of features at the start."""
        del model_config
        return 0.02

    def join(self, model: Any, dim: int, key: jax.Array) -> Any:
        """The trained network of this task around an encoder; next item adds nothing to it."""
        del dim, key
        return model

    def head_parameters(self, dim: int) -> int:
        """Parameters that `join` adds."""
        del dim
        return 0

    def head_flops(self, dim: int) -> float:
        """Forward FLOPs of the loss per target: its scores."""
        return 2.0 * dim * (self.num_items if self.needs_catalogue else 1 + self.config.negatives)

    def ranking_flops(self, dim: int) -> float:
        """Forward FLOPs of scoring every item of the catalogue for one user, from the encoder's state on."""
        return 2.0 * dim * self.num_items

    @property
    def needs_frequency(self) -> bool:
        """Whether the tables must hold FREQUENCY: [V + 1, 1], each item's share of the training events."""
        return self.config.logq != "none" and self.config.sampler != "uniform"

    @property
    def needs_catalogue(self) -> bool:
        """Whether the loss scores every item of the catalogue."""
        return self.config.loss == "full"

    def draw(self, batch: dict[str, jax.Array], key: jax.Array) -> dict[str, jax.Array]:
        """The batch with `negative`, item ids [B, L, N], [B, N] or [N] by `shared`; the same for the same key."""
        c = self.config
        if c.loss == "full":
            return batch
        B, L = batch["target"].shape
        shape = {"token": (B, L, c.negatives), "row": (B, c.negatives), "batch": (c.negatives,)}[c.shared]
        uniform_key, batch_key = jax.random.split(key)
        uniform = jax.random.randint(uniform_key, shape, 1, self.num_items + 1)
        share = SAMPLERS[c.sampler]
        if share == 1.0:
            return batch | {"negative": uniform}
        target = batch["target"].reshape(-1)
        order = jnp.argsort(target == 0, stable=True)  # targets first, padding after them
        count = jnp.maximum((target > 0).sum(), 1)
        drawn = target[order][jnp.floor(jax.random.uniform(batch_key, shape) * count).astype(jnp.int32)]
        if share > 0.0:
            drawn = jnp.where(jnp.arange(c.negatives) < round(share * c.negatives), uniform, drawn)
        return batch | {"negative": drawn}

    def wanted(self, batch: dict[str, jax.Array]) -> dict[str, tuple[str, jax.Array]]:
        """What a step touches: name -> (table, ids); batch as `draw` returns it."""
        ids = {"history": (self.catalogue, batch["item_id"])} | self._described(batch)
        if self.config.loss == "full":
            return ids
        ids |= {"target": (self.catalogue, batch["target"]), "negative": (self.catalogue, batch["negative"])}
        if self.needs_frequency:
            ids["target_frequency"] = (FREQUENCY, batch["target"])
            ids["negative_frequency"] = (FREQUENCY, batch["negative"])
        return ids

    def loss(
        self,
        model,
        rows: dict[str, jax.Array],
        batch: dict[str, jax.Array],
        key: jax.Array,
        full_softmax: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
        **how: Any,
    ):
        """Mean loss over the supervised positions, in nats for the softmax losses, and {"loss", "targets"}.

        rows: vectors of what `wanted` names, same names. key: dropout. full_softmax: (queries [T, D], target ids [T],
        0 = none) -> -log p [T] over the catalogue; needed by loss "full". how: passed on to the model.
        """
        query_BLD = self._query(model, rows, batch, key, **how)
        weight_BL = (batch["target"] > 0).astype(jnp.float32)
        loss_BL = self._next_item(query_BLD, rows, batch, full_softmax)
        targets = weight_BL.sum()
        loss = (weight_BL * loss_BL).sum() / jnp.maximum(targets, 1.0)
        return loss, {"loss": loss, "targets": targets}

    def _next_item(self, query_BLD, rows, batch, full_softmax):
        """The loss [B, L] at every position, in nats for the softmax losses."""
        if self.config.loss == "full":
            assert full_softmax is not None
            flat = query_BLD.reshape(-1, query_BLD.shape[-1])
            return full_softmax(flat, batch["target"].reshape(-1)).reshape(batch["target"].shape)
        return self._sampled(query_BLD, rows, batch)

    def queries(self, model, lookup: Callable[[str, jax.Array], jax.Array], batch: dict[str, jax.Array]) -> jax.Array:
        """[B, L, D]: score of item v at a position = <query, item(vector of v)>; no dropout.

        lookup: (table, ids) -> vectors.
        """
        rows = {"history": lookup(self.catalogue, batch["item_id"])}
        rows |= {name: lookup(*owned) for name, owned in self._described(batch).items()}
        return self._query(model, rows, batch, None)

    def predict(self, model, lookup: Callable[[str, jax.Array], jax.Array], batch: dict) -> dict[str, jax.Array]:
        """Column of each head -> prediction float32 [B, L] of the event after each input; here there is no head."""
        del model, lookup, batch
        return {}

    def graded(self, column: str, label: Any) -> Any:
        """Labels as predictions of this column are compared with: here as they are."""
        del column
        return label

    def item(self, vectors: jax.Array) -> jax.Array:
        """Vectors [..., D] of the item table, as they are scored against."""
        return l2_normalize(vectors) if self.config.similarity == "cosine" else vectors

    def scores(self, query_QD: jax.Array, item_ND: jax.Array) -> jax.Array:
        """Scores [Q, N] of queries against what `item` gives."""
        return dot_products(query_QD, item_ND)

    def _described(self, batch) -> dict[str, tuple[str, jax.Array]]:
        """The features of a batch: key -> (table, ids)."""
        found = {name: (name, batch[name]) for name in self.input_features}
        return found | {QUERY + name: (name, batch[QUERY + name]) for name in self.query_features}

    def _query(self, model, rows, batch, key, **how):
        x = rows["history"]
        for name in self._described(batch):
            x = x + rows[name]
        return self._scaled(model(x, batch, key, **how))

    def _scaled(self, query):
        query = l2_normalize(query) if self.config.similarity == "cosine" else query
        return query / self.config.temperature

    def _sampled(self, query_BLD, rows, batch):
        c = self.config
        positive = jnp.einsum("bld,bld->bl", query_BLD, self.item(rows["target"]))
        pattern = {"token": "bld,blnd->bln", "row": "bld,bnd->bln", "batch": "bld,nd->bln"}[c.shared]
        negative = jnp.einsum(pattern, query_BLD, self.item(rows["negative"]))
        ids = batch["negative"]
        ids = {"token": ids, "row": ids[:, None] if ids.ndim == 2 else ids, "batch": ids.reshape(1, 1, -1)}[c.shared]
        valid = ids != batch["target"][:, :, None]
        if c.loss in ("bce", "gbce"):
            beta = 1.0 if c.loss == "bce" else gbce_beta(c.negatives, self.num_items, c.gbce_t)
            return bce(positive, negative, beta)
        if c.logq == "none":
            return sampled_softmax(positive, jnp.where(valid, negative, MASKED))
        q_target = self._proposal(rows.get("target_frequency"), batch["target"])
        q = self._proposal(rows.get("negative_frequency"), ids).reshape(ids.shape)
        if c.logq == "standard":
            shifted = jnp.where(valid, negative - jnp.log(q), MASKED)
            return sampled_softmax(positive - jnp.log(q_target), shifted)
        log_q = jnp.log(q) - jnp.log1p(-jnp.minimum(q_target, 0.999))[:, :, None]
        return corrected_softmax(positive, negative, log_q, valid)

    def _proposal(self, frequency, ids):
        """Probability that a draw is this item by the sampler's mixture: in-batch draws follow the training counts."""
        share = SAMPLERS[self.config.sampler]
        if share == 1.0:
            return jnp.full(ids.shape, 1.0 / self.num_items)
        frequency = jax.lax.stop_gradient(frequency[..., 0])
        return jnp.maximum(share / self.num_items + (1.0 - share) * frequency, 1e-10)
