"""Memory and time of the softmax over a catalogue of 1 M items x 64: chunked against plain, and against sampled.

    python -m benchmarks.softmax [--items=1000000] [--tokens=512]

The gradient step of T queries: `catalogue_softmax` (chunks of items, scores computed again in the backward pass), the
plain softmax (all T x V scores at once), and the sampled one (128 negatives a query, rows updated sparsely). Memory is
the compiler's: arguments and temporaries; times are medians. Writes benchmarks/results/softmax.json.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.training import save
from recscale import optim
from recscale.layers.kinds import Table
from recscale.layers.softmax import catalogue_softmax
from recscale.layers.tables import Tables, Update
from recscale.mesh import make_mesh
from recscale.tasks.next_item import sampled_softmax

DIM, NEGATIVES = 64, 128
LIMIT = 1.2
RULE = optim.TABLE_RULES["sgd"]


class Dot:
    """The task as far as the softmax needs it: which table, and scores by dot product."""

    catalogue = "item"

    def item(self, vectors: jax.Array) -> jax.Array:
        return vectors


def _update(tables: Tables, array: jax.Array, touched, grads, dense: jax.Array | None) -> jax.Array:
    how, zero = Update(RULE, jnp.float32(0.1), 0.0), jnp.zeros((), jnp.int32)
    return tables.update("item", array, {}, touched.position[""], grads[""], how, zero, jax.random.key(0), dense)[0]


def chunked(tables: Tables) -> Callable:
    """(table, queries, targets, negatives) -> table after a step of the chunked full softmax."""

    def step(array, query, target, negative):
        del negative
        touched, rows, _ = tables.touch({"item": array}, "item", {"target": target})
        dense = jax.grad(lambda a: catalogue_softmax(tables, Dot(), {"item": a}, {"item": {}}, query, target).sum())(
            array
        )
        return _update(tables, array, touched, jax.tree.map(jnp.zeros_like, rows), dense)

    return step


def plain(tables: Tables) -> Callable:
    """The same with all scores at once; the table in the order of its rows."""
    del tables

    def step(array, query, target, negative):
        del negative

        def loss(array):
            scores = query @ array.T
            return (jax.nn.logsumexp(scores, axis=1) - jnp.take_along_axis(scores, target[:, None], axis=1)[:, 0]).sum()

        return array - 0.1 * jax.grad(loss)(array)

    return step


def sampled(tables: Tables) -> Callable:
    """A step of the sampled softmax."""

    def step(array, query, target, negative):
        ids = {"target": target, "negative": negative}
        touched, rows, _ = tables.touch({"item": array}, "item", ids)

        def loss(rows):
            vectors = tables.vectors("item", rows, {}, touched, ids)
            positive = (query * vectors["target"]).sum(axis=-1)
            return sampled_softmax(positive, jnp.einsum("td,tnd->tn", query, vectors["negative"])).sum()

        return _update(tables, array, touched, jax.grad(loss)(rows), None)

    return step


def measure(make: Callable, tables: Tables, items: int, tokens: int, repeats: int) -> dict[str, Any]:
    """Bytes by the compiler and seconds a step."""
    rng = np.random.default_rng(0)
    query = jnp.asarray(rng.normal(size=(tokens, DIM)), jnp.float32)
    target = jnp.asarray(rng.integers(1, items + 1, tokens), jnp.int32)
    negative = jnp.asarray(rng.integers(1, items + 1, (tokens, NEGATIVES)), jnp.int32)
    array = jnp.full(tables.arrays["item"].shape, 0.01)
    step = jax.jit(make(tables), donate_argnums=0)
    memory = step.lower(array, query, target, negative).compile().memory_analysis()
    seconds = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        array = jax.block_until_ready(step(array, query, target, negative))
        seconds.append(time.perf_counter() - started)
    used = {"arguments": memory.argument_size_in_bytes, "temporaries": memory.temp_size_in_bytes}
    return used | {"total": sum(used.values()), "seconds": statistics.median(seconds[1:])}


def main() -> None:
    """Command line of the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--tokens", type=int, default=512)
    arguments = parser.parse_args()
    items, tokens = arguments.items, arguments.tokens
    tables = Tables({"item": Table(items, DIM)}, make_mesh(1, 1, 1))
    held = tables.arrays["item"].size * DIM * 4
    found = {}
    for name, make in (("sampled", sampled), ("chunked", chunked), ("plain", plain)):
        found[name] = measure(make, tables, items, tokens, 3)
        mib = {k: f"{v / 2**20:,.0f} MiB" for k, v in found[name].items() if k != "seconds"}
        print(f"{name:8s} {found[name]['seconds']:.3f} s a step  {mib}")
    ratio = found["chunked"]["total"] / (found["sampled"]["total"] + held)
    print(f"chunked / (sampled + table): {ratio:.3f} (at most {LIMIT})")
    print(f"chunked / plain time: {found['chunked']['seconds'] / found['plain']['seconds']:.2f}")
    save("softmax", {"items": items, "tokens": tokens, "table_bytes": held, "memory_ratio": ratio, **found})


if __name__ == "__main__":
    main()
