"""Prove a run before paying for it: python -m launch.plan --config=configs/hstu_ml1m.py --topology=v5p:8x8x8

Compiles the real train step of a config for chips that are not here and says what it needs of them: bytes per device
and whether they fit, FLOPs by part, bytes sent, a lower bound of the time per step and what sets it, hours and cost.
The report goes to stdout and, as JSON, to --out. --per_chip_price is the price of one chip for one hour. A value of the
config is changed as in training, e.g. --config.mesh.model=8.

Exit status 0: it fits. 2: there is nothing to plan (one line says why). 3: it does not fit (the report says what to
change).
"""

import dataclasses
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import jax
import ml_collections
from absl import flags
from ml_collections import config_flags

from launch import compiling, estimate, hlo, roofline
from launch.chips import EXAMPLES, Topology, topology
from launch.plan_text import text
from launch.work import Work, open_program, work_of
from recscale import program as programs
from recscale.data.event_log import EventLogError
from recscale.step import make_train_step

FITS, NOTHING, TOO_LARGE = 0, 2, 3
FULL_ROWS = "every row is taken to be full, with histories of loader.length events"


class PlanError(Exception):
    """Nothing can be planned; the message is the one line to print."""


def state_bytes(state: dict[str, Any]) -> dict[str, int]:
    """Bytes per device of each part of a train state, as its layout divides it."""
    return {part: sum(_local_bytes(leaf) for leaf in jax.tree.leaves(tree)) for part, tree in state.items()}


def _local_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding is not None else leaf.shape
    return math.prod(shape) * leaf.dtype.itemsize


def collectives(program: hlo.Program) -> dict[str, dict[str, Any]]:
    """Executions and bytes per step and device, and the largest single one, by kind; kinds that do not occur are left
    out."""
    table = {}
    for kind in hlo.KINDS:
        if count := program.count(kind):
            largest = max((c for c in program.collectives if c.kind == kind), key=lambda c: c.bytes)
            table[kind] = {
                "count": count,
                "bytes": program.total(kind),
                "largest": largest.bytes,
                "largest_group": program.group_size(largest),
                "largest_source": largest.source,
            }
    return table


def fit(memory: dict[str, int], place: Topology) -> dict[str, Any]:
    """Bytes per device by part against the chip's memory."""
    total = sum(memory.values())
    return {"parts": memory, "total": total, "limit": place.chip.hbm, "fits": total <= place.chip.hbm}


def advice(memory: dict[str, Any], state: dict[str, int], mesh: dict[str, Any], chips: int) -> list[str]:
    """What to change in the config so that a step that does not fit does, the largest part first."""
    limit = memory["limit"]
    dense = state["model"] + state["optimizer"]
    tables = state["tables"] + state["table_state"]
    temporaries = memory["parts"]["temporaries"]
    over = max(memory["total"] - limit, 0)
    sizes = {"temporaries": temporaries, "dense": dense, "tables": tables}
    said = {
        "temporaries": f"intermediate results take {temporaries / 1e9:.1f} GB a device: "
        + ("set mesh.remat = 'layer', " if mesh["remat"] != "layer" else "")
        + f"raise mesh.accumulate above {mesh['accumulate']} or lower loader.batch_size",
        "dense": f"dense parameters and their optimizer take {dense / 1e9:.1f} GB a device: raise mesh.model above "
        f"{mesh['model']}, which spreads them",
        "tables": f"tables and their optimizer take {tables / 1e9:.1f} GB a device: more chips (about "
        f"{math.ceil(chips * tables / max(limit - (memory['total'] - tables), limit // 4))} hold them), "
        "table.dtype = 'bfloat16', or a smaller table.kind",
    }
    largest = sorted(sizes, key=lambda name: -sizes[name])
    worth = [name for name in largest if sizes[name] >= 0.2 * max(over, 1) and sizes[name] >= 0.05 * limit]
    return [said[name] for name in worth or largest[:1]]


def report(
    step: Any, state: dict[str, Any], batch: Any, work: Work, place: Topology, mesh: dict[str, Any], can_compile: bool
) -> dict[str, Any]:
    """Compile the step where that can be done, and put together everything that depends on it."""
    parts = state_bytes(state)
    compiled, refused = None, None
    if can_compile:
        try:
            compiled = compiling.compile_step(step, state, batch)
        except compiling.TooLarge as error:
            refused = error
    asked = sum(work.flops.values())
    if compiled is not None:
        memory = fit(compiled.memory, place) | {"from": "compiler"}
        program = compiled.program
    else:
        memory, program = _guessed(parts, batch, work, mesh, place, refused)
    wires = roofline.links(program, place)
    multiplied = max(asked / place.chips, program.matmul_flops)
    least = roofline.least_traffic(parts, work.weights, work.passes, work.rows, memory["parts"]["temporaries"])
    traffic = max(least["total"], program.traffic)
    peak = place.chip.flops[work.dtype]
    bounds = roofline.bounds(multiplied, peak, traffic, place, wires)
    return {
        "compiled": compiled is not None,
        "compile_seconds": round(compiled.seconds, 1) if compiled else None,
        "memory": memory | {"state": parts},
        "advice": [] if memory["fits"] else advice(memory, parts, mesh, place.chips),
        "flops": {
            "by_part": work.flops,
            "total": asked,
            "per_device": asked / place.chips,
            "compiler_per_device": program.matmul_flops if compiled else None,
            "compiler_loops_once_per_device": compiled.flops_once if compiled else None,
        },
        "collectives": collectives(program),
        "open_loops": list(program.open_loops),
        "traffic": {
            "bytes": traffic,
            "from": "the compiled instructions, loops in full" if program.traffic > least["total"] else "the least",
            "least": least,
        },
        "roofline": bounds | {"peak_flops": peak, "dtype": work.dtype},
        "events_per_step": work.events,
        "events_per_second": work.events / bounds["step_seconds"],
        "mfu_bound": asked / (bounds["step_seconds"] * place.chips * peak),
    }


def _guessed(
    parts: dict[str, int],
    batch: Any,
    work: Work,
    mesh: dict[str, Any],
    place: Topology,
    refused: compiling.TooLarge | None,
) -> tuple[dict[str, Any], hlo.Program]:
    """Memory and program where there is no compiler, or it refused: the state is exact, the rest an estimate."""
    arguments = sum(parts.values()) + sum(_local_bytes(leaf) for leaf in jax.tree.leaves(batch))
    temporaries = parts["model"] + work.states
    if refused is not None:
        temporaries = max(temporaries, refused.needed - arguments)
    memory = fit({"arguments": arguments, "temporaries": temporaries}, place)
    memory["from"] = "estimate: arguments exact, temporaries only dense gradients and the inputs of layers"
    if refused is not None:
        memory |= {"fits": False, "from": f"the compiler refused: {refused}"}
    per_device = sum(work.flops.values()) / place.chips
    whole = max(parts["model"] * mesh["model"], parts["model"])
    program = estimate.program(mesh, per_device, parts["model"], work.weights, whole, work.passes, work.rows)
    return memory, program


def plan(config: ml_collections.ConfigDict, name: str, place: Topology, price: float | None) -> dict[str, Any]:
    """The whole report of a config on a topology. Raises PlanError where there is nothing to plan."""
    began = time.time()
    mesh = config.mesh.to_dict()
    if "replica" in mesh and (size := mesh["replica"] * mesh["data"] * mesh["model"]) != place.chips:
        raise PlanError(
            f"mesh {mesh['replica']}x{mesh['data']}x{mesh['model']} (replica, data, model) has {size} devices, "
            f"{place.text} has {place.chips} chips: {_divided(mesh, place.chips)}"
        )
    lacking = compiling.missing(place.chip.platform)
    if lacking is not None and place.chip.platform == "tpu":
        raise PlanError("compiling for a TPU needs libtpu: pip install 'recscale[tpu]'")
    devices = compiling.stand_ins(place.chips) if lacking else compiling.devices(place)
    run, events = open_program(config, devices)
    items = run.tables.specs[run.task.catalogue].num_ids
    step, state, batch = make_train_step(run), programs.abstract_state(run), programs.abstract_batch(run)
    found = report(step, state, batch, work_of(run, items), place, mesh, lacking is None)
    hours = events / found["events_per_second"] / 3600
    chip = dataclasses.asdict(place.chip)
    return {
        "config": name,
        "topology": {"name": place.text, "chips": place.chips, "shape": place.shape},
        "chip": {key: chip[key] for key in chip if key not in ("target", "dims")},
        "mesh": mesh,
        "versions": _versions(place.chip.platform, lacking),
        "parameters": programs.parameters(run),
        **found,
        "run": {
            "events": events,
            "steps": run.steps,
            "hours": hours,
            "chip_hours": hours * place.chips,
            "per_chip_price": price,
            "cost": None if price is None else price * hours * place.chips,
        },
        "notes": _notes(found, place, lacking),
        "seconds": round(time.time() - began, 1),
    }


def _divided(mesh: dict[str, Any], chips: int) -> str:
    """What would fill the chips with as little changed as can be."""
    rest = mesh["replica"] * mesh["model"]
    if chips % rest == 0:
        return f"mesh.data = {chips // rest} would fill them"
    return (
        f"mesh.replica x mesh.model = {rest} does not divide {chips}; replica = 1, data = {chips}, model = 1 would do"
    )


def _versions(platform: str, lacking: str | None) -> dict[str, str]:
    names = {"tpu": ("jax", "jaxlib", "libtpu"), "gpu": ("jax", "jaxlib", "jax-cuda13-plugin")}[platform]
    return {
        name: compiling.version(name)
        for name in names
        if lacking is None or (name.startswith("jax") and "-" not in name)
    }


def _notes(found: dict[str, Any], place: Topology, lacking: str | None) -> list[str]:
    notes = [f"events per step: {FULL_ROWS}"]
    if found["roofline"]["dtype"] == "float32":
        notes.append(f"float32: {place.chip.f32_note}")
    if lacking is not None:
        notes.append(
            f"{lacking} is not installed, so nothing was compiled: arguments are exact, all else is estimated from the "
            "config. pip install 'recscale[cuda]' compiles the step, without a GPU"
        )
    if place.chip.platform == "gpu" and found["memory"]["total"] > 0.75 * place.chip.hbm:
        notes.append("jax takes 75 % of a GPU's memory by default: set XLA_PYTHON_CLIENT_MEM_FRACTION")
    return notes


def parse(arguments: list[str]) -> flags.FlagValues:
    """The command line. Raises PlanError for what is missing, unknown or malformed, and a bad config."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "Config file", lock_config=True, flag_values=values)
    flags.DEFINE_string("topology", None, f"Chips, e.g. {EXAMPLES}", flag_values=values)
    flags.DEFINE_float("per_chip_price", None, "Price of one chip for one hour", flag_values=values)
    flags.DEFINE_string("out", "plan.json", "Where the JSON goes", flag_values=values)
    flags.DEFINE_bool("help", False, "This text", short_name="h", flag_values=values)
    try:
        rest = values(arguments)
    except flags.Error as error:
        raise PlanError(_one_line(error)) from error
    except Exception as error:  # whatever the code of a config file may raise
        raise PlanError(f"--config: {type(error).__name__}: {_one_line(error)}") from error
    if values.help:
        return values
    wanted = [f"--{name}" for name in ("config", "topology") if not values[name].present]
    if wanted or rest[1:]:
        raise PlanError(f"{', '.join(wanted)} missing" if wanted else f"unexpected argument {rest[1]!r}")
    name = config_flags.get_config_filename(values["config"])
    if not Path(name.split(":")[0]).is_file():
        raise PlanError(f"--config={name}: no such file")
    return values


def main() -> int:
    """Command line of the module docstring; returns the exit status."""
    try:
        values = parse(sys.argv)
        if values.help:
            print(__doc__, end="")
            return FITS
        place = topology(values.topology)
        compiling.prepare()
        name = config_flags.get_config_filename(values["config"])
        found = plan(values.config, name, place, values.per_chip_price)
    except (PlanError, EventLogError, ValueError, TypeError, KeyError, OSError) as error:
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return NOTHING
    print(text(found))
    out = Path(values.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=1) + "\n")
    print(f"written to {out}")
    return FITS if found["memory"]["fits"] else TOO_LARGE


def _one_line(error: Exception) -> str:
    inner = error.args[0] if error.args else error
    if isinstance(inner, KeyError) or isinstance(error, KeyError):  # a KeyError prints its message quoted
        return " ".join(str(inner.args[0] if isinstance(inner, KeyError) else inner).split())
    return " ".join(str(error).split())


if __name__ == "__main__":
    sys.exit(main())
