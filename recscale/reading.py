"""What a config reads of a log: its views, the features it embeds, and loaders over the views."""

import jax
import ml_collections

from recscale.data import splits
from recscale.data.event_log import EventLog
from recscale.data.features import known_before, open_feature
from recscale.data.loading import Loader
from recscale.data.reach import Reach
from recscale.tasks.next_item import Task


def views(config: ml_collections.ConfigDict, log: EventLog) -> dict[str, splits.View]:
    """The sides of the config's split, training as small as config.data says; raises ValueError for a name unknown."""
    arguments = dict(config.split)
    name = arguments.pop("name")
    if name not in splits.SPLITS:
        raise ValueError(f"split.name = {name!r}: expected one of {tuple(splits.SPLITS)}")
    found = splits.SPLITS[name](log, **arguments)
    if config.data.users:
        found["train"] = splits.limit_users(found["train"], config.data.users)
    if config.data.events_per_user:
        found["train"] = splits.limit_events(found["train"], config.data.events_per_user)
    if config.loader.window == "all":
        found["train"] = splits.in_windows(found["train"], config.loader.length)
    for split in (*config.eval.final, *([config.eval.during] if config.train.eval_every else [])):
        if split not in found:
            raise ValueError(f"eval: split.name = {config.split.name!r} gives {tuple(found)}, not {split!r}")
    return found


def cardinalities(config: ml_collections.ConfigDict, log: EventLog) -> dict[str, int]:
    """Ids of each feature that the config embeds, 0 = unknown among them.

    Raises ValueError for a query feature that is not known before its item, and for what needs times where there are
    none or lets a model see the time of an event it is not trained on.
    """
    c, where = config.loader, config.data.path
    for name in c.queries:
        if not known_before(log, name):
            known = [key for key in (*log.columns, "hour", "weekday") if known_before(log, key)]
            raise ValueError(f"loader.queries: {name!r} is not a context column of {where}; it has {known}")
    timed = "time_bias" in config.model and config.model.time_bias
    if timed and "timestamp" not in log.columns:
        raise ValueError(f"model.time_bias needs timestamps, {where} has none: set it to False")
    causal = "query_time" in config.model and config.model.query_time == "last_event"
    if c.horizon and (c.queries or (timed and not causal)):
        raise ValueError(
            f"loader.horizon = {c.horizon} trains on later events than the next: use no loader.queries and no "
            "time bias but one with model.query_time = 'last_event'"
        )
    if c.request_gap and "form" in config.task and config.task.form != "collapsed":
        raise ValueError(
            f"loader.request_gap = {c.request_gap} with task.form = {config.task.form!r}: only collapsed tokens can be "
            "read from an older state of the user"
        )
    return {name: open_feature(log, name).cardinality for name in dict.fromkeys((*c.inputs, *c.queries))}


def train_loader(config: ml_collections.ConfigDict, task: Task, log: EventLog, view: splits.View) -> Loader:
    """Shuffled batches of a training view, shared by the processes."""
    c = config.loader
    return Loader(
        log,
        view,
        batch_size=c.batch_size,
        window="random" if c.window == "random" else "last",
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


def _shape(config: ml_collections.ConfigDict, task: Task) -> dict:
    c = config.loader
    return {"length": c.length, "row_length": c.row_length or None, "layout": c.layout, **task.columns}


def _reach(config: ml_collections.ConfigDict, horizon: int, positive: str) -> Reach | None:
    c = config.loader
    if not horizon and not c.request_gap:
        return None
    return Reach(horizon, positive, c.lag if c.request_gap else None, c.request_gap)
