"""Recommendations of a trained run: rank given candidates, or find the best of the catalogue, for histories of items.

    recommender = Recommender.from_run("runs/hstu_ml1m")
    ids, scores = recommender.recommend([17, 4, 250], k=10)
    scores = recommender.rank([17, 4, 250], candidates=[3, 99])

    memory = recommender.remember([17, 4, 250])           # encoded once ...
    memory = recommender.extend(memory, [3])              # ... grows with what happens (the old one is used up) ...
    scores = recommender.rank(memory, candidates=[99])    # ... and costs an event and its candidates, not a history

What is kept of a history is all but its last event: that one depends on what follows it (the time of the request, its
context), so it is computed with the request (serve/cache.py). Candidates that the encoder attends from (the forms
"interleaved" and "literal" of tasks/feedback.py) are computed in micro-batches against the cache; where it does not see
the candidate, its states are computed once and the heads for each candidate.

Shapes are padded to powers of two, so a compiled program serves many lengths, users and candidates.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from recscale.data.event_log import EventLog
from recscale.data.features import ITEM, open_feature
from recscale.layers.ranking import pack_seen, top_items
from recscale.mesh import REPLICATED, place_same
from recscale.run import Run
from recscale.serve import answers, cache
from recscale.serve.history import BadRequest, Events, Reader, padded, users_of
from recscale.serve.trained import trained

BLOCK, SMALLEST = 4096, 8


@dataclasses.dataclass
class Memory:
    """What is remembered of some users; make it by `remember` and `extend`.

    events: all that is known, by user. first: of each, the event at position 0 (older ones are out of the model's
    reach). kept: keys and values of events first .. last - 1, or None. single: one user was given, not a list of users.
    """

    events: list[Events]
    first: np.ndarray
    kept: cache.Cache | None
    single: bool


class Recommender:
    """A trained run that answers. Raises BadRequest, one line, for what it cannot answer."""

    def __init__(self, run: Run, state: Mapping[str, Any], *, micro: int = 128):
        """state: a train state of the run (its optimizer is not used). micro: candidates computed at a time."""
        if run.task.generates:
            raise BadRequest("this run generates semantic ids: use recscale.serve.generator.Generator")
        if run.task.denoises:
            raise BadRequest(
                "this run generates vectors by diffusion (task 'denoising'), which is evaluated, not served: use "
                "recscale.evaluate, or recscale.resample for other settings of sampling"
            )
        self.run, self.micro = run, micro
        self.model, self.mixers = state["model"], state["mixers"]
        layouts = run.tables.catalogue_specs(run.task.catalogue)  # arrays of shared rows go to every device once
        placed = {n: jax.device_put(state["tables"][n], NamedSharding(run.tables.mesh, s)) for n, s in layouts.items()}
        self.arrays, self.items = dict(state["tables"]), placed
        self.length = run.config.loader.length
        self.program = answers.Program(run.tables, run.task)
        encoder = answers.encoder_of(self.model, run.task)
        if not hasattr(encoder, "stages"):
            raise BadRequest(
                f"model_name = {run.config.model_name!r} keeps no keys and values of a history: such a run is "
                "evaluated, not served"
            )
        self.keeps = not getattr(encoder, "rewrites_history", False)
        self.prefix = getattr(encoder.config, "prefix", 0)
        if not self.keeps and self.tokens > 1:
            raise BadRequest(
                f"task.form = {run.task.config.form!r} with a model that measures from the end of a history: its "
                "candidates change all that is kept; use form 'collapsed', or model.anchor = 'event' without truncation"
            )
        if run.task.prefix:
            raise BadRequest(
                "loader.inputs has features of users (users/NAME), which take positions of their own before the "
                "history: such a run is evaluated, not served"
            )
        timed = "time_bias" in run.config.model and bool(run.config.model.time_bias)
        waits_for_nothing = "query_time" in run.config.model and run.config.model.query_time == "last_event"
        columns = run.task.columns
        names = tuple(dict.fromkeys((*columns["inputs"], *columns["queries"])))
        features = {name: open_feature(run.log, name) for name in names if name != "item_id"}
        self.reader = Reader(
            num_items=run.log.num_items,
            inputs=tuple(columns["inputs"]),
            queries=tuple(name for name in columns["queries"] if name != "item_id"),
            cardinalities={name: feature.cardinality for name, feature in features.items()},
            item_codes=_item_codes(run.log, [name for name in names if name.startswith(ITEM)]),
            times=timed,
            request_time=timed and (self.tokens > 1 or not waits_for_nothing),
        )

    @classmethod
    def from_run(cls, workdir: str | Path, **settings: Any) -> "Recommender":
        """Of a workdir that training has written: its selected checkpoint, else its newest.

        Raises ValueError or OSError where there is none, or it cannot be read.
        """
        return cls(*trained(workdir), **settings)

    @property
    def tokens(self) -> int:
        """Tokens that the encoder reads per event."""
        return self.run.task.tokens_per_event

    def remember(self, history: Any, timestamps: Any = None, columns: Mapping[str, Any] | None = None) -> Memory:
        """Encode one history (item ids, oldest first) or a list of them.

        timestamps: integer seconds, where the model reads them; columns: name -> feature ids of every event, as
        data/features.py makes them. Both nested as `history` is. Beyond the length trained with, the last events count.
        """
        users, single = users_of("history", history)
        events = self._events(users, single, timestamps, columns or {}, [None] * len(users))
        return self._encoded(events, single)

    def extend(
        self, memory: Memory, history: Any, timestamps: Any = None, columns: Mapping[str, Any] | None = None
    ) -> Memory:
        """The memory with further events of each user (or none), arguments as in `remember`. That given is used up."""
        users, single = users_of("history", history)
        if len(users) != len(memory.events) or single != memory.single:
            raise BadRequest(f"history: {len(users)} users, expected the {len(memory.events)} of this memory")
        more = self._events(users, single, timestamps, columns or {}, memory.events)
        both = zip(memory.events, more, strict=True)
        events = [{name: np.concatenate([old[name], new[name]]) for name in old} for old, new in both]
        counts = np.array([len(e["item_id"]) for e in events])
        if memory.kept is None or (counts - memory.first).max() > min(self.length, self._room(memory.kept) + 1):
            return self._encoded(events, memory.single)
        start = np.array([len(e["item_id"]) for e in memory.events]) - 1
        size = padded((counts - 1 - start).max(), 1)
        batch = self.reader.history(events, start, counts - 1, memory.first, size)
        kept = answers.extend(self.model, self.arrays, self.mixers, memory.kept, batch, program=self.program)
        return Memory(events, memory.first, kept, memory.single)

    def rank(
        self,
        history: Any,
        candidates: Any,
        *,
        timestamps: Any = None,
        columns: Mapping[str, Any] | None = None,
        at: Any = None,
        request: Mapping[str, Any] | None = None,
        head: str | None = None,
    ) -> np.ndarray:
        """Scores float32 [M] of candidate items for one history or memory, [B, M] for several; larger is better.

        candidates: item ids, the same for all users or one list per user (of equal lengths). at: time of the request in
        seconds, one for all or one per user, request: features of the event to come; both where the model reads them.
        head: which feedback's prediction is the score (default the first; None without heads): the logit of
        being the next item where the task has no heads or head = "next_item".
        """
        memory = history if isinstance(history, Memory) else self.remember(history, timestamps, columns)
        wanted = self._candidates(memory, candidates)
        requests = self._requests(memory, at, request or {})
        head = self._head(head)
        M = len(wanted[0])
        if head is None:
            query_BD, rows = self._queries(memory, requests), padded(M, SMALLEST)
            ids = np.zeros((len(query_BD), rows), np.int32)
            ids[: len(wanted), :M] = np.stack(wanted)
            scores = answers.item_scores(query_BD, self.arrays, self.mixers, ids, program=self.program)
        else:
            size = padded(M, SMALLEST)
            micro = self.micro if size > self.micro and size % self.micro == 0 else 0
            batch = self.reader.asked(memory.events, memory.first, requests, wanted, size)
            hidden = self._last(memory, requests) if self.tokens == 1 else None
            scores = answers.predict(
                self.model, self.arrays, self.mixers, memory.kept, hidden, batch, program=self.program, micro=micro
            )[head]
        found = np.asarray(scores)[: len(wanted), :M]
        return found[0] if memory.single else found

    def recommend(
        self,
        history: Any,
        k: int = 10,
        *,
        timestamps: Any = None,
        columns: Mapping[str, Any] | None = None,
        at: Any = None,
        request: Mapping[str, Any] | None = None,
        seen: bool = False,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k best items of the whole catalogue and their scores, best first: [k], or [B, k] for several users.

        seen: whether items of the history (all of it) may be recommended; without them fewer than k may be left, and
        the rest is id 0 with score -inf. Other arguments as in `rank`. Equal scores: the smaller id first.
        """
        if not self.run.task.ranks_catalogue:
            raise BadRequest("recommend: this run learnt no next item; use rank with candidates from elsewhere")
        if not isinstance(k, int | np.integer) or not 1 <= k <= self.run.log.num_items:
            raise BadRequest(f"k = {k}: expected 1..{self.run.log.num_items}, the size of the catalogue")
        memory = history if isinstance(history, Memory) else self.remember(history, timestamps, columns)
        query_BD = self._queries(memory, self._requests(memory, at, request or {}))
        hidden = None
        if not seen:
            owner = np.repeat(np.arange(len(memory.events)), [len(e["item_id"]) for e in memory.events])
            hidden = pack_seen(owner, np.concatenate([e["item_id"] for e in memory.events]))
            hidden = tuple(place_same(NamedSharding(self.run.tables.mesh, REPLICATED), part) for part in hidden)
        how = {"tables": self.run.tables, "task": self.run.task, "block": BLOCK, "top_k": padded(k, SMALLEST)}
        how["top_k"] = min(how["top_k"], self.run.log.num_items)
        ids = top_items(query_BD, hidden, self.items, self.mixers, **how)
        scores = answers.item_scores(query_BD, self.arrays, self.mixers, ids, program=self.program)
        found = tuple(np.asarray(a)[: len(memory.events), :k] for a in (ids, scores))
        found = (found[0], np.where(found[0] > 0, found[1], -np.inf))
        return (found[0][0], found[1][0]) if memory.single else found

    # What is kept, and what comes of it -------------------------------------------------------------------------------

    def _events(self, users, single, timestamps, columns, before) -> list[Events]:
        def of(values, b):
            return values if values is None or single else values[b]

        for name, values in {"timestamps": timestamps, **columns}.items():
            if values is not None and not single and len(values) != len(users):
                raise BadRequest(f"{name}: given for {len(values)} users, expected {len(users)}")
        names = ["history"] if single else [f"history[{b}]" for b in range(len(users))]
        return [
            self.reader.events(names[b], user, of(timestamps, b), {n: of(v, b) for n, v in columns.items()}, before[b])
            for b, user in enumerate(users)
        ]

    def _encoded(self, events: list[Events], single: bool) -> Memory:
        counts = np.array([len(e["item_id"]) for e in events])
        first = np.maximum(counts - self.length, 0)
        if not self.keeps:
            return Memory(events, first, None, single)
        if self.prefix and ((counts - first - 1) * self.tokens).min() < self.prefix:
            raise BadRequest(
                f"history: {int((counts - first).min())} events, expected more than the model's prefix of "
                f"{self.prefix} tokens, which no later event may change"
            )
        size = padded((counts - first).max(), SMALLEST)
        batch = self.reader.history(events, first, counts - 1, first, size)
        capacity = size * self.tokens
        kept = answers.remember(self.model, self.arrays, self.mixers, batch, program=self.program, capacity=capacity)
        return Memory(events, first, kept, single)

    def _room(self, kept: cache.Cache) -> int:
        return kept[0].keys.shape[3] // self.tokens

    def _queries(self, memory: Memory, requests: Sequence[dict]) -> jax.Array:
        """The query of the next item [B, D]."""
        unknown = [np.zeros(1, np.int64)] * len(memory.events)
        batch = self.reader.asked(memory.events, memory.first, requests, unknown, 1)
        hidden = self._last(memory, requests) if self.tokens == 1 else None
        return answers.query(self.model, self.arrays, self.mixers, memory.kept, hidden, batch, program=self.program)

    def _last(self, memory: Memory, requests: Sequence[dict]) -> jax.Array:
        """The hidden state [B, 1, D] of the last event, where no candidate is seen by it."""
        unknown = [np.zeros(1, np.int64)] * len(memory.events)
        if memory.kept is not None:
            batch = self.reader.asked(memory.events, memory.first, requests, unknown, 1)
            return answers.last_state(self.model, self.arrays, self.mixers, memory.kept, batch, program=self.program)
        after = [
            {name: np.concatenate([values, [r.get(name, 0)]]) for name, values in e.items()}
            for e, r in zip(memory.events, requests, strict=True)
        ]  # the request in the place of an event to come
        counts = np.array([len(e["item_id"]) for e in memory.events])
        size = padded((counts - memory.first).max(), SMALLEST)
        batch = self.reader.history(after, memory.first, counts, memory.first, size)
        return answers.last_state_of_whole(self.model, self.arrays, self.mixers, batch, program=self.program)

    def _candidates(self, memory: Memory, candidates: Any) -> list[np.ndarray]:
        lists, shared = users_of("candidates", candidates)
        lists = lists * len(memory.events) if shared else lists
        if len(lists) != len(memory.events):
            raise BadRequest(
                f"candidates: {len(lists)} lists, expected one for all or one for each of {len(memory.events)} users"
            )
        found = [self.reader.items("candidates", ids) for ids in lists]
        if len({len(ids) for ids in found}) > 1 or not len(found[0]):
            raise BadRequest(
                f"candidates: lists of {sorted({len(i) for i in found})} items, expected equally many, at least one"
            )
        return found

    def _requests(self, memory: Memory, at: Any, request: Mapping[str, Any]) -> list[dict]:
        users = len(memory.events)
        times = [at] * users if at is None or np.ndim(at) == 0 else list(at)
        if len(times) != users:
            raise BadRequest(f"at: {len(times)} times, expected one for all or one for each of {users} users")
        found = []
        for b, events in enumerate(memory.events):
            columns = {n: v[b] if np.ndim(v) > 0 else v for n, v in request.items()}
            found.append(self.reader.request(f"history[{b}]", times[b], columns, events))
        return found

    def _head(self, head: str | None) -> str | None:
        names = [column for column, _ in self.run.task.heads]
        if head is None:
            return names[0] if names else None
        if head == "next_item" and self.run.task.ranks_catalogue:
            return None
        if head not in names:
            known = names + (["next_item"] if self.run.task.ranks_catalogue else [])
            raise BadRequest(f"head = {head!r}: expected one of {known}")
        return head


def _item_codes(log: EventLog, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Feature ids [V + 1] of every item, those that no event has included."""
    every = np.arange(log.num_items + 1, dtype=np.int32)
    once = dataclasses.replace(log, events={"item_id": every}, columns={})  # what reads events reads all items here
    return {name: open_feature(once, name).read(every) for name in names}
