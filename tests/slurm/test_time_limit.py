"""Cells that take longer than their time limit lets them: each limit is one restart. They run beside the other tests,
from the first of them on (conftest.py): SLURM counts limits in minutes, and looks at them twice a minute."""

import pytest

from tests.slurm.sweeps import undisturbed

pytestmark = pytest.mark.slurm


def test_a_cell_is_told_before_its_time_limit_saves_and_requeues_itself(cluster, limited):
    mine = limited["told"]
    mine.wait(150)
    assert mine.done("a") and mine.attempts("a") >= 2, mine.story()
    assert mine.losses("a") == undisturbed(len(mine.losses("a")))
    assert "a: saved its state; requeued, restart 1 of at most 20" in mine.said() and "told to stop" not in mine.said()


def test_a_cell_that_saves_only_after_its_time_limit_is_requeued_too(cluster, limited):
    """SLURM is ending the job by then, and would not start it again by itself."""
    mine = limited["late"]
    mine.wait(200)
    assert mine.done("a") and mine.attempts("a") == 2, mine.story()
    assert mine.losses("a") == undisturbed(len(mine.losses("a")))
    assert "told to stop" in mine.said() and "requeued, restart 1" in mine.said()
