"""Training tokens/s of TIGER (d_model 128, 4 + 4 layers) against Hugging Face's T5 of the same size in PyTorch.

    python -m benchmarks.tiger [--quick] [--torch-python=PYTHON] [--threads=2] [--seconds=10] [--compiled]

6 x 64 heads, 1,024 hidden units, 4 levels of 256 codes, dropout .1, float32, AdamW. Both sides train the same batches:
32 histories of 20 items (80 tokens) and one target (4 tokens), without padding and without packing, which would be a
second advantage of ours. A token is one of encoder or decoder. PyTorch (benchmarks/_tiger_peer.py, in an environment of
its own: `pip install torch==2.13.0 transformers numpy`, its interpreter named by --torch-python or TORCH_PYTHON) starts
from our parameters, and its scores must agree with ours to 1e-4 first. It trains eagerly, as public code does;
--compiled adds torch.compile.

Variants take turns in one run; figures are medians over the turns after two steps that warm up. "packed" is ours alone:
the same rows with six histories each, a target for every one. Writes benchmarks/results/tiger.json.
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

import jax
import numpy as np
import optax

from benchmarks import training
from recscale.layers.code_tokens import History
from recscale.mesh import REMAT
from recscale.models import tiger

PEER = Path(__file__).parent / "_tiger_peer.py"
CONFIG = tiger.Config(
    embed_dim=128, depth=4, heads=6, head_dim=64, ffn=1024, dropout=0.1, levels=4, codebook=256, max_length=20,
    dtype="float32",
)  # fmt: skip
ROWS, BATCHES = 32, 8
SEGMENTS = (4, 3, 3, 3, 3, 4)
GOAL, TOLERANCE = 1.3, 1e-4


def data() -> dict[str, np.ndarray]:
    """Codes of histories [steps, B, L, Q] and targets [steps, B, Q]."""
    rng = np.random.default_rng(0)
    shape = (BATCHES, ROWS, CONFIG.max_length, CONFIG.levels)
    history = rng.integers(0, CONFIG.codebook, shape).astype(np.int32)
    target = rng.integers(0, CONFIG.codebook, (BATCHES, ROWS, CONFIG.levels)).astype(np.int32)
    return {"history": history, "target": target}


class Ours:
    """TIGER, its optimizer and its batches. packed: six histories a row instead of one."""

    def __init__(self, remat: str, packed: bool = False):
        arrays = data()
        lengths = SEGMENTS if packed else (CONFIG.max_length,)
        segment = np.repeat(np.arange(1, len(lengths) + 1), lengths)[None].repeat(ROWS, axis=0).astype(np.int32)
        last = (np.cumsum(lengths) - 1)[None].repeat(ROWS, axis=0).astype(np.int32)
        self.segment, self.last = jax.device_put((segment, last))
        self.batches = []
        for history, target in zip(arrays["history"], arrays["target"], strict=True):
            following = np.concatenate([history[:, 1:], target[:, None]], axis=1)
            self.batches.append(jax.device_put((history, following)))
        self.tokens = ROWS * CONFIG.levels * (CONFIG.max_length + len(lengths))
        self.optimizer = optax.adamw(1e-4, weight_decay=0.01)
        self.model = jax.jit(lambda key: tiger.Model(CONFIG, key))(jax.random.key(0))
        self.state = jax.tree.map(lambda x: x.copy(), (self.model, self.optimizer.init(self.model)))
        self.train = jax.jit(self._train, static_argnums=4, donate_argnums=0)
        self.remat, self.step = remat, 0

    def _train(self, state, history, following, key, remat):
        def loss(model):
            known = self.segment > 0
            rows = History(history, known, self.segment)
            scores = model(rows, following, self.last, key, REMAT[remat])
            wanted = np.arange(ROWS)[:, None], self.last
            return optax.softmax_cross_entropy_with_integer_labels(scores, following[wanted]).mean()

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
            history, following = self.batches[self.step % BATCHES]
            key = jax.random.key(self.step)
            self.state, value = self.train(self.state, history, following, key, self.remat)
            if waiting is not None:
                float(waiting)
            waiting = value
            tokens, steps, self.step = tokens + self.tokens, steps + 1, self.step + 1
        jax.block_until_ready(self.state)
        wall = time.perf_counter() - begin
        return {"events": tokens, "steps": steps, "wall": wall, "cpu": time.process_time() - cpu}

    def scores(self) -> np.ndarray:
        """[B, Q, K] of batch 0 without dropout, from the parameters of the start."""
        history, following = self.batches[0]
        rows = History(history, self.segment > 0, self.segment)
        return np.asarray(jax.jit(lambda m: m(rows, following, self.last))(self.model))[:, 0]


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
    np.savez(folder / "setup.npz", setup=json.dumps(setup), **data(), **by_their_names(ours.model))
    peer = Peer(python, folder / "setup.npz")
    count = peer.ask(do="logits", out=str(folder / "logits.npy"))["parameters"]
    difference = float(np.abs(np.load(folder / "logits.npy") - ours.scores()).max())
    print(f"parameters {count:,} and {sum(tiger.param_groups(CONFIG).values()):,}; scores differ by {difference:.1e}")
    if not difference < TOLERANCE:
        peer.close()
        sys.exit(f"error: the two models' scores differ by {difference}, expected < {TOLERANCE}: not the same model")
    return peer, difference


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one variant of ours, fewer and shorter turns")
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
    ours = {f"ours, remat {remat}": Ours(remat) for remat in ("layer", "none")[: 1 if args.quick else 2]}
    turns: dict[str, Callable] = {name: one.turn for name, one in ours.items()}
    if not args.quick:
        turns["ours, packed, six histories a row"] = Ours("layer", packed=True).turn
    result = {"quick": args.quick, "threads": args.threads, "seconds": args.seconds, "rows": ROWS}
    peer = None
    with tempfile.TemporaryDirectory() as folder:
        if args.torch_python:
            first = next(iter(ours.values()))
            peer, result["largest_difference"] = start_peer(args.torch_python, first, args.threads, Path(folder))
            result["peer"] = peer.versions
            for compiled in (False, True)[: 1 + args.compiled]:
                name = "Hugging Face T5, " + ("compiled" if compiled else "eager")
                turns[name] = lambda s, compiled=compiled: peer.ask(do="run", compiled=compiled, seconds=s)
        else:
            print("No --torch-python and no TORCH_PYTHON: PyTorch is left out, only this project is measured.")
        found = training.compare(turns, args.seconds, args.repeats)
        if peer is not None:
            peer.close()
    result["variants"] = {
        name: {k.replace("events", "tokens"): v for k, v in one.items()} for name, one in found.items()
    }
    for name, v in result["variants"].items():
        spread = f"{v['lowest']:,.0f} to {v['highest']:,.0f}; {v['tokens_per_cpu_second']:,.0f} per CPU second"
        print(f"  {name:<36} {v['tokens_per_second']:>9,.0f} tokens/s  ({spread})")
    theirs = [v for name, v in result["variants"].items() if name.startswith("Hugging Face")]
    if theirs:
        result["ratios"] = {}
        for measure in ("tokens_per_second", "tokens_per_cpu_second"):
            best = max(v[measure] for v in theirs)
            result["ratios"] |= {f"{name}, {measure}": result["variants"][name][measure] / best for name in ours}
        for name, value in result["ratios"].items():
            print(f"  {name:<46} {value:5.2f}x  (goal {GOAL}x)")
    training.save("tiger", result)


if __name__ == "__main__":
    main()
