"""Goodput of runs whose time is known to the second, whatever happened to them and to the machine's clock."""

import json
import random
from pathlib import Path

import pytest

from recscale.events import read_events
from recscale.goodput import CAUSES, Goodput, goodput, summary


class Log:
    """Writes rows as a run does; `wall` and `clock` go on together, the wall clock can be set."""

    def __init__(self):
        self.rows: list[dict] = []
        self.wall, self.clock, self.attempt = 1_000_000.0, 0.0, -1

    def pause(self, seconds: float) -> "Log":
        self.wall += seconds
        self.clock += seconds
        return self

    def add(self, event: str, after: float = 0.0, **fields) -> "Log":
        self.pause(after)
        row = {"event": event, "wall": self.wall, "clock": self.clock, "attempt": self.attempt}
        self.rows.append(row | fields)
        return self

    def begin(self, down: float = 0.0, step: int = 0, compiled: bool = True) -> "Log":
        """A process starts, is ready after 3 s, and has done its first step after 4 more."""
        self.pause(down)
        self.clock, self.attempt = 0.0, self.attempt + 1
        self.add("start", after=1.0, host="h", pid=1, processes=1).add("ready", after=2.0, step=step)
        return self.add("compiled", after=4.0, step=step + 1) if compiled else self


def check(log: Log, trained: float, attempts: int = 1, jumps: int = 0, **causes: float) -> Goodput:
    """Trained seconds and causes are exactly these, the rest 0; they add up to the wall time."""
    found = goodput(log.rows)
    expected = dict.fromkeys(CAUSES, 0.0) | {name.replace("start_up", "start-up"): s for name, s in causes.items()}
    assert found.causes == pytest.approx(expected, abs=1e-6)
    assert found.trained == pytest.approx(trained) and (found.attempts, found.jumps) == (attempts, jumps)
    assert found.wall == found.trained + sum(found.causes.values())
    return found


def unbroken() -> Log:
    """20 s of steps, 3 s of evaluation, 1 s of saving, 0.5 s at the end."""
    log = Log().begin().add("alive", 5.0, step=11, steps=41).add("alive", 5.0, step=21, steps=41)
    log.add("evaluation", 5.0 + 2.0, step=31, split="val", seconds=2.0).add("save", 0.5, step=31, seconds=0.5)
    log.add("alive", 5.0, step=41, steps=41).add("save", 0.5, step=41, seconds=0.5)
    return log.add("evaluation", 1.0, step=41, split="test", seconds=1.0).add("done", 0.5, step=41, status="ok")


def test_an_unbroken_run():
    found = check(unbroken(), 20.0, start_up=3.0, compilation=4.0, evaluation=3.0, saving=1.0, other=0.5)
    assert found.wall == pytest.approx(31.5) and found.share == pytest.approx(20 / 31.5)
    text = "63.5% of 31.5 s trained; start-up 9.5%, compilation 12.7%, evaluation 9.5%, saving 3.2%, other 1.6%"
    assert found.text() == f"{text}, 1 attempt"


def test_nothing_and_almost_nothing():
    empty = check(Log(), 0.0, attempts=0)
    assert (empty.wall, empty.share, empty.text()) == (0.0, 0.0, "no time recorded")
    log = Log()
    log.attempt = 0
    check(log.add("start", 1.5), 0.0, start_up=1.5)
    check(log.add("ready", 1.5, step=0), 0.0, start_up=3.0)


def test_what_a_killed_attempt_did_after_its_save_is_lost():
    """kill -9 at step 25: saved at 21, 4 of the last 20 steps' 10 s are done again; 6 s pass until the next process."""
    log = Log().begin().add("alive", 10.0, step=21, steps=41).add("save", 0.5, step=21, seconds=0.5)
    log.add("alive", 2.0, step=25, steps=41).begin(down=6.0, step=21)
    log.add("alive", 9.5, step=41, steps=41).add("done", step=41, status="ok")
    check(log, 19.5, attempts=2, start_up=6.0, compilation=8.0, saving=0.5, lost=2.0, down=6.0)


@pytest.mark.parametrize("saved", [0, 1, 7, 10, 11])
def test_the_part_of_a_stretch_beyond_the_save_is_lost(saved):
    """The save lies between two signs of life: steps 2 to 11 in 10 s, of which those after it are done again."""
    log = Log().begin().add("alive", 10.0, step=11, steps=41).begin(step=saved)
    again = min(11 - saved, 10)
    check(log.add("alive", 2.0, step=saved + 3), 12.0 - again, attempts=2, start_up=6.0, compilation=8.0, lost=again)


def test_a_broken_checkpoint_loses_the_work_of_all_attempts_after_it():
    log = Log().begin().add("alive", 10.0, step=11, steps=41).begin(step=11).add("alive", 9.0, step=21, steps=41)
    check(log.begin(step=0), 0.0, attempts=3, start_up=9.0, compilation=12.0, lost=19.0)


def test_a_preempted_run_loses_nothing_but_the_pause():
    log = Log().begin().add("save", 3.0 + 1.0, step=4, seconds=1.0).add("preempted", 0.25, step=4)
    log.begin(down=100.0, step=4).add("alive", 5.0, step=10, steps=10).add("done", step=10, status="ok")
    check(log, 8.0, attempts=2, start_up=6.0, compilation=8.0, saving=1.0, down=100.0, other=0.25)


def test_a_run_that_failed_between_signs_of_life():
    log = Log().begin().add("alive", 5.0, step=10, steps=40).add("failed", 3.0, step=10, reason="disk full")
    check(log, 5.0, start_up=3.0, compilation=4.0, lost=3.0)


@pytest.mark.parametrize("event", ["failed", "preempted"])
def test_an_attempt_that_ended_before_its_first_step(event):
    check(Log().begin(compiled=False).add(event, 2.0, step=0), 0.0, start_up=3.0, compilation=2.0)
    log = Log()
    log.attempt = 0
    check(log.add("start", 1.0).add(event, 2.0, step=0), 0.0, start_up=3.0)


def test_a_run_taken_up_at_its_last_step_compiles_nothing():
    log = Log().begin(step=40, compiled=False).add("evaluation", 2.5, step=40, split="test", seconds=2.0)
    check(log.add("done", 0.5, step=40, status="ok"), 0.0, start_up=3.0, evaluation=2.0, other=1.0)


@pytest.mark.parametrize("jump", [-1e9, -3600.0, 3600.0, 1e9])
def test_a_clock_that_is_set_while_the_run_lives_changes_nothing(jump):
    log = Log().begin().add("alive", 5.0, step=11, steps=41)
    log.wall += jump
    log.add("alive", 5.0, step=21, steps=41).begin(down=6.0, step=21).add("alive", 5.0, step=41, steps=41)
    check(log, 15.0, attempts=2, start_up=6.0, compilation=8.0, down=6.0)


@pytest.mark.parametrize(
    ("jump", "down", "jumps"), [(-1e9, 0.0, 1), (-3600.0, 0.0, 1), (-7.0, 0.0, 0), (1e9, 0.0, 1), (3600.0, 3606.0, 0)]
)
def test_a_clock_that_is_set_between_attempts_gives_no_absurd_gap(jump, down, jumps):
    """A jump forward of less than 30 days cannot be told from a pause."""
    log = Log().begin().add("alive", 5.0, step=11, steps=41)
    log.wall += jump
    log.begin(down=6.0, step=11).add("alive", 5.0, step=21, steps=41)
    found = check(log, 10.0, attempts=2, jumps=jumps, start_up=6.0, compilation=8.0, down=down)
    assert ("1 gaps unknown" in found.text()) == bool(jumps)


def test_an_attempt_whose_first_row_was_not_written_is_an_attempt():
    """A full disk took its start, so that the next attempt has its number again."""
    log = Log().begin().add("alive", 5.0, step=11, steps=41).begin(step=11).add("alive", 5.0, step=21, steps=41)
    log.rows = [row | {"attempt": 0} for row in log.rows]
    log.rows = [row for i, row in enumerate(log.rows) if not (row["event"] == "start" and i)]
    check(log, 10.0, attempts=2, start_up=6.0, compilation=8.0)


def test_seconds_that_cannot_be_are_cut():
    log = Log().begin().add("save", 1.0, step=5, seconds=50.0).add("evaluation", 1.0, step=5, seconds=-3.0)
    check(log.add("save", 0.5, step=5), 0.0, start_up=3.0, compilation=4.0, saving=1.0, other=1.5)


def test_causes_add_up_whatever_happens():
    """Random rows: every second of every attempt is somewhere, and none is negative."""
    draw = random.Random(0)
    for _ in range(200):
        log, wanted = Log(), 0.0
        for _ in range(draw.randint(1, 4)):
            down = draw.choice([0.0, draw.uniform(0, 50)])
            wanted += down if log.rows else 0.0
            log.begin(down, step=draw.randint(0, 30), compiled=draw.random() < 0.8)
            for _ in range(draw.randint(0, 6)):
                event = draw.choice(["alive", "save", "evaluation", "failed", "preempted", "done"])
                log.add(event, draw.uniform(0, 9), step=draw.randint(0, 40), seconds=draw.uniform(-1, 9))
            wanted += log.clock
        found = goodput(log.rows)
        assert found.wall == found.trained + sum(found.causes.values()) and found.wall == pytest.approx(wanted)
        assert min(found.trained, *found.causes.values()) >= 0 and 0 <= found.share <= 1


def test_many_runs_are_added_up():
    one = goodput(unbroken().rows)
    both = summary([one, one, goodput([])])
    assert both.wall == pytest.approx(2 * one.wall) and both.attempts == 2
    assert both.share == pytest.approx(one.share) and both.wall == both.trained + sum(both.causes.values())
    assert summary([]).text() == "no time recorded"


def test_from_a_file_whose_last_line_was_cut(tmp_path: Path):
    rows = unbroken().rows
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "events.jsonl").write_text(text + text[:30])
    assert goodput(read_events(tmp_path)) == goodput(rows)
    assert goodput(read_events(tmp_path / "none")).wall == 0
