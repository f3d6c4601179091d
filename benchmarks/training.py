"""Training throughput in real events per second against the same models written plainly in PyTorch.

    python -m benchmarks.training [--quick] [--logs=DIR] [--torch-python=PYTHON] [--threads=2] [--seconds=3]

HSTU (position bias only) and SASRec, 8 blocks, D 64, 2 heads, 128 negatives, dropout .2. Data: planted long-tailed
histories (L 200), and Beauty (L 50) and ML-1M (L 200) from their prepared logs DIR/beauty and DIR/ml-1m. Ours is what a
user runs: the packed loader with its prefetch, the jitted step, the metrics of a step read while the next one runs;
"padded" is ours at exactly the shapes of PyTorch. PyTorch (benchmarks/_torch_peer.py, in an environment of its own:
`pip install torch==2.13.0 numpy`, its interpreter named by --torch-python or TORCH_PYTHON) trains right-padded rows,
eagerly and compiled, with negatives of its own for every token, as public code does, or shared by a row, as ours.

A real event is a supervised position; padding counts for nothing. Hidden states of both sides must agree to 1e-4 first.
Variants take turns in one run; figures are medians over the turns after two steps that warm up. The machine must be
idle: PyTorch's threads spin while they wait for each other, and beside other work two of them ran 6 times slower than
one. About 12 minutes on two idle cores, --quick about 4. Writes benchmarks/results/training.json.
"""

import argparse
import contextlib
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from recscale import record
from recscale.data import planted
from recscale.data.event_log_writer import write
from recscale.mesh import place_batch
from recscale.run import Run, build, init_state
from recscale.step import make_train_step

RESULTS = Path(__file__).parent / "results"
PEER = Path(__file__).parent / "_torch_peer.py"
MODELS = ("hstu", "sasrec")
DIM, HEADS, DEPTH, NEGATIVES, DROPOUT = 64, 2, 8, 128, 0.2
# data set -> (L, rows of a packed batch of ours, users of a padded batch)
DATASETS = {"planted": (200, 32, 64), "beauty": (50, 64, 128), "ml-1m": (200, 32, 64)}
TARGETS = {"planted": 3.0, "beauty": 3.0, "ml-1m": 1.2}  # times the faster PyTorch; at equal shapes .8
LONG_TAIL = planted.Planted(length_median=20.0, length_sigma=1.2, length_max=1000)
TOLERANCE = 1e-4
PEER_BATCHES = 8


def machine() -> dict[str, Any]:
    """Hardware, versions and load, for the JSON."""
    models = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")]
    return record.environment() | {
        "cpu": models[0].split(": ")[1] if models else platform.processor(),
        "cpus_used": len(os.sched_getaffinity(0)),
        "load_average_1min": os.getloadavg()[0],
    }


def save(name: str, result: dict[str, Any]) -> None:
    """Write benchmarks/results/NAME.json."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps({"machine": machine(), **result}, indent=1) + "\n")


def workload(model: str, path: str | Path, *, length: int, batch_size: int, layout: str) -> ml_collections.ConfigDict:
    """The config of a case: the model's ML-1M baseline at the benchmark's size."""
    c = importlib.import_module(f"configs.{model}_ml1m").get_config()
    c.data.path = str(path)
    c.loader.update({"batch_size": batch_size, "length": length, "layout": layout})
    c.model.update({"embed_dim": DIM, "width": DIM, "depth": DEPTH, "heads": HEADS, "max_length": length})
    c.model.update({"qk_dim": DIM // HEADS, "v_dim": DIM // HEADS} if model == "hstu" else {"ffn": DIM})
    c.model.dropout = DROPOUT
    c.task.update({"negatives": NEGATIVES, "shared": "row"})
    return c


class Ours:
    """A run of this project, fed and stepped as recscale.train does it."""

    def __init__(self, config: ml_collections.ConfigDict):
        self.run: Run = build(config)
        self.state = init_state(self.run)
        self.step = make_train_step(self.run)
        self.batches = self.run.loader.iterator()

    def turn(self, seconds: float) -> dict[str, float]:
        """Train for about `seconds`, at least one step."""
        events = steps = 0
        waiting = None
        cpu, begin = time.process_time(), time.perf_counter()
        while steps == 0 or time.perf_counter() - begin < seconds:
            batch = next(self.batches)
            self.state, metrics = self.step(self.state, place_batch(self.run.mesh, batch))
            if waiting is not None:
                float(waiting["loss"])
            waiting = metrics
            events, steps = events + int(np.count_nonzero(batch["target"])), steps + 1
        jax.block_until_ready(self.state)
        wall = time.perf_counter() - begin
        return {"events": events, "steps": steps, "wall": wall, "cpu": time.process_time() - cpu}

    def items(self) -> np.ndarray:
        """The item table by id, [V + 1, D]."""
        return self.run.tables.arrays["item"].values(self.state["tables"]["item"])

    def parameters(self) -> dict[str, np.ndarray]:
        """The parameters under the names and in the layouts of _torch_peer.Encoder."""
        model = self.state["model"]
        flat = {"items.weight": self.items(), "positions": model.positions[...]}
        if self.run.config.model_name == "hstu":
            layers = model.layers
            stacked = {"uvqk": layers.uvqk[...], "position_bias": layers.position_bias[...]}
            stacked |= {"out.weight": layers.out[...].swapaxes(1, 2), "out.bias": layers.out_bias[...]}
        else:
            stacked = {}
            for name in ("norm_attention", "norm_ffn"):
                norm = getattr(model.blocks, name)
                stacked |= {f"{name}.weight": norm.scale[...], f"{name}.bias": norm.bias[...]}
            for name in ("qkv", "out", "ffn_in", "ffn_out"):
                linear = getattr(model.blocks, name)
                stacked |= {f"{name}.weight": linear.kernel[...].swapaxes(1, 2), f"{name}.bias": linear.bias[...]}
            flat |= {"norm.weight": model.norm.scale[...], "norm.bias": model.norm.bias[...]}
        flat |= {f"layers.{i}.{name}": value[i] for name, value in stacked.items() for i in range(DEPTH)}
        return {name: np.asarray(value) for name, value in flat.items()}

    def hidden(self, batch: dict[str, np.ndarray]) -> np.ndarray:
        """Hidden states [B, L, D] of a batch, without dropout."""

        def forward(model, table, batch):
            return model(table[batch["item_id"]], batch)

        return np.asarray(jax.jit(forward)(self.state["model"], self.items(), batch))


class Torch:
    """_torch_peer.py in its own process."""

    def __init__(self, python: str, setup: Path):
        self.process = subprocess.Popen(
            [python, str(PEER), str(setup)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.versions = self._answer()

    def ask(self, **command: Any) -> dict[str, Any]:
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{PEER.name} ended with status {self.process.wait()}: see its message above")
        return json.loads(line)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def start_torch(python: str, padded: Ours, threads: int, folder: Path) -> Torch:
    """The peer with our parameters and padded batches; raises SystemExit where its hidden states differ from ours."""
    run = padded.run
    batches = [run.loader[i] for i in range(PEER_BATCHES)]
    setup = {
        "model": run.config.model_name, "items": run.log.num_items, "dim": DIM, "depth": DEPTH, "heads": HEADS,
        "length": run.config.loader.length, "dropout": DROPOUT, "negatives": NEGATIVES,
        "temperature": run.config.task.temperature, "threads": threads,
    }  # fmt: skip
    arrays = {name: np.stack([batch[name] for batch in batches]) for name in ("item_id", "target")}
    np.savez(folder / "setup.npz", setup=json.dumps(setup), **arrays, **padded.parameters())
    peer = Torch(python, folder / "setup.npz")
    peer.ask(do="hidden", out=str(folder / "hidden.npy"))
    real = batches[0]["item_id"] > 0
    ours, theirs = padded.hidden(batches[0])[real], np.load(folder / "hidden.npy")[real]
    difference = float(np.abs(ours - theirs).max())
    print(f"  largest difference of hidden states {difference:.1e} (largest value {np.abs(ours).max():.2f})")
    if not difference < TOLERANCE:
        peer.close()
        sys.exit(f"error: the two {setup['model']} models differ by {difference}, expected < {TOLERANCE}: not the same")
    return peer


def compare(turns: dict[str, Callable[[float], dict[str, float]]], seconds: float, repeats: int) -> dict[str, dict]:
    """Median real events per second of each variant; they take turns."""
    for turn in turns.values():
        turn(0.0)
        turn(0.0)
    rates = {name: [] for name in turns}
    for _ in range(repeats):
        for name, turn in turns.items():
            found = turn(seconds)
            rates[name].append((found["events"] / found["wall"], found["events"] / found["cpu"]))
    return {
        name: {
            "events_per_second": statistics.median(wall for wall, _ in pairs),
            "lowest": min(pairs)[0],
            "highest": max(pairs)[0],
            "events_per_cpu_second": statistics.median(cpu for _, cpu in pairs),
        }
        for name, pairs in rates.items()
    }


def ratios(found: dict[str, dict]) -> dict[str, float]:
    """Ours over the faster of eager and compiled PyTorch."""

    def best(kind: str) -> float:
        return max(v["events_per_second"] for k, v in found.items() if k.startswith("torch") and k.endswith(kind))

    packed, padded = found["ours packed"]["events_per_second"], found["ours padded"]["events_per_second"]
    result = {"packed / torch": packed / best("per token")}
    if any(name.endswith("per row") for name in found):
        result["packed / torch, negatives per row"] = packed / best("per row")
        result["padded / torch, equal shapes, negatives per row"] = padded / best("per row")
    return result | {"padded / torch, equal shapes": padded / best("per token")}


def measure(model: str, path: Path, shape: tuple[int, int, int], args: argparse.Namespace) -> dict[str, Any]:
    """One model on one log."""
    length, rows, users = shape
    ours = {
        layout: Ours(workload(model, path, length=length, batch_size=size, layout=layout))
        for layout, size in (("packed", rows), ("padded", users))
    }
    turns: dict[str, Callable] = {f"ours {layout}": side.turn for layout, side in ours.items()}
    row: dict[str, Any] = {"fill": {layout: side.run.loader.fill for layout, side in ours.items()}}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        if args.torch_python:
            peer = start_torch(args.torch_python, ours["padded"], args.threads, Path(folder))
            stack.callback(peer.close)
            row["torch"] = peer.versions
            for name, compiled in (("eager", False), ("compiled", True)):
                for shared in (False, True):
                    turns[f"torch {name}, negatives per {'row' if shared else 'token'}"] = (
                        lambda seconds, compiled=compiled, shared=shared: peer.ask(
                            do="run", compiled=compiled, shared=shared, seconds=seconds
                        )
                    )
        row["variants"] = compare(turns, args.seconds, args.repeats)
    if args.torch_python:
        row["ratios"] = ratios(row["variants"])
    return row


def logs(args: argparse.Namespace) -> Iterator[tuple[str, Path]]:
    """The logs that are here; says why one is left out."""
    with tempfile.TemporaryDirectory() as folder:
        users = 4_000 if args.quick else 20_000
        config = planted.Planted(**(vars(LONG_TAIL) | {"users": users}))
        write(planted.generate(config), Path(folder) / "planted")
        yield "planted", Path(folder) / "planted"
    for name in ("beauty", "ml-1m"):
        path = Path(args.logs) / name
        if (path / "meta.json").exists():
            yield name, path
        else:
            print(f"{name}: left out, no prepared log at {path} (python -m recscale.data.prepare, then --logs=DIR)")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="HSTU alone, fewer and shorter turns")
    parser.add_argument("--logs", default="logs", help="folder of prepared logs: beauty and ml-1m are looked for")
    parser.add_argument("--torch-python", default=os.environ.get("TORCH_PYTHON", ""))
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seconds", type=float, default=0.0, help="length of a turn (3, quick 1)")
    parser.add_argument("--models", nargs="+", default=())
    parser.add_argument("--datasets", nargs="+", default=tuple(DATASETS))
    args = parser.parse_args()
    args.models = args.models or (MODELS[:1] if args.quick else MODELS)
    args.seconds = args.seconds or (1.0 if args.quick else 3.0)
    args.repeats = 2 if args.quick else 3
    return args


def main() -> None:
    """Run every case, print the table, write the JSON."""
    args = arguments()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])  # both sides; before JAX makes its threads
    if not args.torch_python:
        print("No --torch-python and no TORCH_PYTHON: PyTorch is left out, only this project is measured.")
    if (load := os.getloadavg()[0]) > 0.5:
        print(f"Load average {load:.1f}: other work is running, so the ratios will not hold. --threads=1 suffers less.")
    results = []
    for dataset, path in logs(args):
        for model in [m for m in args.models if dataset in args.datasets]:
            length, rows, users = DATASETS[dataset]
            print(f"{model} on {dataset}: L {length}, {rows} packed rows, {users} padded rows", flush=True)
            row = {"model": model, "dataset": dataset, "length": length, "packed_rows": rows, "padded_rows": users}
            row |= measure(model, path, DATASETS[dataset], args)
            results.append(row)
            print("  fill " + ", ".join(f"{layout} {fill:.3f}" for layout, fill in row["fill"].items()))
            for name, v in row["variants"].items():
                spread = f"{v['lowest']:,.0f} to {v['highest']:,.0f}"
                print(f"  {name:<36} {v['events_per_second']:>9,.0f} events/s  ({spread})", flush=True)
            for name, value in row.get("ratios", {}).items():
                goal = 0.8 if "equal" in name else TARGETS[dataset]
                print(f"  {name:<50} {value:5.2f}x  (goal {goal}x)", flush=True)
    save("training", {"quick": args.quick, "threads": args.threads, "seconds": args.seconds, "results": results})


if __name__ == "__main__":
    main()
