"""Users/s of trie-constrained beam search: TIGER's decoder, 50 beams, 4 codes of 256, 12 thousand and 1 million tuples.

    python -m benchmarks.beam [--quick] [--torch-python=PYTHON] [--threads=2]

A batch of 16 histories of 20 events is encoded and decoded by d_model 128, 4 + 4 layers, 6 x 64 heads and 1,024 hidden
units: constrained, constrained with 20 seen items excluded inside the search, unconstrained (same model, same width:
the best of all 50 x 256 continuations), against `generate` of Hugging Face's T5 of the same size over the same trie
(prefix_allowed_tokens_fn) in an environment of its own (`pip install torch==2.13.0 transformers numpy`; its interpreter
named by --torch-python or TORCH_PYTHON). Weights are random: time does not depend on them. The variants take turns in
one run; figures are medians over all batches. Also: the time to build the trie, the search alone (around a decoder that
costs nothing), and how many unconstrained tuples exist. About 5 minutes. Writes benchmarks/results/beam.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.training import save
from recscale.layers import trie as tries
from recscale.layers.beam import beam_search, take_beams
from recscale.models import tiger

SHAPE = {"d_model": 128, "depth": 4, "heads": 6, "head_dim": 64, "ffn": 1024, "levels": 4, "codebook": 256}
BATCH, LENGTH, WIDTH = 16, 20, 50
ITEMS = {"12k": 12_000, "1M": 1_000_000}
PEER = Path(__file__).parent / "_beam_peer.py"
GOALS = {"unconstrained": 0.8, "Hugging Face": 5.0}
Search = Callable[[np.random.Generator], jax.Array]


def decoder() -> tiger.Model:
    """The model at the benchmark's size."""
    sizes = {"embed_dim" if name == "d_model" else name: value for name, value in SHAPE.items()}
    return tiger.Model(
        tiger.Config(**sizes, max_length=LENGTH, dropout=0.0, dtype="float32", init="t5"), jax.random.key(0)
    )


def histories(rng: np.random.Generator) -> tiger.History:
    """A batch of full histories of random codes."""
    codes = rng.integers(0, SHAPE["codebook"], (BATCH, LENGTH, SHAPE["levels"])).astype(np.int32)
    ones = np.ones((BATCH, LENGTH), np.int32)
    return tiger.History(jnp.asarray(codes), jnp.asarray(ones > 0), jnp.asarray(ones), None)


def unconstrained(step, cache, batch: int, width: int) -> jax.Array:
    """The best `width` tuples of a beam search over every tuple of codes, int32 [B, W, Q]; ties in any order."""
    codes_BWQ, score_BW = jnp.zeros((batch, 1, 0), jnp.int32), jnp.zeros((batch, 1), jnp.float32)
    code_BW = jnp.zeros((batch, 1), jnp.int32)
    for level in range(SHAPE["levels"]):
        log_prob_BWK, cache = step(cache, code_BW, level)
        total_BN = (score_BW[:, :, None] + log_prob_BWK).reshape(batch, -1)
        score_BW, pick_BW = jax.lax.top_k(total_BN, width)
        parent_BW, code_BW = pick_BW // SHAPE["codebook"], pick_BW % SHAPE["codebook"]
        cache = jax.tree.map(lambda x, parent_BW=parent_BW: take_beams(x, parent_BW), cache)
        codes_BWQ = jnp.concatenate([take_beams(codes_BWQ, parent_BW), code_BW[..., None]], axis=-1)
    return codes_BWQ


def free_step(cache, code_BW, level):
    """A decoder that costs nothing to speak of: what is left is the search."""
    del level
    row_B = jnp.arange(code_BW.shape[0])[:, None, None]
    salt = (code_BW[..., None] * 40503 + jnp.arange(SHAPE["codebook"])[None, None] * 2654435 + row_B * 977) % 10007
    return -salt.astype(jnp.float32) / 1000, cache


def searches(catalogues: dict[str, tries.Trie]) -> dict[str, Search]:
    """Name of a variant -> a function that makes a batch and decodes it."""
    model = decoder()

    def stepped(model, history):
        memory = model.remember(history)
        return lambda cache, code_BW, level: model.advance(memory, cache, code_BW, level), model.begin(memory, 1)

    @jax.jit
    def constrained(model, history, trie, seen_BE):
        step, cache = stepped(model, history)
        return beam_search(step, cache, trie, BATCH, WIDTH, seen_BE).codes_BWQ

    @jax.jit
    def free(model, history):
        return unconstrained(*stepped(model, history), BATCH, WIDTH)

    @jax.jit
    def alone(trie, seen_BE):
        return beam_search(free_step, (), trie, BATCH, WIDTH, seen_BE).codes_BWQ

    found: dict[str, Search] = {"unconstrained": lambda rng: free(model, histories(rng))}
    found["unconstrained, search alone"] = lambda rng: alone_free()
    alone_free = jax.jit(lambda: unconstrained(free_step, (), BATCH, WIDTH))
    for name, trie in catalogues.items():
        trie = jax.device_put(trie)

        def seen(rng, trie=trie):
            return jnp.sort(jnp.asarray(rng.integers(1, trie.items + 1, (BATCH, LENGTH)), jnp.int32), axis=1)

        found[name] = lambda rng, trie=trie: constrained(model, histories(rng), trie, None)
        found[f"{name}, seen excluded"] = lambda rng, trie=trie, seen=seen: constrained(
            model, histories(rng), trie, seen(rng)
        )
        found[f"{name}, search alone"] = lambda rng, trie=trie: alone(trie, None)
        found[f"{name}, search alone, seen excluded"] = lambda rng, trie=trie, seen=seen: alone(trie, seen(rng))
    return found


def timed(search: Search, rounds: int, seed: int) -> list[float]:
    """Seconds of `rounds` batches after one that warms up."""
    rng, seconds = np.random.default_rng(seed), []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        jax.block_until_ready(search(rng))
        seconds.append(time.perf_counter() - started)
    return seconds[1:]


class Peer:
    """The PyTorch side, one process for the whole run."""

    def __init__(self, python: str, threads: int):
        self.threads = threads
        self.versions: dict[str, str] = {}
        self.process = subprocess.Popen([python, str(PEER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, codes: str, rounds: int) -> list[float]:
        order = {"codes": codes, "shape": SHAPE, "batch": BATCH, "length": LENGTH, "width": WIDTH, "rounds": rounds}
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(order | {"threads": self.threads}) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        self.versions = answer["versions"]
        return answer["seconds"]

    def close(self) -> None:
        """End the process: it has read all its orders."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def main() -> None:
    """Command line of the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two turns of fewer batches")
    parser.add_argument("--torch-python", default=os.environ.get("TORCH_PYTHON", ""))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    peer = Peer(arguments.torch_python, arguments.threads) if arguments.torch_python else None
    if peer is None:
        print("no --torch-python and no TORCH_PYTHON: Hugging Face is not measured")
    turns, rounds = (2, 2) if arguments.quick else (3, 4)
    times: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        catalogues, build_s, paths = {}, {}, {}
        for name, items in ITEMS.items():
            codes_VQ = np.random.default_rng(0).integers(0, SHAPE["codebook"], (items + 1, SHAPE["levels"]))
            paths[name] = f"{folder}/{name}.npy"
            np.save(paths[name], codes_VQ)
            started = time.perf_counter()
            catalogues[name] = tries.build(codes_VQ)
            build_s[name] = time.perf_counter() - started
        variants = searches(catalogues)
        for turn in range(turns):
            for name, search in variants.items():
                times.setdefault(name, []).extend(timed(search, rounds, turn))
            if peer is not None:
                for name, path in paths.items():
                    times.setdefault(f"Hugging Face, {name}", []).extend(peer(path, 1))
                times.setdefault("Hugging Face, unconstrained", []).extend(peer("", 1))
    if peer is not None:
        peer.close()
    exist = existing(np.asarray(variants["unconstrained"](np.random.default_rng(0))), catalogues)
    users = {name: BATCH / statistics.median(seconds) for name, seconds in times.items()}
    report(times, users, build_s, exist)
    save(
        "beam",
        {
            "shape": SHAPE, "batch": BATCH, "length": LENGTH, "width": WIDTH, "users_per_s": users,
            "median_s": {name: statistics.median(seconds) for name, seconds in times.items()},
            "min_s": {name: min(seconds) for name, seconds in times.items()},
            "build_s": build_s, "unconstrained_tuples_that_exist": exist, "ratios": ratios(users),
            "peer": peer.versions if peer else None,
        },
    )  # fmt: skip


def existing(codes_BWQ: np.ndarray, catalogues: dict[str, tries.Trie]) -> dict[str, float]:
    """The share of these tuples that each catalogue has."""
    found = {}
    for name, trie in catalogues.items():
        tuples = set(map(tuple, tries.leaf_codes(trie).tolist()))
        found[name] = float(np.mean([tuple(x) in tuples for x in codes_BWQ.reshape(-1, SHAPE["levels"]).tolist()]))
    return found


def ratios(users: dict[str, float]) -> dict[str, float]:
    """Speed of the constrained search over each of the others."""
    pairs = {f"{name} / unconstrained": (name, "unconstrained") for name in ITEMS}
    pairs |= {f"{name}, seen excluded / unconstrained": (f"{name}, seen excluded", "unconstrained") for name in ITEMS}
    pairs |= {f"{name} / Hugging Face": (name, f"Hugging Face, {name}") for name in ITEMS}
    return {name: users[own] / users[other] for name, (own, other) in pairs.items() if other in users}


def report(times, users, build_s, exist) -> None:
    """The table of medians (and minima), and the ratios beside what is wanted."""
    print(f"{'batches of ' + str(BATCH):44s}{'users/s':>10s}{'ms: median (min)':>24s}")
    for name, seconds in times.items():
        cell = f"{1e3 * statistics.median(seconds):.1f} ({1e3 * min(seconds):.1f})"
        print(f"{name:44s}{users[name]:>10.1f}{cell:>24s}")
    for name, ratio in ratios(users).items():
        print(f"{name}: {ratio:.2f}x (wanted: {GOALS[name.split(' / ')[1]]}x)")
    for name in ITEMS:
        print(f"{name}: trie built in {build_s[name]:.2f} s; {exist[name]:.2%} of the unconstrained tuples exist")


if __name__ == "__main__":
    main()
