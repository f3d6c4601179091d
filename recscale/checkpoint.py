"""Checkpoints of a run: the train state and the data position, written asynchronously by Orbax.

Leaves are stored under their path in the state ("model.layers.uvqk"), so a checkpoint says what it holds and restores
onto any mesh. Beside the arrays lies one JSON file under a checksum: the data position, and the shape, dtype and digest
of every leaf. What is read back is held against it, so neither a flipped bit nor a lost file goes unnoticed.

With several processes each of them calls every method, in the same order, on a folder that all of them see. Orbax lets
process 0 alone make folders, write the JSON file and remove steps. Reads fail on every process or on none.
"""

import itertools
import json
import math
import re
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from recscale.mesh import REPLICATED

PATIENCE_SECONDS = 30 * 86400
"""For a write. Orbax measures it by the clock of the machine, and a clock that jumps must not fail a save."""
_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}
_TABLES = ("tables.", "table_state.")  # arrays whose rows may be packed into wider ones: the same numbers in order
Described = tuple[tuple[int, ...], str, int]  # shape, dtype, digest


class BrokenCheckpoint(ValueError):
    """A finished checkpoint that cannot be read, or that holds other bytes than were written."""


class _Manager(ocp.CheckpointManager):
    """Saves when told to; whether the processes are to stop only preemption.py asks.

    JAX counts the polls that agree on where all stop by the number they are asked with. Orbax asks with the step,
    preemption.py with its polls, which are more: a notice between the two would name a poll that is past.
    """

    def reached_preemption(self, step: int) -> bool:
        del step
        return False


class Checkpoints:
    """The newest `keep` checkpoints of one folder. Use as a context manager: leaving it waits for the writes.

    read_only: leaves the folder as it is, even what looks like the rest of a broken write: a run may be writing it.
    """

    def __init__(self, path: Path, keep: int, read_only: bool = False):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else keep,
            cleanup_tmp_directories=not read_only,
            read_only=read_only,
            async_options=ocp.AsyncOptions(timeout_secs=PATIENCE_SECONDS),
            lightweight_initialize=True,  # else a damaged step metadata file already fails here
        )
        handlers = {"state": ocp.StandardCheckpointHandler(), "data": ocp.JsonCheckpointHandler()}
        self.folder, self.read_only = path.absolute(), read_only
        self.manager = _Manager(self.folder, options=options, item_handlers=handlers)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, error_type: type | None, *exc: object) -> None:
        try:
            self.wait()
        except OSError as error:
            if error_type is None:
                raise
            print(f"error: {error}", file=sys.stderr)  # beside the error that is already on its way
        finally:
            self.manager.close()

    def latest(self) -> int | None:
        """Step of the newest checkpoint, finished or being written; None without one."""
        return self.manager.latest_step()

    def save(self, step: int, state: Any, data: dict[str, int]) -> None:
        """Start writing `state` and the data position; returns before the write ends. A step is saved once.

        Raises OSError where this write cannot start or the one before did not end well; older checkpoints are intact.
        """
        self.wait()
        newest = self.latest()
        if newest is not None and step <= newest:
            return
        leaves = leaves_by_path(state)
        described = _described(leaves)
        content = {"data": data, "leaves": described, "checksum": _checksum(data, described)}
        # The next step donates these buffers while the write is still going on. Orbax has them on the host before it
        # returns; on a CPU that is no copy at all.
        on_cpu = any(device.platform == "cpu" for x in leaves.values() for device in x.sharding.device_set)
        leaves = jax.tree.map(jnp.copy, leaves) if on_cpu else leaves
        arguments = ocp.args.Composite(state=ocp.args.StandardSave(leaves), data=ocp.args.JsonSave(content))
        try:
            self.manager.save(step, args=arguments)
        except OSError as error:
            raise self._failed(step, error) from error

    def wait(self) -> None:
        """Return when everything saved so far is on disk; raises OSError where it could not be written."""
        step = self.latest()
        try:
            self.manager.wait_until_finished()
        except Exception as error:  # whatever the file system, Orbax and TensorStore make of it
            raise self._failed(step, error) from error

    def restore(self, step: int, state: Any) -> tuple[Any, dict[str, int]]:
        """The state at `step` in the structure, types and shardings of `state`, and the data position.

        Of `state` only shapes, types and shardings are used: jax.ShapeDtypeStruct will do. A table may have been
        stored with its rows packed otherwise: [1000, 64] comes back as [500, 128] where that is what `state` has.
        Raises ValueError where the checkpoint holds other arrays (the config has changed), BrokenCheckpoint where it
        cannot be read or is not what was written.
        """
        self.wait()
        named = leaves_by_path(state)
        folder = self.folder / str(step)
        stored, data = _together(folder, lambda: _read_content(folder / "data" / "metadata"))
        _check_fit(folder, stored, named)
        like = {name: _as_stored(stored[name][0], wanted) for name, wanted in named.items()}
        found = _together(folder, lambda: _read_arrays(folder / "state", like))
        wrong = sorted(name for name, (*_, digest) in _described(found).items() if digest != stored[name][2])
        if wrong:
            raise BrokenCheckpoint(f"{folder}: {wrong[:5]} do not hold the bytes that were written")
        leaves = [_repacked(found[name], like) for name, like in named.items()]
        return jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(state), leaves), data

    def restore_some(self, step: int, wanted: dict[str, Any]) -> dict[str, jax.Array]:
        """Those leaves of `wanted` (path in the state -> shape, type and sharding) that the checkpoint has.

        Raises ValueError where one of them has another shape or type there, BrokenCheckpoint as `restore` does.
        """
        self.wait()
        folder = self.folder / str(step)
        stored, _ = _together(folder, lambda: _read_content(folder / "data" / "metadata"))
        some = {name: leaf for name, leaf in wanted.items() if name in stored}
        _check_fit(folder, {name: stored[name] for name in some}, some)
        like = {name: _as_stored(stored[name][0], leaf) for name, leaf in some.items()}
        found = _together(folder, lambda: _read_arrays(folder / "state", like))
        return {name: _repacked(found[name], leaf) for name, leaf in some.items()}

    def restore_newest(self, state: Any) -> tuple[int, Any, dict[str, int]] | None:
        """Step, state and data position of the newest checkpoint that can be read; None in an empty folder.

        A broken one is named on stderr, the one before is used, and its folder is renamed to STEP.broken so that the
        step can be saved again. Raises ValueError where none can be read, or where one holds other arrays (the config
        has changed): then nothing is renamed.
        """
        self.wait()
        broken: dict[int, BrokenCheckpoint] = {}
        for step in sorted(self.manager.all_steps(), reverse=True):
            try:
                found, data = self.restore(step, state)
            except BrokenCheckpoint as error:
                broken[step] = error
                continue
            for other, error in broken.items():
                note = "" if self.read_only else f"; the broken one is now {self._set_aside(other)}"
                if jax.process_index() == 0:
                    print(f"broken checkpoint: {error}. Falling back to step {step}{note}", file=sys.stderr)
            return step, found, data
        if broken:
            problems = "; ".join(map(str, broken.values()))
            raise ValueError(
                f"{self.folder}: none of its checkpoints can be read ({problems}). Restore the folder from "
                "a copy, or delete it to start again."
            )
        return None

    def _set_aside(self, step: int) -> str:
        folder = self.folder / str(step)
        names = itertools.chain([f"{step}.broken"], (f"{step}.broken{i}" for i in itertools.count(2)))
        name = next(name for name in names if not (folder.parent / name).exists())
        if jax.process_index() == 0:
            folder.rename(folder.parent / name)
            folder.mkdir()  # for `delete`, after which every process has forgotten the step without reading the folder
        self.manager.delete(step)
        return name

    def _failed(self, step: int | None, error: Exception) -> OSError:
        self.manager.reload()
        newest = self.latest()
        rest = "no other is on disk" if newest is None else f"the newest on disk is that of step {newest}"
        return OSError(
            f"{self.folder}: the checkpoint of step {step} could not be written ({_one_line(error)}); "
            f"{rest}. Make room or repair the disk, then run the same command again."
        )


def leaves_by_path(state: Any) -> dict[str, Any]:
    """Path in the state ("model.layers.uvqk") -> leaf, in the order of the leaves."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def digest(array: jax.Array) -> jax.Array:
    """uint32 of the bits of an array in row-major order: the same on every mesh and for every shape of these elements.

    The sum, modulo 2^32, of a hash (the finalizer of MurmurHash3) of each word and its position. One changed word
    always shows; several go unnoticed once in 2^32.
    """
    array = array.astype(jnp.uint8) if array.dtype == jnp.bool_ else array
    words = jax.lax.bitcast_convert_type(array, _WORDS[array.dtype.itemsize]).astype(jnp.uint32)
    position = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):
        position = position * np.uint32(size % 2**32) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    mixed = words ^ (position * np.uint32(0x9E3779B9))
    mixed = (mixed ^ (mixed >> 16)) * np.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 13)) * np.uint32(0xC2B2AE35)
    return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)


_digests = jax.jit(lambda leaves: jax.tree.map(digest, leaves))


def _described(leaves: dict[str, jax.Array]) -> dict[str, Described]:
    """Shape, dtype and digest of every leaf; each process gets all of them."""
    digests = jax.device_get(_digests(leaves))
    return {name: (x.shape, x.dtype.name, int(digests[name])) for name, x in leaves.items()}


def _checksum(data: dict[str, int], leaves: dict[str, Described]) -> int:
    return zlib.crc32(json.dumps([data, leaves], sort_keys=True).encode())


def _read_content(file: Path) -> tuple[dict[str, Described], dict[str, int]]:
    """What `save` wrote beside the arrays: the description of the leaves, and the data position."""
    content = json.loads(file.read_text())
    if not isinstance(content, dict) or not content.keys() >= {"data", "leaves", "checksum"}:
        raise ValueError(f"{file.parent.name}/{file.name} holds no digests: damaged, or of an earlier version")
    if content["checksum"] != _checksum(content["data"], content["leaves"]):
        raise ValueError(f"{file.parent.name}/{file.name} does not match its checksum")
    return {name: (tuple(shape), *rest) for name, (shape, *rest) in content["leaves"].items()}, content["data"]


def _one_line(error: BaseException) -> str:
    text = f"{type(error).__name__}: {error}".splitlines()[0]
    text = re.split(r" \[[\w\[\]]+='", text)[0].rstrip(". ")  # TensorStore appends [name='value'] of all it knows
    return text if len(text) <= 240 else f"{text[:80]} ... {text[-150:]}"


def _read_arrays(folder: Path, wanted: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """The stored arrays with the shardings of `wanted`; each process reads the parts of its own devices.

    Not by Orbax, which on an error stops with its other reads under way and on several processes leaves the others
    waiting. Raises ValueError or OSError where anything is missing or damaged, once nothing is being read any more.
    """
    arrays: dict[str, jax.Array] = {}
    for name, like in wanted.items():
        kvstore = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder}/"}, "path": f"{name}/"}
        spec = {"driver": "zarr", "kvstore": kvstore, "fill_missing_data_reads": False}
        stored = tensorstore.open(spec, read=True).result()
        if stored.shape != like.shape or stored.dtype.numpy_dtype != like.dtype:
            raise ValueError(f"{name} is {stored.dtype.name}{list(stored.shape)}, not {like.dtype}{list(like.shape)}")
        places = like.sharding.addressable_devices_indices_map(like.shape)
        reads = {str(index): stored[index].read() for index in places.values()}
        failures = [error for read in reads.values() if (error := read.exception())]
        if failures:
            raise failures[0]
        parts = [jax.device_put(reads[str(index)].result(), device) for device, index in places.items()]
        arrays[name] = jax.make_array_from_single_device_arrays(like.shape, like.sharding, parts)
    return arrays


def _together(folder: Path, read: Callable[[], Any]) -> Any:
    """`read()`; raises BrokenCheckpoint on all processes where it failed on any, so that none waits for the others."""
    result, failure = None, None
    try:
        result = read()
    except (MemoryError, jax.errors.JaxRuntimeError, PermissionError):
        raise  # these say nothing about the files
    except Exception as error:  # damage shows as anything: OSError, KeyError, a decoder's ValueError
        failure = error
    failed = np.array([failure is not None])
    if jax.process_count() > 1:
        failed = multihost_utils.process_allgather(failed).reshape(-1)
    if failed.any():
        problem = _one_line(failure) if failure else f"process {failed.argmax()} cannot read it"
        raise BrokenCheckpoint(f"{folder}: {problem}") from failure
    return result


def _check_fit(folder: Path, stored: dict[str, Described], wanted: dict[str, Any]) -> None:
    """Raises ValueError where names, dtypes or shapes differ beyond the packing of a table's rows."""

    def fits(name: str) -> bool:
        if name not in stored or name not in wanted:
            return False
        (shape, dtype, _), leaf = stored[name], wanted[name]
        repacked = name.startswith(_TABLES) and len(shape) == leaf.ndim == 2 and math.prod(shape) == leaf.size
        return dtype == leaf.dtype.name and (shape == leaf.shape or repacked)

    differing = sorted(name for name in stored | wanted if not fits(name))
    if differing:
        raise ValueError(
            f"{folder.parent}: the checkpoint does not fit this config; it differs in {differing[:5]}. "
            "Use the config it was trained with, or another --workdir."
        )


def _as_stored(shape: tuple[int, ...], wanted: Any) -> jax.ShapeDtypeStruct:
    """What to restore before `_repacked`: the stored shape, its rows over the devices as those of `wanted`."""
    sharding = wanted.sharding
    if shape != wanted.shape and isinstance(sharding, NamedSharding):
        rows, columns = (a // b for a, b in zip(wanted.shape, sharding.shard_shape(wanted.shape), strict=True))
        if shape[0] % rows or columns > 1:
            sharding = NamedSharding(sharding.mesh, REPLICATED)
    return jax.ShapeDtypeStruct(shape, wanted.dtype, sharding=sharding)


def _repacked(array: jax.Array, wanted: Any) -> jax.Array:
    """The elements of `array` in the shape and sharding of `wanted`; rows stay on their device where they can."""
    if array.shape == wanted.shape:
        return array
    if array.sharding == wanted.sharding and isinstance(array.sharding, NamedSharding):
        local, spec = wanted.sharding.shard_shape(wanted.shape), wanted.sharding.spec
        reshape = jax.shard_map(lambda x: x.reshape(local), mesh=wanted.sharding.mesh, in_specs=spec, out_specs=spec)
        return jax.jit(reshape)(array)
    return jax.jit(lambda x: x.reshape(wanted.shape), out_shardings=wanted.sharding)(array)
