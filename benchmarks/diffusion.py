"""DreamRec trained and sampled against the same model written plainly in PyTorch.

    python -m benchmarks.diffusion [--quick] [--torch-python=PYTHON] [--threads=2] [--seconds=3] [--compiled]

The shape of configs/dreamrec_yc.py: D 64, histories of 10, T 500, denoiser mlp1, guidance 2, dropout .1, float32; 9,514
items; sessions as long as YooChoose's, items drawn at random. PyTorch (benchmarks/_diffusion_peer.py, in an environment
of its own: `pip install torch==2.13.0 numpy`, its interpreter named by --torch-python or TORCH_PYTHON) starts from our
parameters. First both must say the same: h and the guided x0 of equal x, histories and t to 1e-5, and the vectors after
50 DDIM steps from equal noise to 1e-4.

Sampling: users/s, from histories to vectors, in batches of 256 and 1,024, by all 500 ancestral (DDPM) steps and by 50
DDIM steps. Ours is the task's own `generate`; the goal holds against PyTorch's "plain" loop (and "compiled", with
--compiled). "tuned" is that loop after all that this one network lets one take out of it by hand.

Training: steps of 256 targets/s, ours as a user runs it (loader, prefetch, metrics). "padded" has PyTorch's shapes, one
history of 10 slots per target; "packed" are rows of 40 slots, as the config says. Ours steps only the item vectors that
a batch touches, PyTorch's AdamW all of them.

Variants take turns in one run; figures are medians over the turns after two that warm up. The machine must be idle:
PyTorch's threads spin while they wait for each other. Writes benchmarks/results/diffusion.json.
"""

import argparse
import dataclasses
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from benchmarks import training
from configs import dreamrec_yc
from recscale.data.event_log import Column, EventLog
from recscale.data.event_log_writer import write
from recscale.data.parts import PART
from recscale.layers.denoisers import Condition
from recscale.layers.diffusion import guided
from recscale.layers.samplers import sample
from recscale.tasks.denoising import NOISE_STREAM, Task

PEER = Path(__file__).parent / "_diffusion_peer.py"
ITEMS, USERS, BATCH, BATCHES = 9_514, 12_000, 256, 8
# Sessions of 3, 4, ... events among those of YooChoose that DreamRec released (validation and test parts).
SESSIONS = np.array([11100, 6217, 3586, 2017, 1094, 650, 354, 253, 159, 88, 62, 32, 16, 18, 12, 12, 9, 15])
SAMPLERS = {"DDPM": ("ddpm", 500), "DDIM": ("ddim", 50)}
SIZES = (256, 1024)
GOAL, TOLERANCE, CHAIN_TOLERANCE = 1.5, 1e-5, 1e-4


def make_log(folder: Path) -> Path:
    """A log of random sessions; one in ten validates, one in ten tests."""
    rng = np.random.default_rng(0)
    lengths = rng.choice(np.arange(3, 3 + len(SESSIONS)), USERS, p=SESSIONS / SESSIONS.sum())
    part = np.where(np.arange(USERS) % 10 == 0, "test", np.where(np.arange(USERS) % 10 == 1, "val", "train"))
    events = {"item_id": rng.integers(1, ITEMS + 1, lengths.sum()).astype(np.int32)}
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    raw = {"raw_id": np.arange(USERS), PART: part}
    items = {"raw_id": np.arange(ITEMS + 1)}
    write(EventLog(offsets, events, {"item_id": Column("id")}, ITEMS, items, raw), folder)
    return folder


def workload(log: Path, layout: str) -> ml_collections.ConfigDict:
    """The shipped config on this log: "packed" as it is, "padded" with a row of 10 slots for each of 256 targets."""
    c = dreamrec_yc.get_config().unlock()
    c.data.path = str(log)
    if layout == "padded":
        c.loader.update({"layout": "padded", "batch_size": BATCH, "row_length": 0, "segments": 1})
    return c.lock()


class Sampling:
    """What a run samples from the parameters of its start."""

    def __init__(self, padded: training.Ours):
        self.run = padded.run
        self.state = jax.tree.map(lambda x: x.copy(), padded.state)
        self.batches = [self.run.loader[i] for i in range(BATCHES)]
        self.compiled = jax.jit(self._generate, static_argnums=0)

    def _generate(self, task: Task, state: dict[str, Any], batch: dict[str, jax.Array], row_B: jax.Array) -> jax.Array:
        lookup = functools.partial(self.run.tables.lookup, state["tables"], state["mixers"])
        return task.generate(state["model"], lookup, batch, row_B)

    def task(self, sampler: str, steps: int) -> Task:
        """The run's task with another sampler."""
        return Task(dataclasses.replace(self.run.task.config, sampler=sampler, sampling_steps=steps), ITEMS)

    def turns(self, sampler: str, steps: int, users: int) -> Callable[[float], dict[str, float]]:
        """A turn that samples for about so many seconds, at least one batch."""
        task = self.task(sampler, steps)
        batch = {k: np.concatenate([b[k] for b in self.batches])[:users] for k in self.batches[0]}
        batch, row_B = jax.device_put((batch, np.arange(users, dtype=np.int32)))

        def turn(seconds: float) -> dict[str, float]:
            count = 0
            cpu, begin = time.process_time(), time.perf_counter()
            while count == 0 or time.perf_counter() - begin < seconds:
                self.compiled(task, self.state, batch, row_B).block_until_ready()
                count += users
            wall = time.perf_counter() - begin
            return {"events": count, "wall": wall, "cpu": time.process_time() - cpu}

        return turn

    def items(self) -> np.ndarray:
        """The item vectors by id, [V + 1, D]."""
        return self.run.tables.arrays["item"].values(self.state["tables"]["item"])

    def answers(self) -> dict[str, np.ndarray]:
        """Of batch 0: x and t [B], h and the guided x0 [B, D] at them, and what 50 DDIM steps make of x."""
        task, model, batch = self.task("ddim", 50), self.state["model"], self.batches[0]
        rows = np.arange(BATCH, dtype=np.int32)
        end = self.compiled(task, self.state, batch, rows)
        seed = jax.random.fold_in(jax.random.key(task.config.seed), NOISE_STREAM)
        keys = jax.vmap(lambda row: jax.random.split(jax.random.fold_in(seed, row), 1)[0])(jnp.asarray(rows))
        start = sample(lambda x, t: x, task.process, keys, end.shape[-1], "ddim", 1)  # one step lands where it began
        t = np.random.default_rng(1).integers(0, task.config.steps, BATCH).astype(np.int32)

        @jax.jit
        def at(x, t):
            read = functools.partial(self.run.tables.lookup, self.state["tables"], self.state["mixers"])
            states = model.encoder(read("item", batch["item_id"]), batch)
            last = jnp.argmax(batch["target"] > 0, axis=1)[:, None, None]
            h = jnp.take_along_axis(states, last, axis=1)
            memory = model.head.remember(Condition(h))
            time = task.process.embed_time(t)[:, None]
            found = (model.head(x[:, None], part, time)[:, 0] for part in (memory, model.head.forget()))
            return h[:, 0], guided(*found, task.config.guidance)

        h, x0 = at(start, t)
        return {"x": start, "t": t, "h": h, "x0": x0, "end": end[:, 0]}


def linear(name: str, layer: Any) -> dict[str, jax.Array]:
    """A linear layer as torch.nn.Linear has it."""
    return {f"{name}.weight": layer.kernel[...].T, f"{name}.bias": layer.bias[...]}


def by_their_names(ours: Sampling) -> dict[str, np.ndarray]:
    """The parameters under the names and in the layouts of the peer; its padding is behind the last item."""
    encoder, head, items = ours.state["model"].encoder, ours.state["model"].head, ours.items()
    found = {"items.weight": np.roll(items, -1, axis=0), "null.weight": head.null[...][None]}
    found |= {"encoder.positions": encoder.positions[...]}
    for name in ("norm_queries", "norm_ffn", "norm_out", "norm"):
        norm = getattr(encoder, name)
        found |= {f"encoder.{name}.weight": norm.scale[...], f"encoder.{name}.bias": norm.bias[...]}
    for name in ("query", "key", "value", "ffn_in", "ffn_out"):
        found |= linear(f"encoder.{name}", getattr(encoder, name))
    found |= linear("time_first", head.time.first) | linear("time_last", head.time.last) | linear("out", head.out)
    return {name: np.ascontiguousarray(value) for name, value in found.items()}


def their_batches(batches: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Histories [batches, B, S], padded on the right with ITEMS, their lengths and their targets [batches, B]."""
    ids = np.stack([batch["item_id"] for batch in batches])
    lengths = np.stack([(batch["segment_ids"] > 0).sum(axis=1) for batch in batches])
    target = np.stack([batch["target"].max(axis=1) for batch in batches])
    return {"history": np.where(ids > 0, ids - 1, ITEMS), "lengths": lengths, "target": target - 1}


class Peer(training.Torch):
    """_diffusion_peer.py in its own process, asked as the peer of benchmarks.training."""

    def __init__(self, python: str, setup: Path):
        self.process = subprocess.Popen(
            [python, str(PEER), str(setup)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.versions = self._answer()


def start_peer(python: str, ours: Sampling, threads: int, folder: Path) -> tuple[Peer, dict[str, float]]:
    """The peer with our parameters and batches, and how far its answers are from ours; SystemExit if too far."""
    c = ours.run.config
    setup = {"items": ITEMS, "dim": c.model.embed_dim, "length": c.loader.length, "steps": c.task.steps}
    setup |= {"guidance": c.task.guidance, "dropout": c.model.dropout, "drop": c.task.drop, "threads": threads}
    setup |= {"learning_rate": c.optim.learning_rate}
    given = ours.answers()
    np.savez(folder / "setup.npz", setup=json.dumps(setup), **their_batches(ours.batches), **by_their_names(ours))
    np.savez(folder / "given.npz", x=given["x"], t=given["t"])
    peer = Peer(python, folder / "setup.npz")
    count = peer.ask(do="compare", x=str(folder / "given.npz"), out=str(folder / "theirs.npz"))["parameters"]
    theirs = dict(np.load(folder / "theirs.npz"))
    pairs = {"h": "h", "x0": "x0", "plain": "end", "tuned": "end"}
    apart = {name: float(np.abs(theirs[name] - given[key]).max()) for name, key in pairs.items()}
    largest = max(float(np.abs(x).max()) for name, x in theirs.items())
    said = ", ".join(f"{name} {value:.1e}" for name, value in apart.items())
    print(f"{count:,} parameters; largest differences: {said} (largest value {largest:.1f})", flush=True)
    for name, value in apart.items():
        bound = TOLERANCE if pairs[name] == name else CHAIN_TOLERANCE
        if not value < bound:
            peer.close()
            sys.exit(f"error: {name} of the two models differs by {value}, expected < {bound}: not the same model")
    return peer, apart


def measure(turns: dict[str, Callable], unit: str, args: argparse.Namespace) -> dict[str, Any]:
    """Rates of all variants and ours over each of theirs; unit: "users" or "steps" of BATCH targets."""
    found = training.compare(turns, args.seconds, args.repeats)
    scale = BATCH if unit == "steps" else 1
    variants = {
        name: {key.replace("events", unit): value / scale for key, value in one.items()} for name, one in found.items()
    }
    for name, v in variants.items():
        rates = f"{v[f'{unit}_per_second']:>9,.1f} {unit}/s, {v[f'{unit}_per_cpu_second']:,.1f} per CPU second"
        print(f"  {name:<16} {rates}  ({v['lowest']:,.1f} to {v['highest']:,.1f})", flush=True)
    ratios = {
        f"{a} / {b}{of}": variants[a][f"{unit}_per_{clock}"] / variants[b][f"{unit}_per_{clock}"]
        for clock, of in (("second", ""), ("cpu_second", ", per CPU second"))
        for a in variants
        for b in variants
        if a.startswith("ours") and b.startswith("torch")
    }
    for name, value in ratios.items():
        goal = f"  (goal {GOAL}x)" if unit == "users" and "tuned" not in name else ""
        print(f"  {name:<46} {value:5.2f}x{goal}")
    return {"variants": variants, "ratios": ratios}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="batches of 256 alone, fewer and shorter turns")
    parser.add_argument("--torch-python", default=os.environ.get("TORCH_PYTHON", ""))
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seconds", type=float, default=0.0, help="length of a turn (3, quick 1)")
    parser.add_argument("--compiled", action="store_true", help="torch.compile too")
    args = parser.parse_args()
    args.seconds = args.seconds or (1.0 if args.quick else 3.0)
    args.repeats = 3 if args.quick else 5
    return args


def compare(ours: Sampling, trained: dict[str, training.Ours], peer: Peer | None, args: argparse.Namespace):
    """Both parts of the benchmark: name -> rates and ratios."""
    result = {}
    styles = () if peer is None else ("plain", *(("compiled",) if args.compiled else ()), "tuned")
    for users in SIZES[: 1 if args.quick else None]:
        for name, (sampler, steps) in SAMPLERS.items():
            title = f"sampling, {name} of {steps} steps, {users} users at a time"
            print(title)
            turns: dict[str, Callable] = {"ours": ours.turns(sampler, steps, users)}
            how = {"do": "sample", "sampler": sampler, "steps": steps, "users": users}
            for style in styles:
                turns[f"torch {style}"] = lambda s, style=style, how=how: peer.ask(variant=style, seconds=s, **how)
            result[title] = measure(turns, "users", args)
    print(title := f"training, steps of {BATCH} targets")
    turns = {f"ours {layout}": one.turn for layout, one in trained.items()}
    for style in styles[:-1]:
        compiled = style == "compiled"
        turns[f"torch {style}"] = lambda s, compiled=compiled: peer.ask(do="train", compiled=compiled, seconds=s)
    return result | {title: measure(turns, "steps", args)}


def main() -> None:
    """Run every variant, print the ratios, write the JSON."""
    args = arguments()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])  # both sides; before JAX makes its threads
    if (load := os.getloadavg()[0]) > 0.5:
        print(f"Load average {load:.1f}: other work is running, read the figures per CPU second beside the others.")
    if not args.torch_python:
        print("No --torch-python and no TORCH_PYTHON: PyTorch is left out, only this project is measured.")
    result: dict[str, Any] = {"quick": args.quick, "threads": args.threads, "seconds": args.seconds}
    with tempfile.TemporaryDirectory() as folder:
        log = make_log(Path(folder) / "log")
        trained = {layout: training.Ours(workload(log, layout)) for layout in ("padded", "packed")}
        ours, peer = Sampling(trained["padded"]), None
        result["fill of packed rows"] = trained["packed"].run.loader.fill
        if args.torch_python:
            peer, result["largest_difference"] = start_peer(args.torch_python, ours, args.threads, Path(folder))
            result["torch"] = peer.versions
        result |= compare(ours, trained, peer, args)
        if peer is not None:
            peer.close()
    training.save("diffusion", result)


if __name__ == "__main__":
    main()
