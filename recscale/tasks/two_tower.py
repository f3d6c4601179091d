"""Two towers, fine-tuned on impressions: a user vector that is computed with a lag, an item vector, their product.

The user vector is W h of the newest event that is older than the request by at least the lag (loader.lag; ARGUS,
arXiv 2507.15994: "offline or near-line"), so that a request is ranked without anything of itself. The item tower is
the item's embedding. The loss is pairwise: of two impressions of one request with different labels, the better one
should have the higher score, -log sigma(s+ - s-), a mean over the pairs. Pairs are sought at most `reach` events apart.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from recscale.layers.heads import Head, Ranker, head_parameters
from recscale.layers.norms import l2_normalize
from recscale.tasks import next_item
from recscale.tasks.feedback import newest_known
from recscale.tasks.next_item import LABEL, QUERY

CANDIDATE = QUERY + "item_id"
PROJECTION = (1, 0, (), 0)  # query_parts, feedback_parts, outputs and hidden of a Head


@dataclasses.dataclass(frozen=True)
class Config:
    """What is optimised.

    label: column of feedback, larger is better. reach: how many events apart a pair may be. similarity and
    temperature: as in tasks/next_item.py.
    """

    label: str
    reach: int
    similarity: str
    temperature: float

    def __post_init__(self):
        if not self.label or self.reach < 1 or self.temperature <= 0:
            raise ValueError(
                f"task.label = {self.label!r}, reach = {self.reach}, temperature = {self.temperature}: expected a "
                "column, a reach of at least 1 and a positive temperature"
            )
        if self.similarity not in next_item.SIMILARITIES:
            raise ValueError(f"task.similarity = {self.similarity!r}: expected one of {next_item.SIMILARITIES}")


class Task(next_item.Task):
    """The task; see tasks/next_item.py for what its methods are for."""

    inside = "encoder."
    ranks_catalogue = False
    needs_frequency = False
    needs_catalogue = False

    @property
    def heads(self) -> tuple[tuple[str, str], ...]:  # type: ignore[override]
        """The score, which orders and is no probability."""
        return ((self.config.label, "score"),)

    @property
    def columns(self) -> dict[str, tuple[str, ...]]:
        """What a loader has to read."""
        return {
            "inputs": self.input_features,
            "queries": ("item_id", *self.query_features),
            "labels": (self.config.label,),
        }

    def join(self, model: Any, dim: int, key: jax.Array) -> Any:
        """The encoder with the projection of the user tower."""
        return Ranker(model, Head(dim, *PROJECTION, key=key))

    def head_parameters(self, dim: int) -> int:
        """Parameters of that projection."""
        return head_parameters(dim, *PROJECTION)

    def head_flops(self, dim: int) -> float:
        """Forward FLOPs of the loss per target: projection and score."""
        return 2.0 * (dim * dim + dim)

    def draw(self, batch: dict[str, jax.Array], key: jax.Array) -> dict[str, jax.Array]:
        """The batch as it is: nothing is sampled."""
        del key
        return batch

    def wanted(self, batch: dict[str, jax.Array]) -> dict[str, tuple[str, jax.Array]]:
        """What a step touches: name -> (table, ids)."""
        found = {"history": (self.catalogue, batch["item_id"]), "candidate": (self.catalogue, batch[CANDIDATE])}
        return found | {name: (name, batch[name]) for name in self.input_features}

    def loss(self, model, rows, batch, key, full_softmax=None, **how):
        """Mean over the pairs of the batch, and {"loss", "targets"}, of which there are as many as pairs."""
        del full_softmax
        score_BL = self._scores(model, rows, batch, key, **how)
        label_BL = batch[LABEL + self.config.label]
        supervised_BL = (batch["target"] > 0) & (batch["lagged"] > 0)
        total, pairs = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32)
        for step in range(1, min(self.config.reach, score_BL.shape[1] - 1) + 1):
            earlier, later = slice(None, -step), slice(step, None)
            same = batch["request"][:, earlier] == batch["request"][:, later]
            same &= batch["segment_ids"][:, earlier] == batch["segment_ids"][:, later]
            same &= supervised_BL[:, earlier] & supervised_BL[:, later]
            better = jnp.sign(label_BL[:, earlier] - label_BL[:, later])
            weight = same * jnp.abs(better)
            margin = better * (score_BL[:, earlier] - score_BL[:, later])
            total += (weight * jnp.logaddexp(0.0, -margin)).sum()
            pairs += weight.sum()
        loss = total / jnp.maximum(pairs, 1.0)
        return loss, {"loss": loss, "targets": pairs}

    def predict(self, model, lookup: Callable[[str, jax.Array], jax.Array], batch: dict) -> dict[str, jax.Array]:
        """{label: score float32 [B, L]} of the event after each input, were `query_item_id` its item; no dropout."""
        rows = {name: lookup(*owned) for name, owned in self.wanted(batch).items()}
        return {self.config.label: self._scores(model, rows, batch, None)}

    def _scores(self, model, rows, batch, key, **how):
        x = sum((rows[name] for name in self.input_features), rows["history"])
        user_BLD = model.head.query(newest_known(model(x, batch, key, **how), batch))
        user_BLD = l2_normalize(user_BLD) if self.config.similarity == "cosine" else user_BLD
        score = jnp.einsum("bld,bld->bl", user_BLD, self.item(rows["candidate"]))
        return (score / self.config.temperature).astype(jnp.float32)
