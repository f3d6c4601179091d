"""What a train step is to do, told by its config and model: events, FLOPs by part, weights and rows that it reads."""

import dataclasses
import math
from typing import Any

import jax
import ml_collections

from recscale import program as programs
from recscale import reading
from recscale.data.event_log import EventLog

TRAIN_MULTIPLIER = 3  # a backward pass costs two forward passes


@dataclasses.dataclass(frozen=True)
class Work:
    """What a step is to do, told by the model and the config, not by the compiler.

    flops: of one step on all devices, by part, without recomputation. weights: bytes of the dense weights at the type
    of the compute. passes: how often a step reads them. rows: bytes of table rows that a device looks up per step.
    states: bytes of the inputs of all layers that a device holds at once.
    """

    events: int
    flops: dict[str, float]
    dtype: str
    weights: float
    passes: int
    rows: float
    states: int


def open_program(config: ml_collections.ConfigDict, devices: list[Any]) -> tuple[programs.Program, int]:
    """The program of a config on the devices, and how many events it will train on (over all epochs)."""
    programs.check_config(config)
    items, events = config.data.num_items, config.data.num_events
    cardinalities: dict[str, int] = {}
    if not items or not events or config.loader.queries or config.loader.inputs:
        log = EventLog.open(config.data.path)
        items, events = items or log.num_items, events or log.num_events
        cardinalities = reading.cardinalities(config, log)
    total = math.ceil(events * config.train.epochs)
    steps = max(1, math.ceil(total / events_per_step(config)))
    return programs.program(config, items, cardinalities, steps, devices), total


def histories_per_step(config: ml_collections.ConfigDict) -> int:
    """Histories of full length in a batch."""
    row = config.loader.row_length or config.loader.length
    return config.loader.batch_size * max(1, row // config.loader.length)


def events_per_step(config: ml_collections.ConfigDict) -> int:
    """Events in a batch of full rows."""
    return histories_per_step(config) * config.loader.length


def work_of(run: programs.Program, num_items: int) -> Work:
    """What a step of a program is to do."""
    config = run.config
    events = events_per_step(config)
    tokens = config.loader.length * run.task.tokens_per_event + run.task.prefix
    forward = dict(run.model.flops(run.model_config, tokens))
    flops = {part: histories_per_step(config) * value for part, value in forward.items()}
    dim = config.model.embed_dim
    flops["head"] = events * run.task.head_flops(dim)
    dtype = config.model.dtype if "dtype" in config.model else "float32"
    itemsize = jax.numpy.dtype(dtype).itemsize
    width = config.model.width if "width" in config.model else dim
    groups = run.model.param_groups(run.model_config)
    passes = config.mesh.accumulate * (2 if config.mesh.remat == "none" else 3)
    touched = events * (1 + len(run.task.features)) + (0 if run.task.needs_catalogue else events)
    return Work(
        events=events,
        flops={part: TRAIN_MULTIPLIER * value for part, value in flops.items()},
        dtype=dtype,
        weights=groups["dense"] * itemsize,
        passes=passes,
        rows=4.0 * dim * touched / run.mesh.size,
        states=int(width * (config.model.depth + 1) * itemsize * events / run.mesh.size / config.mesh.accumulate),
    )
