"""Training tokens/s of TIGER (d_model 128, 4 + 4 layers) against Hugging Face's T5 of the same size in PyTorch.

    python -m benchmarks.tiger [--quick] [--torch-python=PYTHON] [--threads=2] [--seconds=10] [--compiled]

6 x 64 heads, 1,024 hidden units, 4 levels of 256 codes, dropout .1, float32, AdamW. Both sides train equal histories,
each with one target of 4 tokens, in two settings. "full": 32 histories of 20 items (80 tokens) a batch, nothing padded:
the arithmetic alone. "real": 96 histories as long as Amazon Beauty's training prefixes are (at most 20, 6.7 on
average); public code pads them to the longest of the batch, recscale packs them into rows of 20 slots, six to a row at
most. A token is a real one of encoder or decoder. PyTorch (benchmarks/_tiger_peer.py, in an environment of
its own: `pip install torch==2.13.0 transformers numpy`, its interpreter named by --torch-python or TORCH_PYTHON) starts
from our parameters, and its scores must agree with ours to 1e-4 first. It trains eagerly, as public code does;
--compiled adds torch.compile.

Variants take turns in one run; figures are medians over the turns after two steps that warm up. Writes
benchmarks/results/tiger.json.
"""

import argparse
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
import numpy as np
import optax

from benchmarks import training
from recscale.data import packing
from recscale.layers.code_tokens import History
from recscale.mesh import REMAT
from recscale.models import tiger

PEER = Path(__file__).parent / "_tiger_peer.py"
CONFIG = tiger.Config(
    embed_dim=128, depth=4, heads=6, head_dim=64, ffn=1024, dropout=0.1, levels=4, codebook=256, max_length=20,
    dtype="float32",
)  # fmt: skip
BATCHES, MOST = 8, 6
HISTORIES = {"full": 32, "real": 96}
# Share of Amazon Beauty's training prefixes of 1, 2, ... events, the last 20 at most (leave-one-out): 6.7 on average.
SHARES = np.array(
    [1702, 1702, 1157, 836, 632, 494, 390, 323, 270, 227, 194, 167, 147, 131, 115, 104, 95, 86, 78, 1153]
)  # fmt: skip
GOAL, TOLERANCE = 1.3, 1e-4


def data(setting: str) -> dict[str, np.ndarray]:
    """Codes of histories [steps, B, L, Q] and targets [steps, B, Q], and lengths of histories [steps, B]."""
    rng, B, L = np.random.default_rng(0), HISTORIES[setting], CONFIG.max_length
    history = rng.integers(0, CONFIG.codebook, (BATCHES, B, L, CONFIG.levels)).astype(np.int32)
    target = rng.integers(0, CONFIG.codebook, (BATCHES, B, CONFIG.levels)).astype(np.int32)
    lengths = np.full((BATCHES, B), L)
    if setting == "real":
        lengths = rng.choice(np.arange(1, L + 1), (BATCHES, B), p=SHARES / SHARES.sum())
    return {"history": history, "target": target, "lengths": lengths}


def packed(history_BLQ, target_BQ, lengths_B, rows: int) -> tuple[np.ndarray, ...]:
    """Histories in `rows` rows: codes and codes of what follows [R, L, Q], segments [R, L], last slots [R, MOST].

    The slot of a target that a row does not have is one past its end and means nothing.
    """
    R, L, Q = rows, CONFIG.max_length, CONFIG.levels
    plan = packing.plan(lengths_B, L, most=MOST)
    codes, following = np.zeros((R, L, Q), np.int32), np.zeros((R, L, Q), np.int32)
    segment, last = np.zeros((R, L), np.int32), np.full((R, MOST), L, np.int32)
    for row in range(plan.num_rows):
        at = 0
        for place, b in enumerate(plan.segments[plan.row_offsets[row] : plan.row_offsets[row + 1]]):
            n = lengths_B[b]
            codes[row, at : at + n] = history_BLQ[b, :n]
            following[row, at : at + n] = np.concatenate([history_BLQ[b, 1:n], target_BQ[b : b + 1]])
            segment[row, at : at + n], last[row, place] = place + 1, at + n - 1
            at += n
    return codes, following, segment, last


class Ours:
    """TIGER, its optimizer and its batches."""

    def __init__(self, remat: str, setting: str):
        self.setting, arrays = setting, data(setting)
        rows = max(packing.plan(n, CONFIG.max_length, most=MOST).num_rows for n in arrays["lengths"])
        every = zip(arrays["history"], arrays["target"], arrays["lengths"], strict=True)
        self.batches = [jax.device_put(packed(*one, rows)) for one in every]
        self.tokens = [int(CONFIG.levels * (n.sum() + len(n))) for n in arrays["lengths"]]
        self.optimizer = optax.adamw(1e-4, weight_decay=0.01)
        self.model = jax.jit(lambda key: tiger.Model(CONFIG, key))(jax.random.key(0))
        self.state = jax.tree.map(lambda x: x.copy(), (self.model, self.optimizer.init(self.model)))
        self.train = jax.jit(self._train, static_argnums=3, donate_argnums=0)
        self.remat, self.step = remat, 0

    def _train(self, state, batch, key, remat):
        codes, following, segment, last = batch
        real = last < CONFIG.max_length

        def loss(model):
            place = jnp.minimum(last, CONFIG.max_length - 1)
            scores = model(History(codes, segment > 0, segment), following, place, key, REMAT[remat])
            wanted = jnp.take_along_axis(following, place[:, :, None], axis=1)
            nats = optax.softmax_cross_entropy_with_integer_labels(scores, wanted)
            return (nats * real[:, :, None]).sum() / (real.sum() * CONFIG.levels)

        model, slots = state
        value, gradient = jax.value_and_grad(loss)(model)
        updates, slots = self.optimizer.update(gradient, slots, model)
        return (optax.apply_updates(model, updates), slots), value

    def turn(self, seconds: float) -> dict[str, float]:
        """Train for about `seconds`, at least one step."""
        tokens = steps = 0
        cpu, begin = time.process_time(), time.perf_counter()
        waiting = None
        while steps == 0 or time.perf_counter() - begin < seconds:
            at, key = self.step % BATCHES, jax.random.key(self.step)
            self.state, value = self.train(self.state, self.batches[at], key, self.remat)
            if waiting is not None:
                float(waiting)
            waiting = value
            tokens, steps, self.step = tokens + self.tokens[at], steps + 1, self.step + 1
        jax.block_until_ready(self.state)
        wall = time.perf_counter() - begin
        return {"events": tokens, "steps": steps, "wall": wall, "cpu": time.process_time() - cpu}

    def scores(self) -> np.ndarray:
        """[B, Q, K] of batch 0 without dropout, from the parameters of the start, in the order of the histories."""
        codes, following, segment, last = self.batches[0]
        place = np.minimum(last, CONFIG.max_length - 1)
        found = np.asarray(jax.jit(lambda m: m(History(codes, segment > 0, segment), following, place))(self.model))
        plan = packing.plan(data(self.setting)["lengths"][0], CONFIG.max_length, most=MOST)
        out = np.zeros((HISTORIES[self.setting], *found.shape[2:]), np.float32)
        for row in range(plan.num_rows):
            held = plan.segments[plan.row_offsets[row] : plan.row_offsets[row + 1]]
            out[held] = found[row, : len(held)]
        return out


class Peer(training.Torch):
    """_tiger_peer.py in its own process, asked as the peer of benchmarks.training."""

    def __init__(self, python: str, setup: Path):
        self.process = subprocess.Popen(
            [python, str(PEER), str(setup)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.versions = self._answer()


def by_their_names(model: tiger.Model) -> dict[str, np.ndarray]:
    """The parameters under the names and in the layouts of T5ForConditionalGeneration."""
    found = {"shared.weight": model.tokens.embedding[...]}
    for name in ("encoder", "decoder"):
        stack = getattr(model, name)
        found[f"{name}.final_layer_norm.weight"] = stack.norm.scale[...]
        found[f"{name}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = stack.relative[...]
        for i, layer in enumerate(stack.unstacked()):
            parts = [("SelfAttention", layer.attention)]
            parts += [("EncDecAttention", layer.cross)] if name == "decoder" else []
            for j, (kind, attention) in enumerate(parts):
                prefix = f"{name}.block.{i}.layer.{j}"
                found[f"{prefix}.layer_norm.weight"] = attention.norm.scale[...]
                for letter, kernel in zip("qkv", np.split(np.asarray(attention.qkv[...]), 3, axis=1), strict=True):
                    found[f"{prefix}.{kind}.{letter}.weight"] = kernel.T
                found[f"{prefix}.{kind}.o.weight"] = attention.out[...].T
            prefix = f"{name}.block.{i}.layer.{len(parts)}"
            found[f"{prefix}.layer_norm.weight"] = layer.ffn.norm.scale[...]
            found[f"{prefix}.DenseReluDense.wi.weight"] = layer.ffn.wi[...].T
            found[f"{prefix}.DenseReluDense.wo.weight"] = layer.ffn.wo[...].T
    return {name: np.ascontiguousarray(value) for name, value in found.items()}


def start_peer(python: str, ours: Ours, threads: int, folder: Path) -> tuple[training.Torch, float]:
    """The peer with our parameters and batches, and how far its scores are from ours; SystemExit where they differ."""
    model = {"d_model": CONFIG.embed_dim, "d_kv": CONFIG.head_dim, "d_ff": CONFIG.ffn}
    model |= {"num_layers": CONFIG.depth, "num_heads": CONFIG.heads}
    setup = {"model": model, "levels": CONFIG.levels, "codebook": CONFIG.codebook}
    setup |= {"dropout": CONFIG.dropout, "threads": threads}
    file = folder / ours.setting
    np.savez(f"{file}.npz", setup=json.dumps(setup), **data(ours.setting), **by_their_names(ours.model))
    peer = Peer(python, Path(f"{file}.npz"))
    count = peer.ask(do="logits", out=f"{file}.npy")["parameters"]
    difference = float(np.abs(np.load(f"{file}.npy") - ours.scores()).max())
    print(f"parameters {count:,} and {sum(tiger.param_groups(CONFIG).values()):,}; scores differ by {difference:.1e}")
    if not difference < TOLERANCE:
        peer.close()
        sys.exit(f"error: the two models' scores differ by {difference}, expected < {TOLERANCE}: not the same model")
    return peer, difference


def measure(setting: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Tokens/s of every variant in one setting, and ours over the faster of theirs."""
    ours = {f"ours, remat {remat}": Ours(remat, setting) for remat in ("layer", "none")}
    turns: dict[str, Callable] = {name: one.turn for name, one in ours.items()}
    result: dict[str, Any] = {}
    peer = None
    if args.torch_python:
        first = next(iter(ours.values()))
        peer, result["largest_difference"] = start_peer(args.torch_python, first, args.threads, folder)
        result["peer"] = peer.versions
        for compiled in (False, True)[: 1 + args.compiled]:
            name = "Hugging Face T5, " + ("compiled" if compiled else "eager")
            turns[name] = lambda s, compiled=compiled: peer.ask(do="run", compiled=compiled, seconds=s)
    found = training.compare(turns, args.seconds, args.repeats)
    if peer is not None:
        peer.close()
    variants = {name: {k.replace("events", "tokens"): v for k, v in one.items()} for name, one in found.items()}
    for name, v in variants.items():
        spread = f"{v['lowest']:,.0f} to {v['highest']:,.0f}; {v['tokens_per_cpu_second']:,.0f} per CPU second"
        print(f"  {setting}: {name:<28} {v['tokens_per_second']:>9,.0f} tokens/s  ({spread})")
    theirs = [v for name, v in variants.items() if name.startswith("Hugging Face")]
    ratios = {}
    for unit in ("tokens_per_second", "tokens_per_cpu_second") if theirs else ():
        best = max(v[unit] for v in theirs)
        ratios |= {f"{name}, {unit}": variants[name][unit] / best for name in ours}
    for name, value in ratios.items():
        print(f"  {setting}: {name:<46} {value:5.2f}x  (goal {GOAL}x)")
    return result | {"variants": variants, "ratios": ratios}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter turns")
    parser.add_argument("--torch-python", default=os.environ.get("TORCH_PYTHON", ""))
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seconds", type=float, default=0.0, help="length of a turn (10, quick 3)")
    parser.add_argument("--compiled", action="store_true", help="torch.compile too")
    args = parser.parse_args()
    args.seconds = args.seconds or (3.0 if args.quick else 10.0)
    args.repeats = 3 if args.quick else 5
    return args


def main() -> None:
    """Run every variant, print the ratios, write the JSON."""
    args = arguments()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])  # both sides; before JAX makes its threads
    if (load := os.getloadavg()[0]) > 0.5:
        print(f"Load average {load:.1f}: other work is running, read the figures per CPU second beside the others.")
    result = {"quick": args.quick, "threads": args.threads, "seconds": args.seconds, "histories": HISTORIES}
    if not args.torch_python:
        print("No --torch-python and no TORCH_PYTHON: PyTorch is left out, only this project is measured.")
    with tempfile.TemporaryDirectory() as folder:
        for setting in HISTORIES:
            result[setting] = measure(setting, args, Path(folder))
    training.save("tiger", result)


if __name__ == "__main__":
    main()
