"""What a config reads of a log: its views, the features it embeds, the labels it learns, and loaders over the views."""

from collections.abc import Callable

import jax
import ml_collections
import numpy as np

from recscale.data import splits, windows
from recscale.data.cold_start import cold_start
from recscale.data.event_log import EventLog
from recscale.data.features import known_before, open_feature
from recscale.data.loading import Loader
from recscale.data.parts import parts
from recscale.data.reach import Reach
from recscale.tasks import denoising
from recscale.tasks.next_item import Task

SPLITS = splits.SPLITS | {"cold_start": cold_start, "parts": parts}
CHUNK = 1 << 22  # labels checked at a time
CUTS = {  # loader.window -> examples cut anew for training
    "all": windows.in_windows,
    "prefixes": windows.prefixes,
    "last": lambda view, length: windows.first_apart(view),
    "random": lambda view, length: windows.first_apart(view),
}
LABELS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], str]] = {
    "binary": (lambda x: (x == 0) | (x == 1), "0 or 1"),
    "ordinal": (np.isfinite, "finite numbers"),
    "regression": (lambda x: np.isfinite(x) & (x >= 0), "finite numbers of at least 0"),
    "score": (lambda x: np.isfinite(x) & (x >= 0), "finite numbers of at least 0"),
}
"""Kind of a head -> which values it can learn, and how to say so."""


def views(config: ml_collections.ConfigDict, log: EventLog) -> dict[str, splits.View]:
    """The sides of the config's split, training as small as config.data says; raises ValueError for a name unknown."""
    arguments = dict(config.split)
    name = arguments.pop("name")
    if name not in SPLITS:
        raise ValueError(f"split.name = {name!r}: expected one of {tuple(SPLITS)}")
    found = SPLITS[name](log, **arguments)
    if config.data.users:
        found["train"] = splits.limit_users(found["train"], config.data.users)
    if config.data.events_per_user:
        found["train"] = splits.limit_events(found["train"], config.data.events_per_user)
    for split in (*config.eval.final, *([config.eval.during] if config.train.eval_every else [])):
        if split not in found:
            raise ValueError(f"eval: split.name = {config.split.name!r} gives {tuple(found)}, not {split!r}")
    return found


def cardinalities(config: ml_collections.ConfigDict, log: EventLog) -> dict[str, int]:
    """Ids of each feature that the config embeds, 0 = unknown among them.

    Raises ValueError for a query feature that is not known before its item, for what needs times where there are none
    or lets a model see an event it is not trained on, and for settings of the loader that nothing would read.
    """
    c, where = config.loader, config.data.path
    for name in c.queries:
        if not known_before(log, name):
            known = [key for key in (*log.columns, "hour", "weekday") if known_before(log, key)]
            raise ValueError(f"loader.queries: {name!r} is not a context column of {where}; it has {known}")
    timed = "time_bias" in config.model and config.model.time_bias
    if timed and "timestamp" not in log.columns:
        raise ValueError(f"model.time_bias needs timestamps, {where} has none: set it to False")
    _check_horizon(config, timed)
    _check_request(config)
    _check_one_target(config)
    _check_denoising(config)
    return {name: open_feature(log, name).cardinality for name in dict.fromkeys((*c.inputs, *c.queries))}


def _check_horizon(config: ml_collections.ConfigDict, timed: bool) -> None:
    c = config.loader
    if c.positive and not c.horizon:
        raise ValueError(f"loader.positive = {c.positive!r} says what is drawn within loader.horizon, which is 0")
    causal = "query_time" in config.model and config.model.query_time == "last_event"
    if c.horizon and (c.queries or (timed and not causal)):
        raise ValueError(
            f"loader.horizon = {c.horizon} trains on later events than the next: use no loader.queries and no "
            "time bias but one with model.query_time = 'last_event'"
        )
    if c.horizon and _form(config) != "collapsed":
        raise ValueError(
            f"loader.horizon = {c.horizon} with task.form = {_form(config)!r}: its tokens hold the item that an event "
            "is trained on, which would tell the events in between; use form 'collapsed'"
        )


def _check_request(config: ml_collections.ConfigDict) -> None:
    c, task = config.loader, config.task_name
    if c.lag and not c.request_gap:
        raise ValueError(
            f"loader.lag = {c.lag} counts from a request: set loader.request_gap, the seconds that end one"
        )
    if task == "two_tower" and not c.request_gap:
        raise ValueError(
            "task_name = 'two_tower' learns from pairs of one request: set loader.request_gap, the seconds that end one"
        )
    if task == "two_tower" and c.queries:
        raise ValueError(f"loader.queries = {tuple(c.queries)}: task 'two_tower' reads no context of a request; use ()")
    if task == "next_item" and c.request_gap:
        raise ValueError(
            f"loader.request_gap = {c.request_gap}: task 'next_item' reads no older state of the user; use 0"
        )
    if c.request_gap and _form(config) != "collapsed":
        raise ValueError(
            f"loader.request_gap = {c.request_gap} with task.form = {_form(config)!r}: only collapsed tokens can be "
            "read from an older state of the user"
        )


def _check_one_target(config: ml_collections.ConfigDict) -> None:
    c, one = config.loader, config.loader.window in ("prefixes", "spans")
    if config.model_name == "tiger" and not one:
        raise ValueError(
            f"loader.window = {c.window!r}: the encoder of 'tiger' reads the whole history of a target at once, which "
            "would show it the targets in between; use 'prefixes' (one example per target) or 'spans'"
        )
    if c.segments < 0 or (c.segments and not one):
        raise ValueError(
            f"loader.segments = {c.segments} with loader.window = {c.window!r}: it bounds the examples, each of one "
            "target, of a row; use 0, or window 'prefixes'"
        )
    if config.task_name == "semantic_id" and config.eval.protocols and config.eval.top_k < max(config.eval.ks):
        raise ValueError(
            f"eval.top_k = {config.eval.top_k} is the width of the beam, eval.ks = {tuple(config.eval.ks)}: expected a "
            f"width of at least {max(config.eval.ks)}"
        )
    if config.task_name == "semantic_id" and (c.horizon or c.request_gap or c.alpha < 2.0):
        raise ValueError(
            f"loader: horizon = {c.horizon}, request_gap = {c.request_gap}, alpha = {c.alpha}: task 'semantic_id' "
            "generates the very next item; use 0, 0 and 2.0"
        )


def _check_denoising(config: ml_collections.ConfigDict) -> None:
    c, task = config.loader, config.task_name
    if task != "denoising":
        if "dreamrec_legacy" in config.eval.protocols:
            raise ValueError(f"eval.protocols: 'dreamrec_legacy' is for task 'denoising', found task {task!r}")
        return
    if c.horizon or c.request_gap or c.queries or c.alpha < 2.0:
        raise ValueError(
            f"loader: horizon = {c.horizon}, request_gap = {c.request_gap}, queries = {tuple(c.queries)}, alpha = "
            f"{c.alpha}: task 'denoising' generates the very next item from the whole history; use 0, 0, () and 2.0"
        )
    t = config.task
    if "dreamrec_legacy" in config.eval.protocols and t.sampler in denoising.ALL_SAMPLERS and not legacy_fits(t):
        raise ValueError(
            "eval.protocols: 'dreamrec_legacy' walks all steps of the chain by 'ddpm' ('closed_form' does too) and "
            f"scores by 'dot'; found {t.sampler!r} in {t.sampling_steps} steps (0: all), scored by {t.similarity!r}: "
            "take it out of eval.protocols"
        )


def legacy_fits(task: ml_collections.ConfigDict) -> bool:
    """Whether settings of task "denoising" sample and score as protocol "dreamrec_legacy" does."""
    sampler, steps = task.sampler in ("ddpm", "closed_form"), task.sampling_steps in (0, task.steps)
    return sampler and steps and task.similarity == "dot"


def _form(config: ml_collections.ConfigDict) -> str:
    return config.task.form if "form" in config.task else "collapsed"


def check_labels(task: Task, log: EventLog) -> None:
    """Raise ValueError for a head over a column that is no feedback, or that holds what such a head cannot learn."""
    for name, kind in task.heads:
        known = [key for key, column in log.columns.items() if column.kind in ("feedback", "extra")]
        if name not in known:
            raise ValueError(f"task: {name!r} ({kind}) is not a feedback column of {log.path}; it has {known}")
        if kind == "ordinal" and log.columns[name].cardinality == 2:
            raise ValueError(f"task.heads: {name!r} is 0 or 1, an ordinal head has nothing to order: expected 'binary'")
        values, (fits, expected) = log.events[name], LABELS[kind]
        for first in range(0, len(values), CHUNK):
            part = np.asarray(values[first : first + CHUNK])
            wrong = np.flatnonzero(~fits(part))
            if len(wrong):
                raise ValueError(
                    f"task: {name!r} of {log.path} is {part[wrong[0]]} at event {first + wrong[0]}: a head of kind "
                    f"{kind!r} expects {expected}"
                )


def train_loader(config: ml_collections.ConfigDict, task: Task, log: EventLog, view: splits.View) -> Loader:
    """Shuffled batches of a training view, shared by the processes; raises ValueError as check_labels does.

    Its examples are cut anew as loader.window says; the view, from which items are counted, has every event once.
    """
    check_labels(task, log)
    c = config.loader
    return Loader(
        log,
        CUTS[c.window](view, c.length) if c.window in CUTS else view,
        batch_size=c.batch_size,
        window=c.window if c.window in ("random", "spans") else "last",
        segments=c.segments,
        reach=_reach(config, c.horizon, c.positive),
        alpha=c.alpha,
        seed=config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        **_shape(config, task),
    )


def eval_loader(config: ml_collections.ConfigDict, task: Task, log: EventLog, view: splits.View) -> Loader:
    """One pass over a view in its order, the whole of it in every process."""
    reach = _reach(config, 0, "")
    return Loader(
        log,
        view,
        batch_size=config.eval.batch_size,
        shuffle=False,
        with_example=True,
        reach=reach,
        **_shape(config, task),
    )


def generation_loader(config: ml_collections.ConfigDict, task: Task, log: EventLog, view: splits.View) -> Loader:
    """One pass over a view of one target per example, one example a row, the whole of it in every process."""
    shape = _shape(config, task) | {"row_length": None, "layout": "padded"}
    return Loader(log, view, batch_size=config.eval.batch_size, shuffle=False, with_example=True, **shape)


def _shape(config: ml_collections.ConfigDict, task: Task) -> dict:
    c = config.loader
    return {"length": c.length, "row_length": c.row_length or None, "layout": c.layout, **task.columns}


def _reach(config: ml_collections.ConfigDict, horizon: int, positive: str) -> Reach | None:
    c = config.loader
    if not horizon and not c.request_gap:
        return None
    return Reach(horizon, positive, c.lag if c.request_gap else None, c.request_gap)
