"""Many runs in one program: what differs between them are arrays, and the step is mapped over the runs.

The members of a population differ only in their seed and in numbers that enter a step as values (HYPER). The step of
one member, as `step.step_of` gives it, is vmapped over the members of a device; every device of the mesh, whose one
axis is "population", works on members of its own and exchanges nothing with the others. So a member lives on one device
whatever its config says of a mesh: its losses do not depend on that. Members need not be at the same step.

Numbers that enter the loss or the optimizer are arguments of the program, not constants: another sweep of the same
shapes finds it in the compilation cache. Learning rates are looked up beforehand, one per member and step.
"""

import copy
import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from recscale.layers.tables import Tables, Update
from recscale.mesh import make_mesh
from recscale.program import Program, dense_optimizer, draw_dense, draw_tables, shardings
from recscale.run import Run
from recscale.step import step_of

AXIS = "population"
MEMBERS = PartitionSpec(AXIS)
# What members may differ in besides seed and names -> where it enters the step: as the learning rates of that step, or
# as an argument of the optimizer, of the table's update, or of the task.
HYPER: dict[str, str] = {
    "optim.learning_rate": "rate",
    "optim.schedule": "rate",
    "optim.warmup": "rate",
    "optim.decay": "rate",
    "table.learning_rate": "rate",
    "table.warmup": "rate",
    "optim.b1": "optimizer",
    "optim.b2": "optimizer",
    "optim.weight_decay": "optimizer",
    "table.weight_decay": "table",
    "task.temperature": "task",
    "task.gbce_t": "task",
}
FREE = ("seed", "study", "cell")  # sections and keys that shape no program

State = dict[str, Any]


def groups(configs: Mapping[str, ConfigDict]) -> list[list[str]]:
    """Cells that can train together: name -> config becomes lists of names, in the order in which they come."""
    found: dict[str, list[str]] = {}
    for name, config in configs.items():
        shape = {key: value for key, value in _flat(config).items() if key not in HYPER}
        alone = name if _cannot_be_packed(config) else ""
        found.setdefault(json.dumps([alone, shape], sort_keys=True), []).append(name)
    return list(found.values())


def check(configs: Mapping[str, ConfigDict]) -> None:
    """Raise ValueError, one line that names the keys, where these cells cannot train in one program."""
    (first, config), *others = configs.items()
    for name, other in configs.items():
        if problem := _cannot_be_packed(other):
            raise ValueError(f"{name}: {problem}")
    base = _flat(config)
    for name, other in others:
        theirs = _flat(other)
        absent = object()
        differing = [k for k in base | theirs if k not in HYPER and base.get(k, absent) != theirs.get(k, absent)]
        if differing:
            values = (f"{k} ({_shown(base, k)}, {_shown(theirs, k)})" for k in sorted(differing)[:4])
            raise ValueError(
                f"{first} and {name} cannot train in one program, they differ in {', '.join(values)}: members may "
                f"differ in seed, cell, {', '.join(HYPER)}; run the others on their own"
            )


def differing(configs: Sequence[ConfigDict]) -> list[str]:
    """The keys of HYPER that enter as arguments of the program and are not the same in all configs."""
    flat = [_flat(config) for config in configs]
    return [key for key, part in HYPER.items() if part != "rate" and len({values[key] for values in flat}) > 1]


def _cannot_be_packed(config: ConfigDict) -> str:
    m = config.mesh
    if m.accumulate > 1 and m.replica * m.data * m.model > 1:  # dropout is drawn by part, and parts follow the mesh
        return (
            f"mesh.accumulate = {m.accumulate} on several devices: as a member of a population it would draw otherwise"
        )
    return ""


def _flat(config: ConfigDict) -> dict[str, Any]:
    """ "section.key" -> value of what may shape a program."""

    def leaves(value: Mapping[str, Any], prefix: str):
        for key, child in value.items():
            if isinstance(child, Mapping):
                yield from leaves(child, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", list(child) if isinstance(child, tuple) else child

    return dict(leaves({key: value for key, value in config.to_dict().items() if key not in FREE}, ""))


def _shown(values: Mapping[str, Any], key: str) -> str:
    return repr(values[key]) if key in values else "absent"


class LocalTables(Tables):
    """Tables of a member: all on the device that the member lives on, inside a program mapped over members."""

    def each(self, function, in_specs, out_specs):
        """The function itself: this device holds every part."""
        return function

    def _device(self):
        return jnp.zeros((), jnp.int32)

    def update(self, name, array, slots, position, grads, how, step, key, dense=None):
        """As for a single run; a weight decay that is an array becomes part of the row's rule."""
        if isinstance(how.weight_decay, jax.Array):
            how = Update(how.rule._replace(step=_decayed(how)), how.learning_rate, 0.0)
        return super().update(name, array, slots, position, grads, how, step, key, dense)


def _decayed(how: Update):
    def step(rows, slots, grads, rate, count):
        new, slots = how.rule.step(rows, slots, grads, rate, count)
        return new - rate * how.weight_decay * rows, slots

    return step


def tuned(program: Program, rates: Mapping[str, Any], values: Mapping[str, Any]) -> Program:
    """The program at a step of one member: its learning rates ("dense", "table") and the keys of HYPER in `values`."""

    def of(part: str) -> dict[str, Any]:
        return {key.partition(".")[2]: value for key, value in values.items() if HYPER[key] == part}

    task = copy.copy(program.task)
    task.config = copy.copy(program.task.config)
    vars(task.config).update(of("task"))  # not dataclasses.replace: a traced number cannot be checked again
    optimizer = dense_optimizer(
        program.config,
        program.model,
        program.model_config,
        lambda _: rates["dense"],
        program.task.inside,
        **of("optimizer"),
    )
    return dataclasses.replace(
        program,
        task=task,
        optimizer=optimizer,
        table_learning_rate=lambda _: rates["table"],
        table_weight_decay=values.get("table.weight_decay", program.table_weight_decay),
    )


class Population:
    """The program of some runs that `check` lets together. A state, batch or metric has its members along axis 0.

    runs: the members. devices: those to use, default all of the machine. The members are shared evenly by as few of
    them as do the work in the same time; `places` counts the rows of axis 0: where the members do not fill the last
    device, the last of them is there more than once.
    """

    def __init__(self, runs: Sequence[Run], devices: Sequence[Any] | None = None):
        here = list(jax.devices() if devices is None else devices)
        self.runs, self.each = list(runs), -(-len(runs) // len(here))
        used = -(-len(runs) // self.each)
        self.mesh = Mesh(np.array(here[:used]), (AXIS,))
        self.places = [min(i, len(runs) - 1) for i in range(used * self.each)]
        self.sharding = NamedSharding(self.mesh, MEMBERS)
        first, alone = self.runs[0], make_mesh(1, 1, 1, here[:1])
        self.program = dataclasses.replace(first, mesh=alone, tables=LocalTables(first.tables.specs, alone))
        self._layout, last = shardings(first), max(run.steps for run in runs)
        self._rates = {
            "dense": np.stack([_over(run.learning_rate, last) for run in runs]),
            "table": np.stack([_over(run.table_learning_rate, last) for run in runs]),
        }
        keys = differing([run.config for run in runs])
        values = {key: [_flat(self.runs[i].config)[key] for i in self.places] for key in keys}
        self.values = self._put({key: np.array(value, np.float32) for key, value in values.items()})
        self._step = jax.jit(self._mapped(self._one), donate_argnums=0)

    def init(self) -> State:
        """The state of all members at step 0."""
        seeds = np.array([self.runs[i].config.seed for i in self.places], np.uint32)
        state = jax.jit(self._mapped(self._draw))(self._put(seeds))
        for name in self.runs[0].fixed:
            array = self.program.tables.arrays[name]
            state["tables"][name] = self._put(np.stack([array.place(self.runs[i].fixed[name]) for i in self.places]))
        return state

    def step(self, state: State, batches: Sequence[dict[str, np.ndarray]], steps: Sequence[int]):
        """(state, metrics) after a step of every member. batches, steps: of each run; the step it is about to take,
        from 0. Donates the state."""
        batch = {name: np.stack([batches[i][name] for i in self.places]) for name in batches[0]}
        at = np.minimum(np.array([steps[i] for i in self.places]), self._rates["dense"].shape[1] - 1)
        rates = {name: table[self.places, at] for name, table in self._rates.items()}
        return self._step(state, *self._put((batch, rates)), self.values)

    def to_host(self, state: State) -> State:
        """A copy of the state in the host's memory, for `member`."""
        return jax.tree.map(np.array, state)

    def member(self, host: State, index: int) -> State:
        """The train state of run `index` from `to_host`, laid out as that run would have it."""
        return jax.device_put(jax.tree.map(lambda x: x[index], host), self._layout)

    def put_members(self, state: State, members: Mapping[int, State]) -> State:
        """The state with these runs at the train states given."""
        if not members:
            return state
        host = self.to_host(state)
        for place, index in enumerate(self.places):
            if index in members:
                jax.tree.map(lambda x, y, place=place: x.__setitem__(place, np.asarray(y)), host, members[index])
        return self._put(host)

    def _one(self, state, batch, rates, values):
        return step_of(tuned(self.program, rates, values))(state, batch)

    def _draw(self, seed):
        tables = draw_tables(self.program, seed)
        return tables | draw_dense(self.program, seed, tables["mixers"])

    def _mapped(self, function):
        return jax.shard_map(jax.vmap(function), mesh=self.mesh, in_specs=MEMBERS, out_specs=MEMBERS, check_vma=False)

    def _put(self, tree):
        return jax.device_put(tree, self.sharding)


def _over(schedule, steps: int) -> np.ndarray:
    """The learning rate of each step, float32 [steps]."""
    return np.broadcast_to(np.asarray(schedule(jnp.arange(steps)), np.float32), (steps,))
