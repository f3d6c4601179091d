"""Next item and feedback in one pass over the history: the pre-training of ARGUS, and ranking as HSTU does it.

At every event two things are learnt of the next one: which item it is, p(x' | history, c'), and what the user will make
of it, p(f' | history, c', x'), where c' is the context of the next event (known before its item is chosen), x' its item
and f' its feedback. How a history becomes tokens is the form:

* "collapsed": one token per event, the sum of item, context and feedback vectors. The query of the next item is
  W [h ; c'], the feedback comes from an MLP of [h ; x' ; h * x' ; c'];
* "interleaved" (HSTU, arXiv 2402.17152): two, the feedback of the event and the item that comes next, so that the
  encoder attends from the candidate. Item read at the first (with c'), feedback at the second;
* "literal" (ARGUS, arXiv 2507.15994): three, feedback, next context, next item; read at the second and the third.

With loader.request_gap the feedback of a collapsed history is read from the user's state before the request, at least
loader.lag seconds old, in place of the newest one. Only then may impressions of one request be compared with each
other: a state that has seen the answers to the earlier ones orders them by itself.

The first token of a history also holds its first item, which no other token does. A step therefore never sees more of
the next event than its own arguments: tests/tasks/test_feedback.py takes the gradients.

The loss is `next_item` times that of tasks/next_item.py plus the sum of the feedback losses, each a mean over targets.
Departure: the product h * x' in the collapsed form is ours (the production head of HSTU multiplies user and item).
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from recscale.layers.heads import Head, Ranker, head_parameters
from recscale.tasks import next_item
from recscale.tasks.next_item import ITEM_FEATURE, LABEL, QUERY

TOKENS = {"collapsed": 1, "interleaved": 2, "literal": 3}
CANDIDATE = QUERY + "item_id"


@dataclasses.dataclass(frozen=True)
class Config(next_item.Config):
    """What is optimised: the next item as in tasks/next_item.py, and feedback.

    next_item: weight of that loss (0: ranking only). heads: pairs (column of feedback, kind), kind one of KINDS. edges:
    what an ordinal head cuts its value at, ascending. form: one of TOKENS. hidden: width of the feedback MLPs.
    """

    next_item: float
    heads: tuple[tuple[str, str], ...]
    edges: tuple[float, ...]
    form: str
    hidden: int

    def __post_init__(self):
        super().__post_init__()
        if self.form not in TOKENS:
            raise ValueError(f"task.form = {self.form!r}: expected one of {tuple(TOKENS)}")
        if self.next_item < 0 or self.hidden < 1 or (not self.next_item and not self.heads):
            raise ValueError(
                f"task.next_item = {self.next_item}, hidden = {self.hidden}, heads = {self.heads}: expected a "
                "weight of at least 0, a positive width, and something to learn"
            )
        if not all(isinstance(head, tuple | list) and len(head) == 2 for head in self.heads):
            raise ValueError(f"task.heads = {self.heads!r}: expected pairs (column of feedback, one of {tuple(KINDS)})")
        for column, kind in self.heads:
            if kind not in KINDS:
                raise ValueError(f"task.heads: {column!r} is {kind!r}: expected one of {tuple(KINDS)}")
        if len({column for column, _ in self.heads}) < len(self.heads):
            raise ValueError(f"task.heads = {self.heads}: a column may have one head")
        if not (np.diff(self.edges) > 0).all() or (not self.edges and any(kind == "ordinal" for _, kind in self.heads)):
            raise ValueError(f"task.edges = {self.edges}: an ordinal head needs ascending edges")


class Kind(NamedTuple):
    """A kind of feedback: how many logits, its loss [B, L] of logits [B, L, O] and label [B, L], its prediction.

    grade: what a label is compared with the prediction as.
    """

    outputs: Callable[[tuple[float, ...]], int]
    loss: Callable[[jax.Array, jax.Array, tuple[float, ...]], jax.Array]
    predict: Callable[[jax.Array, tuple[float, ...]], jax.Array]
    grade: Callable[[Any, tuple[float, ...]], Any] = lambda label, edges: label


def _binary_loss(logits, label, edges):
    del edges
    return jnp.logaddexp(0.0, logits[..., 0]) - label * logits[..., 0]


def _ordinal_loss(logits, label, edges):
    """Cross-entropy of each question "is it above this edge?", summed."""
    above = (label[..., None] > jnp.asarray(edges)[None, None]).astype(jnp.float32)
    logits = logits[..., : len(edges)]
    return (jnp.logaddexp(0.0, logits) - above * logits).sum(axis=-1)


def _regression_loss(logits, label, edges):
    """Half the squared error of log(1 + value): watch times and ratios have long tails."""
    del edges
    return 0.5 * jnp.square(logits[..., 0] - jnp.log1p(label))


KINDS: dict[str, Kind] = {
    "binary": Kind(lambda e: 1, _binary_loss, lambda x, e: jax.nn.sigmoid(x[..., 0])),
    "ordinal": Kind(
        len,
        _ordinal_loss,
        lambda x, e: jax.nn.sigmoid(x[..., : len(e)]).sum(axis=-1),
        lambda label, e: np.searchsorted(np.asarray(e), label, side="left").astype(np.float64),
    ),
    "regression": Kind(lambda e: 1, _regression_loss, lambda x, e: jnp.expm1(x[..., 0])),
}


def newest_known(hidden_BLD: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
    """For every position the state [B, L, D] at the slot `lagged` of the batch, 0 without one; without lag the same."""
    if "lagged" not in batch:
        return hidden_BLD
    found = jnp.take_along_axis(hidden_BLD, jnp.maximum(batch["lagged"] - 1, 0)[:, :, None], axis=1)
    return jnp.where((batch["lagged"] > 0)[:, :, None], found, 0.0)


class Task(next_item.Task):
    """The task: as tasks/next_item.py has it, and `predict` for the feedback."""

    inside = "encoder."

    def __init__(
        self,
        config: Config,
        num_items: int,
        inputs: tuple[str, ...] = (),
        queries: tuple[str, ...] = (),
        segments: int = 0,
    ):
        """inputs: features of past events (feedback, contexts, items/NAME) and of users; queries: of the next event.

        A feature of an item describes candidates too. Raises ValueError for a form that has nothing to tell.
        """
        super().__init__(config, num_items, inputs, queries, segments)
        self.of_items = tuple(name for name in inputs if name.startswith(ITEM_FEATURE))
        self.of_feedback = tuple(name for name in inputs if name not in (*self.of_items, *queries))
        if config.form != "collapsed" and not self.of_feedback:
            raise ValueError(f"task.form = {config.form!r} has tokens of feedback: name some in loader.inputs")
        if config.form == "literal" and not queries:
            raise ValueError("task.form = 'literal' has tokens of context: name some in loader.queries")

    @property
    def tokens_per_event(self) -> int:  # type: ignore[override]
        """Tokens that the encoder reads per event."""
        return TOKENS[self.config.form]

    @property
    def heads(self) -> tuple[tuple[str, str], ...]:  # type: ignore[override]
        """(column, kind) of what is predicted."""
        return self.config.heads

    @property
    def ranks_catalogue(self) -> bool:  # type: ignore[override]
        """Whether it can say which item comes next."""
        return self.config.next_item > 0

    @property
    def needs_frequency(self) -> bool:
        """As the next item does."""
        return self.ranks_catalogue and super().needs_frequency

    @property
    def needs_catalogue(self) -> bool:
        """As the next item does."""
        return self.ranks_catalogue and super().needs_catalogue

    @property
    def columns(self) -> dict[str, tuple[str, ...]]:
        """What a loader has to read."""
        queries = ("item_id", *self.query_features, *self.of_items)
        labels = tuple(column for column, _ in self.config.heads)
        return {"inputs": self.input_features, "queries": queries, "labels": labels}

    def shape(self, dim: int) -> dict[str, Any]:
        """Arguments of the Head for vectors of width `dim`."""
        c, context = self.config, 1 if self.query_features else 0
        outputs = tuple(KINDS[kind].outputs(c.edges) for _, kind in c.heads)
        query, feedback = {"collapsed": (1 + context, 3 + context), "interleaved": (1 + context, 1), "literal": (1, 1)}[
            c.form
        ]
        query = query if self.ranks_catalogue else 0
        return {"dim": dim, "query_parts": query, "feedback_parts": feedback, "outputs": outputs, "hidden": c.hidden}

    def join(self, model: Any, dim: int, key: jax.Array) -> Any:
        """The encoder with the head of this task."""
        return Ranker(model, Head(**self.shape(dim), key=key))

    def head_parameters(self, dim: int) -> int:
        """Parameters of that head."""
        return head_parameters(**self.shape(dim))

    def head_flops(self, dim: int) -> float:
        """Forward FLOPs of the loss per target: scores, query map and MLPs."""
        s = self.shape(dim)
        mlps = len(s["outputs"]) * s["hidden"] * (s["feedback_parts"] * dim + max(s["outputs"], default=0))
        scores = super().head_flops(dim) if self.ranks_catalogue else 0.0
        return scores + 2.0 * (s["query_parts"] * dim * dim + mlps)

    def ranking_flops(self, dim: int) -> float:
        """Forward FLOPs of scoring every item for one user: the query map, and the scores."""
        return super().ranking_flops(dim) + 2.0 * self.shape(dim)["query_parts"] * dim * dim

    def draw(self, batch: dict[str, jax.Array], key: jax.Array) -> dict[str, jax.Array]:
        """The batch with `negative`, where the next item is learnt by sampling."""
        return super().draw(batch, key) if self.ranks_catalogue else batch

    def wanted(self, batch: dict[str, jax.Array]) -> dict[str, tuple[str, jax.Array]]:
        """What a step touches: name -> (table, ids)."""
        ids = self._read(batch)
        if self.ranks_catalogue:
            ids |= {name: owned for name, owned in super().wanted(batch).items() if name not in ids}
        return ids

    def _read(self, batch) -> dict[str, tuple[str, jax.Array]]:
        """What the tokens are made of: key -> (table, ids)."""
        found = {"history": (self.catalogue, batch["item_id"]), "candidate": (self.catalogue, batch[CANDIDATE])}
        return found | self._described(batch) | {QUERY + name: (name, batch[QUERY + name]) for name in self.of_items}

    def loss(self, model, rows, batch, key, full_softmax=None, **how):
        """Weighted mean losses over the supervised positions, and {"loss", "targets"}; see next_item.Task.loss."""
        query_BLD, logits = self._outputs(model, rows, batch, key, **how)
        weight_BL = (batch["target"] > 0).astype(jnp.float32)
        loss_BL = jnp.zeros(weight_BL.shape, jnp.float32)
        if query_BLD is not None:
            loss_BL += self.config.next_item * self._next_item(query_BLD, rows, batch, full_softmax)
        for k, (column, kind) in enumerate(self.config.heads):
            loss_BL += KINDS[kind].loss(logits[:, :, k], batch[LABEL + column], self.config.edges)
        targets = weight_BL.sum()
        loss = (weight_BL * loss_BL).sum() / jnp.maximum(targets, 1.0)
        return loss, {"loss": loss, "targets": targets}

    def queries(self, model, lookup: Callable[[str, jax.Array], jax.Array], batch: dict[str, jax.Array]) -> jax.Array:
        """[B, L, D]: score of item v as the next one = <query, item(vector of v)>; no dropout."""
        return self._outputs(model, self._looked_up(lookup, batch), batch, None)[0]

    def predict(self, model, lookup: Callable[[str, jax.Array], jax.Array], batch: dict) -> dict[str, jax.Array]:
        """Column -> float32 [B, L]: probability (binary), edges passed (ordinal) or value (regression) of the event
        after each input, were `query_item_id` its item."""
        logits = self._outputs(model, self._looked_up(lookup, batch), batch, None)[1]
        heads = enumerate(self.config.heads)
        return {column: KINDS[kind].predict(logits[:, :, k], self.config.edges) for k, (column, kind) in heads}

    def graded(self, column: str, label: Any) -> Any:
        """Labels as predictions of this column are compared with: an ordinal one as the edges that it passes."""
        return KINDS[dict(self.config.heads)[column]].grade(label, self.config.edges)

    def _looked_up(self, lookup, batch):
        return {name: lookup(*owned) for name, owned in self._read(batch).items()}

    def _outputs(self, model, rows, batch, key, **how) -> tuple[Any, Any]:
        """Query of the next item [B, L, D] (None where it is not learnt) and feedback logits [B, L, K, O]."""
        zero = jnp.zeros_like(rows["history"])
        item = sum((rows[name] for name in self.of_items), rows["history"])
        next_context = sum((rows[QUERY + name] for name in self.query_features), zero)
        candidate = sum((rows[QUERY + name] for name in self.of_items), rows["candidate"])
        said = sum((rows[name] for name in self.of_feedback), zero)
        context = sum((rows[name] for name in self.input_features if name in self.query_features), zero)
        if self.config.form == "collapsed":
            hidden = model(item + said + context, batch, key, **how)
            known = newest_known(hidden, batch)
            at_query, parts = hidden, [known, candidate, known * candidate]
            parts += [next_context] if self.query_features else []
        else:
            first = (batch["positions"] == self.prefix // self.tokens_per_event)[:, :, None]
            tokens = [said + jnp.where(first, item + context, 0.0)]
            if self.config.form == "interleaved":
                tokens.append(candidate + next_context)
            else:
                tokens += [next_context, candidate]
            hidden = self._encode(model, tokens, batch, key, **how)
            at_query, parts = hidden[:, :, len(tokens) - 2], [hidden[:, :, -1]]
        logits = model.head.feedback(*parts) if self.config.heads else None
        if not self.ranks_catalogue:
            return None, logits
        if self.query_features and self.config.form != "literal":
            at_query = jnp.concatenate([at_query, next_context], axis=-1)
        return self._scaled(model.head.query(at_query)), logits

    def _encode(self, model, tokens, batch, key, **how):
        """Hidden states [B, L, k, D] of k tokens per event; the first is of the event, the others of the next one."""
        k, (B, L, D) = len(tokens), tokens[0].shape
        place = jnp.arange(k)[None, None]
        longer = {
            "segment_ids": jnp.repeat(batch["segment_ids"], k, axis=1),
            "positions": (k * batch["positions"][:, :, None] + place).reshape(B, k * L),
        }
        if "timestamp" in batch:
            then = batch["query_timestamp"][:, :, None]
            times = jnp.where(place == 0, batch["timestamp"][:, :, None], then)
            longer["timestamp"] = times.reshape(B, k * L)
            longer["query_timestamp"] = jnp.broadcast_to(then, (B, L, k)).reshape(B, k * L)
        x = jnp.stack(tokens, axis=2).reshape(B, k * L, D)
        return model(x, longer, key, **how).reshape(B, L, k, D)
