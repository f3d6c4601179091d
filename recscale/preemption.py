"""Being told to stop: SIGTERM from a scheduler, Ctrl-C from a user. The run saves, says so, and leaves with status 42.

On one process the signal is caught here. On several, JAX's preemption service hears a SIGTERM on any of them and makes
all stop at the same poll; so all of them must poll at the same places.
"""

import signal
import sys
import threading
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

EXIT_RESTART = 42
"""Exit status of a run that has saved its state (or had nothing to lose) and wants to be started again."""
EXIT_HELD = 75
"""Exit status of a worker that found another one on its run folder, and did nothing."""
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Preempted(Exception):
    """The run was told to stop."""


class Guard:
    """Catches the signals while entered. Until `poll_only()`, a signal raises Preempted wherever the program is.

    Before training begins nothing but time can be lost: what is prepared is written under a temporary name. A second
    Ctrl-C ends the process as usual.
    """

    def __init__(self) -> None:
        self.told, self._at_once, self._polls = False, True, 0
        self._former: dict[int, Any] = {}

    def __enter__(self) -> "Guard":
        if threading.current_thread() is threading.main_thread() and jax.process_count() == 1:
            self._former = {number: signal.signal(number, self._hear) for number in SIGNALS}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, former in self._former.items():
            signal.signal(number, former)
        self._former = {}

    def poll_only(self) -> None:
        """From here on a signal is only noted: there is a state to be saved."""
        self._at_once = False

    def poll(self) -> bool:
        """Whether the run was told to stop: the same answer on every process. Call at the same places on each."""
        if jax.process_count() > 1:
            self._polls += 1
            self.told = self.told or multihost_utils.reached_preemption_sync_point(self._polls)
        return self.told

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.told = True
        if number == signal.SIGINT:
            print("\nsaving, then stopping; Ctrl-C again stops at once", file=sys.stderr)
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if self._at_once:
            raise Preempted("told to stop before training began")
