"""One private SLURM cluster for all tests of this folder. They skip where SLURM is not installed; with
RECSCALE_REQUIRE_SLURM=1 they fail there instead."""

import os
from collections.abc import Callable, Iterator

import pytest

from tests.slurm.cluster import Cluster, missing
from tests.slurm.sweeps import Sweep


@pytest.fixture(scope="session")
def running_cluster() -> Iterator[Cluster]:
    if reason := missing():
        if os.environ.get("RECSCALE_REQUIRE_SLURM") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    cluster = Cluster()
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="session", autouse=True)
def limited(running_cluster: Cluster, tmp_path_factory) -> dict[str, Sweep]:
    """Two sweeps with a time limit of a minute, on a node of their own, submitted before the first test begins.

    The first is told 50 s before the limit; the second does not heed that and is still at work when its time is up.
    """
    found = {}
    for name, steps, deaf in (("told", 450, 0), ("late", 1000, 1)):
        cells = {"a": {"steps": steps, "seconds": 0.1, "save_seconds": 1.0, "deaf": deaf}}
        limits = {"time": "00:01:00", "signal_seconds": 50}
        found[name] = Sweep(running_cluster, tmp_path_factory.mktemp(name), cells, partition="calm", **limits)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", running_cluster.environment["SLURM_CONF"])
        for mine in found.values():
            mine.submit()
    return found


@pytest.fixture
def cluster(running_cluster: Cluster, monkeypatch) -> Iterator[Cluster]:
    """The cluster, idle, and this process speaks with it."""
    monkeypatch.setenv("SLURM_CONF", running_cluster.environment["SLURM_CONF"])
    yield running_cluster
    running_cluster.empty("cpu", "urgent")


@pytest.fixture
def sweep(cluster: Cluster, tmp_path) -> Callable[..., Sweep]:
    """sweep({cell: options}, **settings) makes a Sweep in a folder of its own, with a blank in its path."""

    def make(cells: dict[str, dict[str, float]], **settings: object) -> Sweep:
        return Sweep(cluster, tmp_path / "my runs", cells, **settings)

    return make
