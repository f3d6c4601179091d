"""Train several runs in one program: python -m recscale.train_pack --config=C1 --workdir=R1 --config=C2 --workdir=R2

What follows the module's name is, one run after the other, what would follow `python -m recscale.train`. The runs may
differ in their seed and in the numbers of population.HYPER. Each writes its own workdir as if it were alone, and may be
gone on with alone. A run that was finished before, that diverges, fails, or is held by another worker is left out; the
others go on. Exit status: 0 all done (diverged is a result too), 42 told to stop, all saved: run it again, 75 the rest
is done and another worker is on the missing ones, else a failure, with one line for each. One process, any number of
devices.
"""

import contextlib
import itertools
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from recscale.data.event_log import EventLogError
from recscale.events import process_origin
from recscale.lease import Held
from recscale.population import Population, check
from recscale.preemption import EXIT_HELD, EXIT_RESTART, Guard, Preempted
from recscale.training import Line, State, Training, progress
from recscale.worker import one_line

FAILURES = (Held, EventLogError, ValueError, TypeError, OSError)


class Member(Training):
    """A run of a pack. error: what ended it, and no other, before it was complete."""

    error: Exception | None = None

    @property
    def running(self) -> bool:
        """Whether there is something left to do."""
        return not self.ended and self.error is None

    def attempt(self, action: Callable[..., Any], *arguments: Any) -> Any:
        """The result of an action; an error of this run's config, data or files ends this run and no other."""
        try:
            return action(*arguments)
        except FAILURES as error:
            self.error = error
            print(f"{self.workdir}: {one_line(error)}", file=sys.stderr)
            self.__exit__(type(error), error, error.__traceback__)


def train_pack(
    configs: Mapping[Path, ConfigDict],
    mirrors: str = "",
    origin: float | None = None,
    devices: Sequence[Any] | None = None,
) -> dict[Path, dict[str, Any] | Exception]:
    """Train all to the end of their plans: workdir -> config becomes workdir -> record, or the error that ended it.

    mirrors: as for train.train; origin: time.monotonic() when the process began; devices: default all that are here.
    Raises ValueError, one line, where the configs cannot share a program, Preempted where the process was told to stop
    (everything is saved).
    """
    check({str(workdir): config for workdir, config in configs.items()})
    if jax.process_count() > 1:
        raise ValueError(f"a pack is one process, found {jax.process_count()}: start it once, on one machine")
    with contextlib.ExitStack() as stack:
        guard = stack.enter_context(Guard())
        members = [
            stack.enter_context(Member(config, workdir, mirrors, origin, guard)) for workdir, config in configs.items()
        ]
        for member in members:
            member.attempt(member.open)
        _train(*_started(members), guard, devices)
        return {member.workdir: member.error or member.book for member in members}


def _started(members: Sequence[Member]) -> tuple[list[Member], list[State | None]]:
    """The members that have steps to go, and the state of each, None for a fresh one."""
    first = None
    for member in _running(members):
        member.attempt(member.build, first)
        first = first or (member.run if member.running else None)
    states = {id(member): member.attempt(member.start) for member in _running(members)}
    members = _running(members)
    return members, [states[id(member)] for member in members]


def _train(members: list[Member], states: list[State | None], guard: Guard, devices: Sequence[Any] | None) -> None:
    """The loop: a step of all members, then what each of them has to do."""
    if not members:
        return
    population = Population([member.run for member in members], devices)
    state = population.put_members(population.init(), {i: x for i, x in enumerate(states) if x is not None})
    states.clear()
    for member in members:
        member.pack = (len(members), population.mesh.size)
    line, batches, waiting = Line(), [next(member.batches) for member in members], None
    while running := _running(members):
        state, values = population.step(state, batches, [member.step for member in members])
        leaving = any([member.attempt(member.worker.leaving) for member in running])
        if waiting is not None:  # the metrics of the step before are read while this one runs
            _read(members, waiting, line)
        for member in running:
            member.step += 1
        waiting = values
        if leaving or any(member.due or member.status != "ok" for member in running):
            _read(members, waiting, line)
            waiting = None
            leaving = _pause(members, population, state, guard)
        if leaving and _running(members):
            raise Preempted(f"told to stop; {len(_running(members))} runs are saved")
        batches = [next(m.batches) if m.running else batch for m, batch in zip(members, batches, strict=True)]


def _running(members: Sequence[Member]) -> list[Member]:
    return [member for member in members if member.running]


def _read(members: Sequence[Member], values: dict[str, jax.Array], line: Line) -> None:
    """Note the losses of the step that each member is at."""
    losses = np.asarray(values["loss"])
    for member, loss in zip(members, losses, strict=False):  # the last places may be filled up
        if member.running:
            member.attempt(member.read, member.step, float(loss))
    if running := _running(members):
        far = max(running, key=lambda member: member.run.steps - member.step)
        speed = sum(member.events_per_second for member in running)
        left = progress(far.step, far.run.steps, speed, sum(member.events_per_step for member in running))
        line.show(f"{len(running)} runs  step {far.step}/{far.run.steps}  {left}")


def _pause(members: Sequence[Member], population: Population, state: dict[str, Any], guard: Guard) -> bool:
    """Let each member do what is due; whether to leave, every member being saved at its step."""
    host = population.to_host(state)
    for i, member in enumerate(members):
        if member.running and (member.due or member.status != "ok" or guard.told):
            with contextlib.suppress(Preempted):  # in its evaluation: it is saved
                member.attempt(member.pause, population.member(host, i), guard.told)
    if guard.told:  # perhaps by now: those that were not told are saved too
        for i, member in enumerate(members):
            if member.running:
                member.attempt(member.pause, population.member(host, i), True)
    return guard.told


def parse(arguments: Sequence[str]) -> tuple[dict[Path, ConfigDict], str]:
    """The members and mirrors of a command line; each --config begins another member. Raises ValueError, one line."""
    starts = [i for i, word in enumerate(arguments) if re.match(r"--?config(=|$)", word)]
    if not starts or arguments[: starts[0]]:
        raise ValueError("expected --config=C1 --workdir=R1 --config=C2 --workdir=R2 ..., one pair for each run")
    configs: dict[Path, ConfigDict] = {}
    mirrors: list[str] = []
    for start, end in itertools.pairwise([*starts, len(arguments)]):
        words = ["train_pack", *arguments[start:end]]
        values = flags.FlagValues()
        config = config_flags.DEFINE_config_file("config", lock_config=True, flag_values=values, sys_argv=words)
        workdir = flags.DEFINE_string("workdir", None, "Folder of this run", flag_values=values)
        mirror = flags.DEFINE_string("mirror", "", "As for recscale.train", flag_values=values)
        rest = values(words)[1:]
        if rest or not workdir.value:
            raise ValueError(f"{' '.join(words[1:])}: expected --config=C --workdir=R, both of them and nothing else")
        if Path(workdir.value) in configs:
            raise ValueError(f"--workdir={workdir.value} is there twice: each run needs a folder of its own")
        configs[Path(workdir.value)] = config.value
        mirrors.append(mirror.value)
    if len(set(mirrors)) > 1:
        raise ValueError(f"--mirror: found {mirrors}, expected the same for all runs of a pack")
    return configs, mirrors[0]


def main(arguments: Sequence[str]) -> int:
    """Command line of the module docstring; returns the exit status."""
    logging.set_verbosity(logging.WARNING)
    try:
        configs, mirrors = parse(arguments)
        outcomes = train_pack(configs, mirrors, process_origin())
    except Preempted as error:
        print(error, file=sys.stderr)
        return EXIT_RESTART
    except (*FAILURES, flags.Error, KeyError, AttributeError) as error:
        print(one_line(error), file=sys.stderr)
        return 1
    failed = [found for found in outcomes.values() if isinstance(found, Exception)]
    for workdir, found in outcomes.items():
        if not isinstance(found, Exception):
            print(f"{workdir}: {found['status']}{found['reason'] and ': '}{found['reason']}")
    return 0 if not failed else EXIT_HELD if all(isinstance(error, Held) for error in failed) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
