"""Recommendations of a trained retriever of semantic ids: the next items of a history, generated code by code.

    generator = Generator.from_run("runs/tiger_beauty")
    ids, scores = generator.recommend([17, 4, 250], k=10)               # the beam search of evaluation
    ids, scores = generator.sample([17, 4, 250], count=10, temperature=0.7)

A score is log p of the item's tuple, in nats; items that share a tuple have the same one, the smaller id first.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from recscale.data.features import USER, open_feature
from recscale.layers.beam import Beams, beam_search, ranked_items
from recscale.layers.code_sampling import sample
from recscale.layers.trie import Trie, build, leaf_of
from recscale.mesh import REPLICATED, place_same
from recscale.run import Run, check_semantic_ids
from recscale.serve.history import BadRequest, Reader, padded, users_of
from recscale.serve.trained import trained
from recscale.tasks.semantic_id import CODES

SMALLEST = 8


class Generator:
    """A trained run of task semantic_id that answers. Raises BadRequest, one line, for what it cannot answer."""

    def __init__(self, run: Run, state: Mapping[str, Any], *, width: int = 50):
        """state: a train state of the run (its optimizer is not used). width: of the beam."""
        if not run.task.generates:
            raise BadRequest("this run scores items: use recscale.serve.recommender.Recommender")
        check_semantic_ids(run, dict(state))
        self.run, self.width = run, width
        self.arrays = tuple(state[name] for name in ("model", "tables", "mixers"))
        self.trie = build(run.fixed[CODES].astype(np.int32))
        self.length = run.config.loader.length
        self._leaf_of = np.asarray(leaf_of(self.trie, jnp.arange(run.log.num_items + 1)))
        self._reader = Reader(run.log.num_items, (), (), {}, {}, False, False)
        self._users = {name: open_feature(run.log, name) for name in run.task.input_features}

    @classmethod
    def from_run(cls, workdir: str | Path, **settings: Any) -> "Generator":
        """Of a workdir that training has written: its selected checkpoint, else its newest.

        Raises ValueError or OSError where there is none, or it cannot be read.
        """
        return cls(*trained(workdir), **settings)

    def recommend(
        self, history: Any, k: int, *, users: Any = None, seen: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k best items of the beam and their scores, best first: [k], or [B, k] for several users.

        history: item ids, oldest first, or a list of them; beyond the length trained with the last events count.
        users: numbers of the users, where the model reads a user token. seen: whether items of the history may be
        recommended; where fewer than k are left, the rest is id 0 with score -inf.
        """
        if not isinstance(k, int | np.integer) or not 1 <= k <= self.run.log.num_items:
            raise BadRequest(f"k = {k}: expected 1..{self.run.log.num_items}, the size of the catalogue")
        width = max(self.width, k)
        batch, rows, single = self._batch(history, users)
        excluded = None if seen else _excluded(rows, len(batch["item_id"]))
        beams = _searched(*self.arrays, *self._placed((batch, excluded)), self.trie, width=width, **self._how)
        ids = ranked_items(beams, self.trie, k, excluded)
        return self._answer(beams, ids, len(rows), single)

    def sample(
        self, history: Any, count: int, *, temperature: float = 1.0, seed: int = 0, users: Any = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """`count` draws and their scores, in the order drawn, repeats among them: [count], or [B, count].

        Each tuple is drawn code by code with probability p^(1 / temperature); of its items, one at random.
        """
        if not isinstance(count, int | np.integer) or count < 1 or not temperature > 0:
            raise BadRequest(f"count = {count}, temperature = {temperature}: expected at least 1, and more than 0")
        batch, rows, single = self._batch(history, users)
        (placed,) = self._placed((batch,))
        beams = _drawn(*self.arrays, placed, self.trie, jax.random.key(seed), temperature, count=count, **self._how)
        leaf = np.asarray(beams.leaf_BW)
        first = np.asarray(self.trie.leaf_first)
        size = np.where(leaf < 0, 1, np.diff(first)[leaf])
        place = first[leaf] + np.floor(np.random.default_rng(seed).random(leaf.shape) * size).astype(np.int64)
        ids = np.where(leaf < 0, 0, np.asarray(self.trie.leaf_items)[np.minimum(place, len(self.trie.leaf_items) - 1)])
        ids, scores = ids[: len(rows)], np.asarray(beams.score_BW)[: len(rows)]
        return (ids[0], scores[0]) if single else (ids, scores)

    @property
    def _how(self) -> dict[str, Any]:
        return {"tables": self.run.tables, "task": self.run.task}

    def _placed(self, values: tuple) -> tuple:
        everywhere = NamedSharding(self.run.mesh, REPLICATED)
        return jax.tree.map(lambda x: place_same(everywhere, x), values)

    def _batch(self, history: Any, users: Any) -> tuple[dict[str, np.ndarray], list[np.ndarray], bool]:
        """What the model reads, the whole histories, and whether there is one user only."""
        given, single = users_of("history", history)
        names = ["history"] if single else [f"history[{b}]" for b in range(len(given))]
        rows = [self._reader.events(name, items, None, {})["item_id"] for name, items in zip(names, given, strict=True)]
        numbers = self._numbers(users, len(rows), single)
        B, prefix = padded(len(rows), SMALLEST), len(self._users)
        batch = {name: np.zeros((B, self.length + prefix), np.int32) for name in ("item_id", "target", "segment_ids")}
        batch |= {name: np.zeros_like(batch["item_id"]) for name in self._users}
        for b, items in enumerate(rows):
            last = items[-self.length :]
            batch["item_id"][b, prefix : prefix + len(last)] = last
            batch["segment_ids"][b, : prefix + len(last)] = 1
        for place, (name, feature) in enumerate(self._users.items()):
            batch[name][: len(rows), place] = feature.read(numbers)
        return batch, rows, single

    def _numbers(self, users: Any, count: int, single: bool) -> np.ndarray:
        if not self._users:
            return np.zeros(0, np.int64)
        if users is None:
            raise BadRequest(f"users: missing; this model reads {tuple(self._users)}: give the users' numbers")
        found = np.atleast_1d(np.asarray(users))
        if found.shape != (count,) or found.dtype.kind not in "iu" or (single and np.ndim(users)):
            raise BadRequest(f"users: found {np.shape(users)} of {found.dtype}, expected one integer per history")
        known = self.run.log.num_users
        stored = any(not name.startswith(f"{USER}hash") for name in self._users)
        if found.min() < 0 or (stored and found.max() >= known):
            raise BadRequest(f"users: {found.min()}..{found.max()}, expected 0..{known - 1}")
        return found.astype(np.int64)

    def _answer(self, beams: Beams, ids: np.ndarray, count: int, single: bool) -> tuple[np.ndarray, np.ndarray]:
        """Ids and the scores of their tuples."""
        leaf, score = np.asarray(beams.leaf_BW)[:count], np.asarray(beams.score_BW)[:count]
        ids = ids[:count]
        hit = self._leaf_of[ids][:, :, None] == leaf[:, None]
        scores = np.where(ids > 0, np.take_along_axis(score, hit.argmax(axis=2), axis=1), -np.inf)
        return (ids[0], scores[0]) if single else (ids, scores)


def _excluded(rows: Sequence[np.ndarray], count: int) -> np.ndarray:
    """int32 [count, E], the items of each history, 0 = none."""
    found = [np.unique(items) for items in rows]
    excluded = np.zeros((count, padded(max(map(len, found)), SMALLEST)), np.int32)
    for b, ids in enumerate(found):
        excluded[b, : len(ids)] = ids
    return excluded


@functools.partial(jax.jit, static_argnames=("tables", "task", "width"))
def _searched(model, arrays, mixers, batch, excluded_BE, trie: Trie, *, tables, task, width) -> Beams:
    memory = task.remember(model, functools.partial(tables.lookup, arrays, mixers), batch)
    B = len(batch["item_id"])
    step = functools.partial(model.advance, memory)
    return beam_search(step, model.begin(memory, 1), trie, B, width, excluded_BE)


@functools.partial(jax.jit, static_argnames=("tables", "task", "count"))
def _drawn(model, arrays, mixers, batch, trie: Trie, key, temperature, *, tables, task, count) -> Beams:
    memory = task.remember(model, functools.partial(tables.lookup, arrays, mixers), batch)
    step = functools.partial(model.advance, memory)
    return sample(step, model.begin(memory, 1), trie, len(batch["item_id"]), key, count, temperature)
