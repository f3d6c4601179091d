"""Planning: topologies and peaks, roofline arithmetic, the report of a compiled step, advice, and the command line."""

import dataclasses
import importlib.util
import json
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from launch import chips, compiling, estimate, hlo, plan, roofline
from launch.plan_text import amount, duration, text
from launch.work import Work, events_per_step
from tests.tiny_run import SAMPLED, tiny

MESH = {"replica": 1, "data": 2, "model": 4, "accumulate": 1, "remat": "none"}
# ml_collections reads a config file so.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


def place(name, hbm=None):
    found = chips.topology(name)
    return dataclasses.replace(found, chip=dataclasses.replace(found.chip, hbm=hbm)) if hbm else found


@pytest.mark.parametrize(
    ("name", "shape", "count", "per_node"),
    [
        ("v5p:8x8x8", (8, 8, 8), 512, 512),
        ("v5e:4x8", (4, 8), 32, 32),
        ("V6E:16x16", (16, 16), 256, 256),
        ("h100:64", (1, 8, 8), 64, 8),
        ("h200:4", (1, 1, 4), 4, 4),
        ("b200:2x4x8", (2, 4, 8), 64, 8),
    ],
)
def test_topologies(name, shape, count, per_node):
    found = chips.topology(name)
    assert (found.shape, found.chips, found.per_node) == (shape, count, per_node)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("v9:2x2", "no chip 'v9'"),
        ("v5p", "expected sizes"),
        ("v5p:8x", "expected sizes"),
        ("v5e:0x2", "expected sizes"),
        ("v5e:2x2x2", "takes 2 sizes, found 3"),
        ("h100:12", "do not fill nodes of 8"),
    ],
)
def test_topologies_that_do_not_exist(name, complaint):
    with pytest.raises(ValueError, match=complaint):
        chips.topology(name)


def test_every_peak_has_a_source_and_a_plausible_size():
    for chip in chips.CHIPS.values():
        assert chip.sources and all(source.startswith("https://") for source in chip.sources)
        assert 1e14 < chip.flops["float32"] <= chip.flops["bfloat16"] < 1e16
        assert 1e10 < chip.hbm < 1e12 < 2 * chip.hbm_bandwidth < 1e14 and 1e11 < chip.link < 1e12
        assert (chip.network > 0) == (chip.platform == "gpu") == bool(chip.target)


def collective(kind, size, groups, count=1):
    return hlo.Collective(kind, size, count, True, np.array(groups), "")


def test_bytes_sent_of_each_kind():
    assert roofline.sent("all-gather", 800, 8) == roofline.sent("reduce-scatter", 800, 8) == 700
    assert roofline.sent("all-to-all", 800, 8) == 700 and roofline.sent("all-reduce", 800, 8) == 1400
    assert roofline.sent("collective-permute", 800, 2) == 800 and roofline.sent("all-gather", 800, 1) == 0


def test_links_of_a_torus_and_of_nodes():
    everyone = [list(range(64))]
    program = hlo.Program(64, (collective("all-to-all", 6400, everyone, 2),), 0.0, 0.0, ())
    torus = place("v5p:4x4x4")
    assert roofline.links(program, torus)["ICI"] == pytest.approx(2 * 6300 * 3 / torus.chip.link)
    nodes = place("h100:64")
    seconds = roofline.links(program, nodes)
    assert seconds["network"] == pytest.approx(2 * 6400 * 7 / 8 / nodes.chip.network)
    assert seconds["NVLink"] == pytest.approx(2 * 6400 * 7 / 64 / nodes.chip.link)
    inside = [list(range(i, i + 8)) for i in range(0, 64, 8)]
    program = hlo.Program(64, (collective("all-reduce", 800, inside),), 0.0, 0.0, ())
    assert roofline.links(program, nodes) == {"NVLink": 1400 / nodes.chip.link, "network": 0.0}
    program = hlo.Program(64, (collective("all-gather", 6400, everyone),), 0.0, 0.0, ())
    assert roofline.links(program, nodes)["network"] == pytest.approx(6400 * 7 / 8 / 8 / nodes.chip.network)


def test_the_largest_limit_bounds():
    v5p = place("v5p:2x2x1")
    found = roofline.bounds(459e12, 459e12, 2765e9 / 2, v5p, {"ICI": 0.25})
    assert found == {"seconds": {"compute": 1.0, "HBM": 0.5, "ICI": 0.25}, "step_seconds": 1.0, "bound": "compute"}


def test_estimated_collectives_follow_the_layout():
    rows, shard, weights, dense = 100, 10, 20, 40
    program = estimate.program(MESH, 1.0, shard, weights, dense, 3, rows)
    assert [program.total(kind) for kind in hlo.KINDS] == [60, 10, 40, 200, 0]
    groups = {c.kind: c.groups for c in program.collectives}
    assert groups["all-gather"].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert groups["all-reduce"].tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]
    alone = estimate.program(MESH | {"data": 8, "model": 1}, 1.0, shard, weights, dense, 3, rows)
    assert alone.total("all-gather") == alone.total("reduce-scatter") == 0


LAYERS, WIDTH, BATCH, ROWS = 4, 256, 128, 8000


def stand_in(devices, rows=ROWS):
    """(step, state, batch, work) of a step with tables, a scan and an optimizer, for the report."""
    mesh = Mesh(np.array(devices).reshape(1, 2, 4), ("replica", "data", "model"), axis_types=(AxisType.Auto,) * 3)

    def shape(dims, spec, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, spec))

    matrices, table = PartitionSpec(None, "model"), PartitionSpec(("replica", "data", "model"))
    state = {
        "model": shape((LAYERS, WIDTH, WIDTH), matrices),
        "optimizer": shape((LAYERS, WIDTH, WIDTH), matrices),
        "tables": {"item": shape((rows, WIDTH), table)},
        "table_state": {"item": shape((rows,), table)},
    }
    batch = {"x": shape((BATCH, WIDTH), PartitionSpec(("replica", "data")))}

    def loss(weights, x):
        x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)
        return jnp.square(x).mean()

    def step(state, batch):
        grads = jax.grad(loss)(state["model"], batch["x"])
        momentum = 0.9 * state["optimizer"] + grads
        return state | {"model": state["model"] - momentum, "optimizer": momentum}

    flops = {"projections": 3.0 * 2 * BATCH * LAYERS * WIDTH * WIDTH}
    layout = jax.tree.map(lambda leaf: leaf.sharding, state)
    work = Work(BATCH, flops, "float32", 4.0 * LAYERS * WIDTH * WIDTH, 2, 1024.0, 4 * BATCH // 8 * WIDTH * LAYERS)
    return jax.jit(step, donate_argnums=0, out_shardings=layout), state, batch, work


def whole(found, name="v5e:2x4"):
    """What plan() adds to report()."""
    around = {
        "config": "configs/x.py",
        "topology": {"name": name, "chips": 8, "shape": (2, 4)},
        "chip": {"title": "TPU", "sources": ["https://a"]},
        "mesh": MESH,
        "versions": {"jax": "0"},
        "parameters": {"tables": ROWS * WIDTH, "dense": 3, "head": 0},
        "run": {"events": 10, "steps": 2, "hours": 0.5, "chip_hours": 4.0, "per_chip_price": 2.0, "cost": 8.0},
        "notes": ["a note"],
    }
    return around | found


def test_the_report_of_a_compiled_step():
    step, state, batch, work = stand_in(jax.devices()[:8])
    found = plan.report(step, state, batch, work, place("v5e:2x4"), MESH, True)
    dense, table = 4 * LAYERS * WIDTH * WIDTH // 4, 4 * ROWS // 8
    assert found["memory"]["state"] == {
        "model": dense,
        "optimizer": dense,
        "tables": table * WIDTH,
        "table_state": table,
    }
    batch_bytes = 4 * BATCH // 2 * WIDTH
    assert found["memory"]["parts"]["arguments"] == 2 * dense + table * (WIDTH + 1) + batch_bytes
    assert found["memory"]["parts"]["outputs"] < 1000, "what is donated is not counted twice"
    assert found["memory"]["fits"] and found["advice"] == [] and found["compiled"]
    assert found["flops"]["compiler_per_device"] >= found["flops"]["per_device"]
    assert found["flops"]["compiler_loops_once_per_device"] < found["flops"]["compiler_per_device"]
    assert found["roofline"]["bound"] in found["roofline"]["seconds"]
    assert found["mfu_bound"] <= 1.0
    assert found["traffic"]["bytes"] >= found["traffic"]["least"]["total"] > 2 * found["memory"]["parts"]["temporaries"]
    assert found["events_per_second"] == pytest.approx(BATCH / found["roofline"]["step_seconds"])
    assert json.loads(json.dumps(found))["collectives"] == found["collectives"] != {}
    printed = text(whole(found))
    assert "FITS" in printed and "DOES NOT" not in printed and "counts the body of a loop once" in printed
    assert all(kind in printed for kind in found["collectives"]) and "cost at least 8.00" in printed


def test_a_step_that_does_not_fit_says_what_to_change():
    step, state, batch, work = stand_in(jax.devices()[:8])
    found = plan.report(step, state, batch, work, place("v5e:2x4", hbm=1 << 20), MESH, True)
    assert not found["memory"]["fits"]
    assert any("mesh.remat = 'layer'" in line for line in found["advice"])
    assert any("mesh.model above 4" in line for line in found["advice"])
    assert any("more chips" in line for line in found["advice"])
    assert "DOES NOT FIT" in text(whole(found)) and "to change" in text(whole(found))


def test_without_a_compiler_the_state_is_exact_and_the_rest_is_called_an_estimate():
    step, state, batch, work = stand_in(jax.devices()[:8])
    guessed = plan.report(step, state, batch, work, place("v5e:2x4"), MESH, False)
    compiled = plan.report(step, state, batch, work, place("v5e:2x4"), MESH, True)
    assert not guessed["compiled"] and "estimate" in guessed["memory"]["from"]
    assert guessed["memory"]["parts"]["arguments"] == compiled["memory"]["parts"]["arguments"]
    assert "NOT compiled" in text(whole(guessed)) and "(estimate)" in text(whole(guessed))


@needs_libtpu
def test_a_step_that_the_compiler_refuses_does_not_fit():
    compiling.prepare()
    v5e = place("v5e:2x4")
    step, state, batch, work = stand_in(compiling.devices(v5e), rows=240_000_000)  # 31 GB a device of 16
    found = plan.report(step, state, batch, work, v5e, MESH, True)
    assert not found["memory"]["fits"] and not found["compiled"]
    assert "exceeds" in found["memory"]["from"] or "Used" in found["memory"]["from"]
    assert any("tables" in line for line in found["advice"])
    assert "DOES NOT FIT" in text(whole(found))


@needs_libtpu
def test_a_slice_that_the_compiler_does_not_know():
    compiling.prepare()
    with pytest.raises(ValueError, match="the compiler does not know it"):
        compiling.devices(chips.topology("v5e:3x3"))


def test_compilers_noise_goes_nowhere_and_stderr_comes_back(capfd):
    with compiling.quiet():
        os.write(2, b"noise\n")
    os.write(2, b"kept\n")
    assert capfd.readouterr().err == "kept\n"
    with pytest.raises(RuntimeError, match="said"), compiling.quiet():
        raise RuntimeError("said")


@pytest.mark.parametrize(("value", "unit", "expected"), [(1.5e9, "B", "1.50 GB"), (12, "B", "12 B"), (0, "B", "0 B")])
def test_amounts(value, unit, expected):
    assert amount(value, unit) == expected


def test_durations():
    assert [duration(s) for s in (2.0, 0.0213, 4e-6)] == ["2.00 s", "21.30 ms", "4.0 us"]


def config_file(folder, body=""):
    """A config file that plans the tiny run; body: lines that change `c`."""
    path = folder / "config.py"
    path.write_text(
        "from tests.tiny_run import SAMPLED, tiny\n\n\ndef get_config():\n"
        "    c = tiny('hstu', 'nowhere', **SAMPLED).unlock()\n"
        "    c.data.num_items, c.data.num_events, c.mesh.data = 1000, 10_000, 8\n"
        f"    {body}\n    return c.lock()\n"
    )
    return path


def run_main(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["plan", *map(str, arguments)])
    status = plan.main()
    return status, *capsys.readouterr()


def test_a_plan_without_the_plugin_of_the_gpus(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(compiling, "missing", lambda platform: "jax_cuda13_plugin")
    out = tmp_path / "deep" / "plan.json"
    arguments = (f"--config={config_file(tmp_path)}", "--topology=h100:8", "--per_chip_price=3", f"--out={out}")
    status, printed, errors = run_main(monkeypatch, capsys, *arguments)
    assert (status, errors) == (0, "")
    found = json.loads(out.read_text())
    config = tiny("hstu", tmp_path, **SAMPLED)
    assert found["events_per_step"] == events_per_step(config) == 8 * 16
    assert found["run"]["events"] == 10_000 and found["run"]["steps"] == 79
    assert found["run"]["cost"] == pytest.approx(3 * found["run"]["hours"] * 8)
    assert found["parameters"]["tables"] == 8 * 1000
    assert "jax_cuda13_plugin is not installed" in printed and "8 x NVIDIA H100" in printed


@pytest.mark.slow
@needs_libtpu
def test_a_plan_of_the_real_step_for_a_tpu(monkeypatch, capsys, tmp_path):
    out = tmp_path / "plan.json"
    arguments = (f"--config={config_file(tmp_path)}", "--topology=v5e:2x4", f"--out={out}")
    status, printed, errors = run_main(monkeypatch, capsys, *arguments)
    assert (status, errors) == (0, "")
    found = json.loads(out.read_text())
    assert found["compiled"] and found["collectives"]["all-to-all"]["bytes"] > 0
    assert found["flops"]["compiler_per_device"] > 0.5 * found["flops"]["per_device"]
    assert "libtpu" in found["versions"] and "FITS" in printed


@pytest.mark.parametrize(
    ("arguments", "body", "complaint"),
    [
        (("--topology=h100:8",), None, "--config missing"),
        (("--config=nowhere.py", "--topology=h100:8"), None, "--config=nowhere.py: no such file"),
        ((), "", "--topology missing"),
        (("--topology=x1:8",), "", "no chip 'x1'"),
        (("--topology=h100:16",), "", "mesh 1x8x1 (replica, data, model) has 8 devices, h100:16 has 16 chips"),
        (("--topology=h100:8", "--config.model.dept=3"), "", 'Did you mean "depth"'),
        (("--topology=h100:8",), "c.task.negatives = 0", "needs at least one negative"),
        (("--topology=h100:8",), "c.loader.batch_size = 12", "expected a multiple of the 8 devices"),
        (("--topology=h100:8",), "1 / 0", "ZeroDivisionError"),
        (("--topology=h100:8",), "c.data.num_events = 0", "nowhere"),
        (("--topology=h100:8", "extra"), "", "unexpected argument 'extra'"),
        (("--topology=h100:8", "--price=3"), "", "price"),
    ],
)
def test_one_line_and_status_2(monkeypatch, capsys, tmp_path, arguments, body, complaint):
    monkeypatch.setattr(compiling, "missing", lambda platform: "jax_cuda13_plugin")
    if body is not None:
        arguments = (f"--config={config_file(tmp_path, body)}", *arguments)
    status, printed, errors = run_main(monkeypatch, capsys, *arguments, f"--out={tmp_path / 'plan.json'}")
    assert (status, printed) == (2, "") and not (tmp_path / "plan.json").exists()
    assert errors.count("\n") == 1 and errors.startswith("error: ") and complaint in errors


def test_no_libtpu(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(compiling, "missing", lambda platform: "libtpu")
    status, _, errors = run_main(monkeypatch, capsys, f"--config={config_file(tmp_path)}", "--topology=v5e:2x4")
    assert status == 2 and "pip install 'recscale[tpu]'" in errors and errors.count("\n") == 1
