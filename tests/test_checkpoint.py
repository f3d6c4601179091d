"""Checkpoints: what comes back is what was saved, on any mesh, whatever a kill or a bad disk left behind."""

import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from recscale.checkpoint import BrokenCheckpoint, Checkpoints, digest
from recscale.mesh import BATCH, REPLICATED, make_mesh

ROOT = Path(__file__).resolve().parent.parent
ROWS = BATCH  # a table's rows lie over all devices, as those of a batch


def state_on(data: int, model: int, seed: int = 1, rows: int = 4096) -> dict:
    """A state with sharded tables and slots of several types, a model of two arrays and a step counter."""
    mesh = make_mesh(1, data, model)
    draw = np.random.default_rng(seed).normal(size=(rows, 4)).astype(np.float32)
    by_row = {
        "item": draw,
        "item.codes": (draw * 100).astype(np.int32).astype(np.uint8),
        "half": draw.astype(jnp.bfloat16),
    }
    slots = {"item": {"accumulator": draw[:, 0] ** 2, "touched": draw[:, 1] > 0}}
    whole = {"step": np.int32(7 * seed), "model": [draw[:2], np.float32([1e-40, np.nan, -0.0])]}
    return jax.device_put(whole, NamedSharding(mesh, REPLICATED)) | jax.device_put(
        {"tables": by_row, "table_state": slots}, NamedSharding(mesh, ROWS)
    )


def assert_same_bits(one, other) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


def saved(folder: Path, *seeds: int) -> Path:
    """Checkpoints of `state_on(2, 4, seed)` at step = seed."""
    with Checkpoints(folder, keep=len(seeds)) as checkpoints:
        for seed in seeds:
            checkpoints.save(seed, state_on(2, 4, seed), {"next_index": seed})
    return folder


def array_files(step: Path) -> list[Path]:
    """The files that hold the numbers, some of them only interim versions of the index."""
    return sorted((step / "state" / "ocdbt.process_0" / "d").iterdir())


def truncate(step: Path) -> None:
    for path in array_files(step):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 10])


def flip_bits(step: Path) -> None:
    """Ten bits spread over the largest file: one of them at least lies in an array."""
    path = max(array_files(step), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    for place in range(5, 100, 10):
        content[len(content) * place // 100] ^= 1
    path.write_bytes(content)


def empty(step: Path) -> None:
    shutil.rmtree(step)
    step.mkdir()


def swap_arrays(step: Path) -> None:
    """Perfectly readable, and wrong."""
    shutil.rmtree(step / "state")
    shutil.copytree(step.parent / "1" / "state", step / "state")


@pytest.mark.parametrize("mesh", [(2, 4), (8, 1), (1, 1)])
def test_a_state_comes_back_bit_for_bit_on_any_mesh(mesh, tmp_path):
    before = state_on(4, 2)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.latest() is None and checkpoints.restore_newest(before) is None
        checkpoints.save(7, before, {"next_index": 7})
    like = state_on(*mesh, seed=2)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.latest() == 7
        found, data = checkpoints.restore(7, like)
        step, again, _ = checkpoints.restore_newest(abstract)
    assert data == {"next_index": 7} and step == 7
    for state in (found, again):
        assert_same_bits(state, before)
        assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(lambda x: x.sharding, like)


def test_a_save_outlives_the_donation_of_its_buffers(tmp_path):
    """The next step overwrites the arrays while they are still being written."""
    state = state_on(1, 1)
    expected = jax.tree.map(np.array, state)
    step = jax.jit(lambda s: jax.tree.map(lambda x: (x * 0 + 9).astype(x.dtype), s), donate_argnums=0)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(1, state, {"next_index": 1})
        for _ in range(3):
            state = step(state)
        checkpoints.save(2, state, {"next_index": 2})
        checkpoints.wait()
        assert_same_bits(checkpoints.restore(1, state)[0], expected)


def test_only_the_newest_are_kept_and_none_is_written_twice(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state_on(1, 1, step), {"next_index": step})
        checkpoints.save(3, state_on(1, 1, 50), {"next_index": 50})
        checkpoints.save(2, state_on(1, 1, 50), {"next_index": 50})  # an older step cannot come back either
        checkpoints.wait()
        assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "3"]
        found, data = checkpoints.restore(3, state_on(1, 1))
    assert int(found["step"]) == 21 and data == {"next_index": 3}
    saved(tmp_path, 4, 5)  # by another process
    assert sorted(p.name for p in tmp_path.iterdir()) == ["4", "5"]


def test_a_save_leaves_the_polls_for_preemption_alone(tmp_path, monkeypatch):
    """Two who poll with numbers of their own make a notice name a poll that is past; see recscale/preemption.py."""
    polls = []
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", lambda number: bool(polls.append(number)))
    saved(tmp_path, 1, 2)
    assert polls == []


def test_what_a_killed_write_left_is_ignored_and_removed(tmp_path):
    saved(tmp_path, 1)
    (tmp_path / "2.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.latest() == 1
        checkpoints.restore(1, state_on(1, 1))
    assert [p.name for p in tmp_path.iterdir()] == ["1"]


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda t: t | {"item": jnp.zeros((2048, 4))}, "tables.item"),
        (lambda t: t | {"item": t["item"].astype(jnp.bfloat16)}, "tables.item"),
        (lambda t: t | {"other": jnp.zeros(2)}, "tables.other"),
        (lambda t: {k: v for k, v in t.items() if k != "half"}, "tables.half"),
    ],
    ids=["shape", "dtype", "missing", "extra"],
)
def test_a_checkpoint_of_another_config_is_refused(change, name, tmp_path):
    """Never by falling back to an older one, and nothing is moved."""
    saved(tmp_path, 1, 2)
    wanted = state_on(1, 1)
    wanted["tables"] = change(wanted["tables"])
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for restore in (lambda: checkpoints.restore(2, wanted), lambda: checkpoints.restore_newest(wanted)):
            with pytest.raises(ValueError, match=rf"does not fit this config; it differs in \['{name}'\]") as error:
                restore()
            assert not isinstance(error.value, BrokenCheckpoint)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2"]


def test_only_tables_may_change_their_packing(tmp_path):
    saved(tmp_path, 1)
    wanted = state_on(1, 1)
    wanted["model"][0] = wanted["model"][0].reshape(4, 2)
    with Checkpoints(tmp_path, keep=1) as checkpoints, pytest.raises(ValueError, match=r"differs in \['model\.0'\]"):
        checkpoints.restore(1, wanted)


@pytest.mark.parametrize("mesh", [(2, 4), (1, 1), (1, 3)])
@pytest.mark.parametrize(("stored", "packed"), [((96, 64), (48, 128)), ((100, 128), (200, 64)), ((100, 64), (50, 128))])
def test_rows_of_a_table_come_back_packed_otherwise(stored, packed, mesh, tmp_path):
    """The same numbers in the same order, also where the stored rows do not divide by the devices."""
    numbers = np.random.default_rng(0).normal(size=packed[0] * packed[1]).astype(np.float32)
    one, many = make_mesh(1, 1, 1), make_mesh(1, *mesh)
    before = {"tables": {"item": numbers.reshape(stored)}, "table_state": {"item": {"mean": numbers.reshape(stored)}}}
    rows = NamedSharding(many, ROWS if packed[0] % many.size == 0 else REPLICATED)
    like = jax.ShapeDtypeStruct(packed, np.float32, sharding=rows)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, jax.device_put(before, NamedSharding(one, REPLICATED)), {"next_index": 1})
        found, _ = checkpoints.restore(1, jax.tree.map(lambda _: like, before))
    for array in jax.tree.leaves(found):
        assert array.shape == packed and array.sharding == rows
        assert np.array_equal(np.asarray(array).reshape(-1), numbers)


def test_the_digest_sees_every_bit_and_the_order_but_neither_mesh_nor_shape():
    spread = NamedSharding(make_mesh(1, 2, 4), ROWS)
    for dtype in (np.float32, jnp.bfloat16, np.uint8, np.bool_):
        array = (np.random.default_rng(0).normal(size=(64, 4)) > 0).astype(dtype)
        expected = int(jax.jit(digest)(jax.device_put(array, spread)))
        same = [array.reshape(32, 8), array.reshape(-1)]
        other = [array[::-1], np.zeros_like(array)]
        found = [int(x) for x in jax.jit(lambda arrays: [digest(x) for x in arrays])(same + other)]
        assert found[0] == found[1] == expected and expected not in found[2:]
    words = np.random.default_rng(0).integers(0, 2**32, 100, dtype=np.uint32)
    changed = [words ^ (np.uint32(1) << bit) * (np.arange(100) == place) for bit in range(32) for place in (0, 50, 99)]
    changed += [words ^ np.uint32(1 << 31), words + np.uint32(1), -words]  # of every word at once
    digests = np.asarray(jax.jit(jax.vmap(digest))(np.stack([words, *changed]).astype(np.uint32)))
    assert len(set(digests.tolist())) == len(changed) + 1


DAMAGE = {
    "truncated array files": truncate,
    "lost array files": lambda step: shutil.rmtree(step / "state" / "ocdbt.process_0"),
    "flipped bits": flip_bits,
    "arrays of another step": swap_arrays,
    "truncated index": lambda step: (step / "state" / "manifest.ocdbt").write_bytes(b"x"),
    "lost index": lambda step: (step / "state" / "manifest.ocdbt").unlink(),
    "lost arrays": lambda step: shutil.rmtree(step / "state"),
    "lost description": lambda step: (step / "data" / "metadata").unlink(),
    "truncated description": lambda step: (step / "data" / "metadata").write_text('{"data": {"next'),
    "another data position": lambda step: (step / "data" / "metadata").write_text(
        (step / "data" / "metadata").read_text().replace('"next_index": 2', '"next_index": 3')
    ),
    "description that is no description": lambda step: (step / "data" / "metadata").write_text("[]"),
    "empty folder": empty,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_broken_checkpoint_gives_way_to_the_one_before(damage, tmp_path, capfd):
    saved(tmp_path, 1, 2)
    DAMAGE[damage](tmp_path / "2")
    with Checkpoints(tmp_path, keep=2, read_only=True) as checkpoints:  # an evaluation: leaves everything as it is
        assert checkpoints.restore_newest(state_on(1, 1))[0] == 1
        with pytest.raises(BrokenCheckpoint, match=f"{tmp_path}/2: "):
            checkpoints.restore(2, state_on(1, 1))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2"]
    capfd.readouterr()
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        step, found, data = checkpoints.restore_newest(state_on(2, 4))
        (line,) = capfd.readouterr().err.splitlines()
        assert f"{tmp_path}/2: " in line and line.endswith("Falling back to step 1; the broken one is now 2.broken")
        assert len(line) < 500
        assert (step, data, checkpoints.latest()) == (1, {"next_index": 1}, 1)
        assert_same_bits(found, state_on(2, 4, 1))
        checkpoints.save(2, state_on(2, 4, 2), {"next_index": 2})
        checkpoints.wait()
        assert_same_bits(checkpoints.restore_newest(state_on(2, 4))[1], state_on(2, 4, 2))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2", "2.broken"]


def test_when_all_are_broken_it_says_what_to_do_and_moves_nothing(tmp_path):
    saved(tmp_path, 1, 2)
    empty(tmp_path / "1")
    flip_bits(tmp_path / "2")
    with (
        Checkpoints(tmp_path, keep=2) as checkpoints,
        pytest.raises(ValueError, match=r"none of its checkpoints can be read .*/2: .*/1: .*delete it to start again"),
    ):
        checkpoints.restore_newest(state_on(1, 1))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2"]


def test_lack_of_memory_is_no_damage(tmp_path, monkeypatch):
    saved(tmp_path, 1, 2)

    def fails(*_):
        raise MemoryError

    monkeypatch.setattr(jax, "make_array_from_single_device_arrays", fails)
    with Checkpoints(tmp_path, keep=2) as checkpoints, pytest.raises(MemoryError):
        checkpoints.restore_newest(state_on(1, 1))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2"]


SAVER = """
import sys, jax, numpy as np
from pathlib import Path
from recscale.checkpoint import Checkpoints
folder, step, megabytes = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
state = {"tables": {"item": jax.numpy.full((megabytes, 2**18), step, np.float32) * jax.numpy.arange(2.0**18)[None]}}
with Checkpoints(folder, keep=1) as checkpoints:
    checkpoints.save(step, state, {"next_index": step})
    print("saving", flush=True)
"""


def saver(folder: Path, step: int, megabytes: int, **pipes: int) -> subprocess.Popen:
    """A process that saves a state that is known from the step, and says when the write is under way."""
    return subprocess.Popen([sys.executable, "-c", SAVER, str(folder), str(step), str(megabytes)], cwd=ROOT, **pipes)


def assert_saved(folder: Path, steps: set[int], megabytes: int) -> int:
    like = jax.ShapeDtypeStruct((megabytes, 2**18), np.float32, sharding=jnp.zeros(0).sharding)
    with Checkpoints(folder, keep=2, read_only=True) as checkpoints:
        step, found, data = checkpoints.restore_newest({"tables": {"item": like}})
    assert step in steps and data == {"next_index": step}
    rows = np.asarray(found["tables"]["item"])
    assert (rows == step * np.arange(2**18, dtype=np.float32)).all()
    return step


@pytest.mark.slow
def test_kill_in_the_middle_of_a_save_leaves_the_one_before(tmp_path):
    """About 200 MB: the write takes longer than the longest delay here."""
    with saver(tmp_path, 1, 200) as process:
        assert process.wait() == 0
    newest, interrupted = 1, 0
    for step, delay in enumerate((0.0, 0.03, 0.1, 0.3), start=2):
        with saver(tmp_path, step, 200, stdout=subprocess.PIPE) as process:
            assert process.stdout.readline() == b"saving\n"
            time.sleep(delay)
            os.kill(process.pid, signal.SIGKILL)
        interrupted += (tmp_path / f"{step}.orbax-checkpoint-tmp").exists()
        newest = assert_saved(tmp_path, {newest, step}, 200)
    assert interrupted >= 2, "too few kills came in the middle of a write: choose other delays"


def test_a_full_disk_ends_in_one_error_and_loses_nothing(tmp_path):
    """A limit on the size of a file stands in for the disk."""
    item = np.arange(2**18, dtype=np.float32)[None].repeat(4, 0)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(1, {"tables": {"item": jnp.asarray(item)}}, {"next_index": 1})
    with saver(tmp_path, 2, 4, stderr=subprocess.PIPE) as process:
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (200_000, 200_000))
        errors = process.stderr.read().decode().splitlines()
    assert process.returncode == 1
    assert errors[-1].startswith(f"OSError: {tmp_path}: the checkpoint of step 2 could not be written (")
    assert "File too large); the newest on disk is that of step 1. Make room" in errors[-1] and len(errors[-1]) < 600
    assert_saved(tmp_path, {1}, 4)


TWO_PROCESSES = """
import json, sys, jax, numpy as np
from jax.sharding import NamedSharding
from pathlib import Path
from recscale.checkpoint import Checkpoints
from recscale.mesh import BATCH, REPLICATED, make_mesh, place_same
folder, port, process = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{port}", 2, process)
mesh = make_mesh(1, 2, 2)

def state(seed):
    rows = np.random.default_rng(seed).normal(size=(4096, 8)).astype(np.float32)
    item = place_same(NamedSharding(mesh, BATCH), rows)
    return {"tables": {"item": item}, "step": place_same(NamedSharding(mesh, REPLICATED), np.int32(seed))}

def same(one, other):
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other))
    local = [(a.addressable_shards, b.addressable_shards) for a, b in pairs]
    return all(np.array_equal(x.data, y.data) for a, b in local for x, y in zip(a, b, strict=True))

with Checkpoints(folder / "c", keep=2) as checkpoints:
    for step in (1, 2):
        checkpoints.save(step, state(step), {"next_index": step})
    checkpoints.wait()
    whole = same(checkpoints.restore(2, state(0))[0], state(2))
    if process == 0:  # damage what only process 1 reads
        for path in (folder / "c/2/state/ocdbt.process_1/d").iterdir():
            path.write_bytes(b"")
    jax.experimental.multihost_utils.sync_global_devices("damaged")
    step, found, data = checkpoints.restore_newest(state(0))
    back = same(found, state(1)) and data == {"next_index": 1}
    latest = checkpoints.latest()
    checkpoints.save(2, state(2), {"next_index": 2})
    checkpoints.wait()
    again = checkpoints.restore_newest(state(0))
(folder / f"{process}.json").write_text(json.dumps([whole, step, back, latest, again[0], same(again[1], state(2))]))
"""


@pytest.mark.slow
def test_two_processes_save_restore_and_fall_back_together(tmp_path):
    """One of them alone cannot read its part: both go back, and none waits for the other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    arguments = [sys.executable, "-c", TWO_PROCESSES, str(tmp_path), str(port)]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT, "env": environment}
    processes = [subprocess.Popen([*arguments, str(i)], **pipes) for i in range(2)]
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], errors[0][-2000:] + errors[1][-2000:]
    for process in range(2):
        assert json.loads((tmp_path / f"{process}.json").read_text()) == [True, 1, True, 1, 2, True]
    lines = [[line for line in error.splitlines() if "broken checkpoint" in line] for error in errors]
    assert len(lines[0]) == 1 and "process 1 cannot read it. Falling back to step 1" in lines[0][0] and not lines[1]
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["1", "2", "2.broken"]
