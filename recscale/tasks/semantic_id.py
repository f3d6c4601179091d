"""Semantic ids: the next item is generated code by code (TIGER, arXiv 2305.05065) instead of being scored.

An item is Q codes, fixed before training (recscale/semantic_ids/) and kept in a fixed table by item id; the model owns
the embeddings of the codes. The loss of a target is -log p of its whole tuple, the *sum* over the levels of the
cross-entropy among the codes of that level, in nats: public code takes the mean over levels, which differs by a factor.

An encoder-decoder reads the whole history of a target at once, so that each example may have one target only, at its
end (loader.window "prefixes" or "spans"). A decoder-only model is causal and learns every target of a row.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from recscale.layers.code_tokens import History
from recscale.layers.kinds import Table
from recscale.tasks import next_item
from recscale.tasks.next_item import USER_FEATURE, slots

CODES = "semantic_id"  # the table of codes: fixed, one row of Q codes per item


@dataclasses.dataclass(frozen=True)
class Config:
    """What is optimised. label_smoothing: share of a code's probability that goes to all codes of its level alike."""

    label_smoothing: float

    def __post_init__(self):
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ValueError(f"task.label_smoothing = {self.label_smoothing}: expected 0 <= label_smoothing < 1")


class Task(next_item.Task):
    """The task; see tasks/next_item.py for what its methods are for."""

    catalogue = CODES
    generates = True
    ranks_catalogue = False
    needs_frequency = False
    needs_catalogue = False

    def __init__(
        self,
        config: Config,
        num_items: int,
        inputs: tuple[str, ...] = (),
        queries: tuple[str, ...] = (),
        segments: int = 0,
    ):
        super().__init__(config, num_items, inputs, queries, segments)
        wrong = [*(name for name in inputs if not name.startswith(USER_FEATURE)), *queries]
        if wrong:
            raise ValueError(
                f"loader: task 'semantic_id' reads codes of items and features of users (users/NAME) in loader.inputs, "
                f"found {wrong}: leave them out"
            )

    def tables(self, model_config: Any, shape: dict[str, Any]) -> dict[str, Table]:
        """The codes; how large a catalogue is costs nothing else."""
        if shape["kind"] != "full":
            raise ValueError(f"table.kind = {shape['kind']!r}: task 'semantic_id' has no item vectors; expected 'full'")
        return {CODES: Table(self.num_items, model_config.levels, fixed=True)}

    def feature_deviation(self, model_config: Any) -> float:
        """A user token begins like the tokens of codes."""
        return model_config.deviation(1.0)

    def head_flops(self, dim: int) -> float:
        """Counted by the model, whose logits are over the codes of a level."""
        del dim
        return 0.0

    def draw(self, batch: dict[str, jax.Array], key: jax.Array) -> dict[str, jax.Array]:
        """The batch: nothing is drawn."""
        del key
        return batch

    def wanted(self, batch: dict[str, jax.Array]) -> dict[str, tuple[str, jax.Array]]:
        """What a step touches: the codes of the items, and the vectors of users."""
        return {"history": (CODES, batch["item_id"]), "target": (CODES, batch["target"])} | self._described(batch)

    def loss(
        self,
        model,
        rows: dict[str, jax.Array],
        batch: dict[str, jax.Array],
        key: jax.Array | None,
        full_softmax: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
        **how: Any,
    ):
        """Mean over the targets of -log p(tuple), and {"loss", "targets"}."""
        del full_softmax
        nats_BS, slots_BS = self._nats(model, rows, batch, key, self.config.label_smoothing, **how)
        weight_BS = (jnp.take_along_axis(batch["target"], slots_BS, axis=1) > 0).astype(jnp.float32)
        targets = weight_BS.sum()
        loss = (weight_BS * nats_BS).sum() / jnp.maximum(targets, 1.0)
        return loss, {"loss": loss, "targets": targets}

    def history(self, rows: dict[str, jax.Array], batch: dict[str, jax.Array]) -> History:
        """What a generative model reads of a batch. rows: vectors of what `wanted` names."""
        users = [rows[name] for name in self.input_features]
        vector_BLD = functools.reduce(jnp.add, users) if users else None
        return History(_integers(rows["history"]), batch["item_id"] > 0, batch["segment_ids"], vector_BLD)

    def nats(self, model, lookup: Callable[[str, jax.Array], jax.Array], batch: dict[str, jax.Array]) -> jax.Array:
        """[B, L]: -log p of the target's tuple at every position, without dropout; it means something at targets only.

        lookup: (table, ids) -> vectors. Slots are all of the row, or where loader.segments is set its targets.
        """
        nats_BS, slots_BS = self._nats(model, self._looked_up(lookup, batch), batch, None, 0.0)
        rows = jnp.arange(len(slots_BS))[:, None]
        return jnp.zeros(batch["target"].shape).at[rows, slots_BS].set(nats_BS)

    def remember(self, model, lookup: Callable[[str, jax.Array], jax.Array], batch: dict[str, jax.Array]) -> Any:
        """The model's memory of the history of every row, which holds one example each, from the left."""
        return model.remember(self.history(self._looked_up(lookup, batch), batch))

    def _looked_up(self, lookup, batch) -> dict[str, jax.Array]:
        return {name: lookup(*owned) for name, owned in self.wanted(batch).items()}

    def _nats(self, model, rows, batch, key, smoothing: float, **how) -> tuple[jax.Array, jax.Array]:
        slots_BS = slots(batch["target"], self.segments)
        next_BLQ = self._next(_integers(rows["history"]), _integers(rows["target"]), batch)
        logits_BSQK = model(self.history(rows, batch), next_BLQ, slots_BS, key, **how)
        wanted_BSQ = jnp.take_along_axis(next_BLQ, slots_BS[:, :, None], axis=1)
        log_p_BSQK = jax.nn.log_softmax(logits_BSQK.astype(jnp.float32), axis=-1)
        log_p_BSQ = jnp.take_along_axis(log_p_BSQK, wanted_BSQ[..., None], axis=-1)[..., 0]
        if smoothing:
            log_p_BSQ = (1.0 - smoothing) * log_p_BSQ + smoothing * log_p_BSQK.mean(axis=-1)
        return -log_p_BSQ.sum(axis=-1), slots_BS

    @staticmethod
    def _next(history_BLQ: jax.Array, target_BLQ: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
        """Codes of the event after every slot: the target, or the row's next item, where that is history too."""
        segment_BL = batch["segment_ids"]
        after_BLQ = jnp.pad(history_BLQ[:, 1:], ((0, 0), (0, 1), (0, 0)))
        same_BL = jnp.pad(segment_BL[:, 1:] == segment_BL[:, :-1], ((0, 0), (0, 1)))
        after_BLQ = jnp.where(same_BL[..., None], after_BLQ, 0)
        return jnp.where(batch["target"][..., None] > 0, target_BLQ, after_BLQ)


def _integers(codes: jax.Array) -> jax.Array:
    """Codes as the fixed table stores them, in floats that hold them exactly."""
    return jax.lax.stop_gradient(codes).astype(jnp.int32)
