"""Cached inference equals the uncached model, however a history is cut into pieces and a list into micro-batches."""

import functools
import itertools
from typing import Any

import jax
import numpy as np
import pytest

from recscale.models import argus, hstu, sasrec, stu
from recscale.serve import cache

D, EVENTS, ITEMS = 6, 5, 6  # width of a vector, events of a history, candidates
SHAPE = {"embed_dim": D, "depth": 2, "heads": 2, "max_length": 8, "dropout": 0.0, "dtype": "float32"}
GATED = {"qk_dim": 3, "v_dim": 4, "width": 6}
TRUNCATION = {"truncate_after": 0, "truncate_to": 0, "truncate_row": 0}
STU = SHAPE | GATED | TRUNCATION | {"time_bias": True, "anchor": "event", "window": 0, "prefix": 0}
HSTU = SHAPE | GATED | {"output_length": 2, "time_bias": True}
MODELS: dict[str, tuple[Any, Any]] = {
    "hstu, next event": (hstu, hstu.Config(**HSTU, query_time="next_event")),
    "hstu, last event": (hstu, hstu.Config(**HSTU | {"width": 8}, query_time="last_event")),
    "sasrec": (sasrec, sasrec.Config(**SHAPE, width=4, ffn=7, activation="gelu")),
    "argus": (argus, argus.Config(**SHAPE, width=8, time_bias=True, query_time="next_event")),
    "argus, prefix": (argus, argus.Config(**SHAPE, width=8, time_bias=False, query_time="next_event", prefix=2)),
    "stu": (stu, stu.Config(**STU)),
    "stu, window and prefix": (stu, stu.Config(**STU | {"window": 2, "prefix": 2})),
    "stu, request": (stu, stu.Config(**STU | {"anchor": "request"})),
    "stu, truncated": (stu, stu.Config(**STU | {"truncate_after": 1, "truncate_to": 2, "anchor": "request"})),
    "stu, truncated row": (
        stu,
        stu.Config(**STU | {"truncate_after": 1, "truncate_to": 2, "truncate_row": 4, "prefix": 1}),
    ),
}
FIXED = [name for name in MODELS if "request" in name or "truncated" in name]
GROWING = [name for name in MODELS if name not in FIXED]
SEVERAL = ("hstu, next event", "stu, window and prefix", "sasrec")  # of each kind one, where a test tries much
NAMES = ("positions", "timestamp", "query_timestamp", "segment_ids")


def random_model(name: str) -> Any:
    """Every parameter random."""
    module, config = MODELS[name]
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: module.Model(config, jax.random.key(0)))
    return jax.tree.map(lambda x: (0.4 * rng.normal(size=x.shape)).astype(np.float32), shapes)


class World:
    """Two users' events, the request, and candidates; histories may be ragged."""

    def __init__(self, lengths: tuple[int, ...] = (EVENTS, EVENTS), seed: int = 1):
        rng = np.random.default_rng(seed)
        self.lengths = np.array(lengths)
        self.x = rng.normal(size=(len(lengths), EVENTS, D)).astype(np.float32)
        times = np.cumsum(rng.integers(1, 90_000, (len(lengths), EVENTS + 1)), axis=1).astype(np.int32)
        self.request = times[np.arange(len(lengths)), self.lengths]
        self.batch = {"timestamp": times[:, :-1], "query_timestamp": times[:, 1:]}
        self.candidates = rng.normal(size=(len(lengths), ITEMS, D)).astype(np.float32)

    def piece(self, start: int, stop: int, size: int = EVENTS) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Events start..stop of every history from slot 0 on, of `size` slots."""
        x = np.zeros((len(self.lengths), size, D), np.float32)
        batch = {name: np.zeros(x.shape[:2], np.int32) for name in NAMES}
        for b, length in enumerate(self.lengths):
            stop_b = min(stop, length)
            count = max(stop_b - start, 0)
            x[b, :count] = self.x[b, start : start + count]
            batch["segment_ids"][b, :count] = 1
            batch["positions"][b, :count] = np.arange(start, start + count)
            for name in self.batch:
                batch[name][b, :count] = self.batch[name][b, start : start + count]
        return x, batch

    def asked(self, order: Any = slice(None), targets: bool = False) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Candidates, each at the position of the event to come and the time of the request."""
        x = self.candidates[:, order]
        like = np.ones(x.shape[:2], np.int32)
        batch = {"segment_ids": like, "positions": like * self.lengths[:, None].astype(np.int32)}
        batch |= {name: like * self.request[:, None] for name in self.batch}
        return x, batch | ({"targets": like > 0} if targets else {})

    def joined(self, targets: bool = False) -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray]:
        """Each candidate after its history, a row for each, and the slot of the candidate."""
        x, batch = self.piece(0, EVENTS, EVENTS + 1)
        asked_x, asked = self.asked(targets=targets)
        if targets:
            batch["targets"] = np.zeros(x.shape[:2], bool)
        x, batch = np.repeat(x, ITEMS, axis=0), {name: np.repeat(v, ITEMS, axis=0) for name, v in batch.items()}
        slot = np.repeat(self.lengths, ITEMS)
        x[np.arange(len(x)), slot] = asked_x.reshape(-1, D)
        for name, values in asked.items():
            batch[name][np.arange(len(x)), slot] = values.reshape(-1)
        return x, batch, slot


QUICK = {"xla_backend_optimization_level": 0}  # these tests compile much and compute little
FORWARD = jax.jit(lambda model, x, batch: model(x, batch), compiler_options=QUICK)
ENCODE = jax.jit(lambda model, x, batch: cache.encode(model, x, batch, capacity=8), compiler_options=QUICK)
APPEND = jax.jit(lambda *arguments: cache.append(*arguments), compiler_options=QUICK)


@functools.partial(jax.jit, static_argnames=("group", "micro"), compiler_options=QUICK)
def SCORE(model, kept, x, batch, group=1, micro=0):
    return cache.score(model, kept, x, batch, group=group, micro=micro)


def uncached(model: Any, world: World, targets: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Hidden states of every history [B, L, D] and of every candidate appended to it alone [B, M, D]."""
    x, batch, slot = world.joined(targets)
    hidden = np.asarray(FORWARD(model, x, batch))
    history = np.asarray(FORWARD(model, *world.piece(0, EVENTS)))
    return history, hidden[np.arange(len(x)), slot].reshape(-1, ITEMS, D)


def check(got: Any, expected: np.ndarray, lengths: Any = None) -> None:
    assert np.abs(expected).max() > 0.1
    for b, length in enumerate([None] * len(expected) if lengths is None else lengths):
        np.testing.assert_allclose(np.asarray(got)[b, :length], expected[b, :length], rtol=2e-5, atol=2e-5)


def compositions(total: int) -> list[list[int]]:
    cuts = itertools.product((False, True), repeat=total - 1)
    return [[0, *(i + 1 for i, cut in enumerate(where) if cut), total] for where in cuts]


@pytest.mark.parametrize("name", GROWING)
def test_every_way_to_cut_a_history(name):
    model, world = random_model(name), World()
    history, expected = uncached(model, world)
    prefix = getattr(model.config, "prefix", 0)
    for stops in compositions(EVENTS):
        if stops[1] < prefix:
            continue
        kept, hidden = ENCODE(model, *world.piece(0, stops[1]))
        parts = [np.asarray(hidden)[:, : stops[1]]]
        for start, stop in itertools.pairwise(stops[1:]):
            kept, hidden = APPEND(model, kept, *world.piece(start, stop))
            parts.append(np.asarray(hidden)[:, : stop - start])
        check(np.concatenate(parts, axis=1), history)
        check(SCORE(model, kept, *world.asked()), expected)


@pytest.mark.parametrize("name", MODELS)
def test_candidates_in_any_order_and_micro_batch(name):
    """Histories of different lengths in one batch."""
    model, world = random_model(name), World((EVENTS, 3))
    history, expected = uncached(model, world, targets=name in FIXED)
    kept, hidden = ENCODE(model, *world.piece(0, EVENTS))
    check(hidden, history, world.lengths if "truncated" not in name else np.array([0, 0]))
    for micro in (0, 1, 2, 3) if name in SEVERAL else (2,):
        for order in (list(range(ITEMS)), [3, 0, 5, 4, 1, 2]):
            asked = world.asked(order, targets=name in FIXED)
            check(SCORE(model, kept, *asked, micro=micro), expected[:, order])


@pytest.mark.parametrize("name", SEVERAL)
def test_ragged_histories_grow_each_at_its_own_place(name):
    model, world = random_model(name), World((4, 2))
    history, expected = uncached(model, world)
    kept, _ = ENCODE(model, *world.piece(0, 2))  # the second history is complete
    for start in (2, 3):
        kept, hidden = APPEND(model, kept, *world.piece(start, start + 1))
        check(np.asarray(hidden)[:1, :1], history[:1, start : start + 1])
    assert np.asarray(kept[0].count_B).tolist() == [4, 2]
    check(SCORE(model, kept, *world.asked()), expected)


def test_candidates_of_one_row_under_the_targets_mask():
    """The production STU sees history and all candidates in one row; the cache gives the same."""
    for name in ("stu", "stu, truncated"):
        model, world = random_model(name), World()
        x, batch = world.piece(0, EVENTS)
        asked_x, asked = world.asked(targets=True)
        batch["targets"] = np.zeros(x.shape[:2], bool)
        row = {key: np.concatenate([batch[key], asked[key]], axis=1) for key in batch}
        whole = np.asarray(FORWARD(model, np.concatenate([x, asked_x], axis=1), row))[:, EVENTS:]
        kept, _ = ENCODE(model, *world.piece(0, EVENTS))
        check(SCORE(model, kept, asked_x, asked, micro=2), whole)


@pytest.mark.parametrize("name", SEVERAL)
def test_a_candidate_of_several_tokens(name):
    """Groups: the last event and the candidate after it, both against the history before them."""
    model, world = random_model(name), World()
    history, expected = uncached(model, world)
    kept, _ = ENCODE(model, *world.piece(0, EVENTS - 1))
    last_x, last = (jax.tree.map(lambda a: a[:, -1:], part) for part in world.piece(0, EVENTS))
    asked_x, asked = world.asked()

    def pairs(a, b):
        both = np.stack([np.repeat(a, ITEMS, axis=1), b], axis=2)
        return both.reshape(both.shape[0], -1, *both.shape[3:])

    batch = {key: pairs(last[key], asked[key]) for key in asked}
    for micro in (0, 2):
        got = np.asarray(SCORE(model, kept, pairs(last_x, asked_x), batch, group=2, micro=micro))
        check(got[:, 1::2], expected)
        check(got[:, ::2], np.repeat(history[:, -1:], ITEMS, axis=1))


@pytest.mark.parametrize(("name", "changes"), [("hstu, next event", True), ("hstu, last event", False)])
def test_what_the_time_of_the_request_reaches(name, changes):
    """next_event: the last event's own states depend on when the request comes, so it must not be kept before that."""
    model, world = random_model(name), World()
    kept, hidden = ENCODE(model, *world.piece(0, EVENTS))
    world.batch["query_timestamp"][:, -1] += 5_000_000
    later, hidden_later = ENCODE(model, *world.piece(0, EVENTS))
    differs = np.abs(np.asarray(hidden) - np.asarray(hidden_later)).max(axis=(0, 2)) > 1e-3
    assert differs.tolist() == [False] * (EVENTS - 1) + [changes]
    same_keys = [bool(np.all(a.keys == b.keys)) for a, b in zip(kept, later, strict=True)]
    assert same_keys == [not changes]


def test_equal_shapes_compile_once():
    model, world = random_model("sasrec"), World()
    before = cache.score._cache_size()
    kept, _ = cache.encode(model, *world.piece(0, EVENTS), capacity=7)
    for stop in (1, 2, 3):
        kept, _ = cache.encode(model, *world.piece(0, stop), capacity=7)
        cache.score(model, kept, *world.asked())
    assert cache.score._cache_size() == before + 1


def test_what_cannot_be_done_is_said():
    model, world = random_model("stu, request"), World()
    kept, _ = cache.encode(model, *world.piece(0, EVENTS), capacity=8)
    with pytest.raises(ValueError, match="encode it again"):
        cache.append(model, kept, *world.piece(0, 1))
    with pytest.raises(ValueError, match="capacity = 3: expected room for the 5"):
        cache.encode(model, *world.piece(0, EVENTS), capacity=3)
    with pytest.raises(ValueError, match="multiple of group x micro = 1 x 4"):
        cache.score(model, kept, *world.asked(targets=True), micro=4)


def test_the_cache_is_given_back_in_place():
    """Donated: an append leaves one cache in memory, not two."""
    model, world = random_model("argus"), World()
    kept, _ = cache.encode(model, *world.piece(0, 3), capacity=64)
    new, _ = cache.append(model, kept, *world.piece(3, 4))
    assert all(leaf.is_deleted() for leaf in (kept[0].keys, kept[0].values))
    assert not new[0].keys.is_deleted()
