"""Kinds of embedding table: how an id becomes rows of arrays, and how those rows become one vector.

A kind is four functions of the table's sizes. `arrays`: the arrays it keeps, by name ("" is the main one). `slots`: the
rows of every array that is not indexed by the id itself. `compose`: rows to vectors. `mixer`: small dense parameters
that `compose` needs. An array named "codes" is fixed: integers per id that decide its rows, computed before training.

To add a kind: write its functions, add a line to KINDS.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from recscale.layers.embedding import Array

LEVELS = 256  # values of one code of a product-quantised table

Rows = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Table:
    """An embedding table: vectors [dim] for ids 1..num_ids; id 0 is padding and gives zeros.

    kind: one of KINDS. rows: of the shared array (hashed, ngram), kept by frequency (capped), or remainders
    (quotient_remainder); 0 for the others. parts: hash functions, codes, or embedding sets; inner: width of a stored
    row (low_rank, multi). combine: "sum" or "concat" the parts of a hashed table. dtype: storage, "float32" or
    "bfloat16". Raises ValueError for sizes that do not fit the kind.
    """

    num_ids: int
    dim: int
    kind: str = "full"
    rows: int = 0
    parts: int = 1
    inner: int = 0
    combine: str = "sum"
    dtype: str = "float32"
    stddev: float = 0.02
    fixed: bool = False

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"table.kind = {self.kind!r}: expected one of {tuple(KINDS)}")
        if self.num_ids < 1 or self.dim < 1 or self.rows < 0 or self.parts < 1 or self.stddev < 0:
            raise ValueError(
                f"table of {self.num_ids} ids, dim {self.dim}, rows {self.rows}, parts {self.parts}: "
                "expected positive sizes (rows may be 0 for kinds that do not share rows)"
            )
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"table.dtype = {self.dtype!r}: expected 'float32' or 'bfloat16'")
        if self.combine not in ("sum", "concat"):
            raise ValueError(f"table.combine = {self.combine!r}: expected 'sum' or 'concat'")
        self._check_fields(KINDS[self.kind].needs)
        split = self.kind == "pq" or (self.kind == "hashed" and self.combine == "concat")
        if split and self.dim % self.parts:
            raise ValueError(f"table.dim = {self.dim} does not divide into {self.parts} parts")

    def _check_fields(self, needs: tuple[str, ...]) -> None:
        """A size that the kind needs is there, and no other is set."""
        for name in ("rows", "inner"):
            if getattr(self, name) < 0 or (name in needs) != (getattr(self, name) > 0):
                verb = "needs" if name in needs else "has no"
                raise ValueError(f"table.kind = {self.kind!r} {verb} table.{name}, found {getattr(self, name)}")
        if "rows" in needs and self.rows > self.num_ids:
            raise ValueError(f"table.rows = {self.rows} is beyond the {self.num_ids} ids: use kind 'full'")
        if self.combine == "concat" and "combine" not in needs:
            raise ValueError(f"table.kind = {self.kind!r} has no table.combine: leave it at 'sum'")
        if self.parts > 1 and "parts" not in needs:
            raise ValueError(f"table.kind = {self.kind!r} has no table.parts, found {self.parts}")

    def arrays(self) -> dict[str, Array]:
        """The arrays of the table."""
        made = KINDS[self.kind].arrays(self)
        learned = {"dtype": self.dtype, "fixed": self.fixed}
        return {k: a if k == "codes" else dataclasses.replace(a, **learned) for k, a in made.items()}

    def slots(self, ids: Any, codes: Any) -> dict[str, Any]:
        """Slots [..., k] of ids [...] in each array that is not by id; codes [..., Q] where the kind has them."""
        xp = np if isinstance(ids, np.ndarray) else jnp
        found = KINDS[self.kind].slots(self, ids, codes, xp)
        return {name: xp.where(ids[..., None] > 0, slots, 0).astype(xp.int32) for name, slots in found.items()}

    def compose(self, rows: Rows, mixer: dict[str, jax.Array]) -> jax.Array:
        """Rows (by id: [..., D]; shared: [..., k, D]) to vectors [..., dim]."""
        return KINDS[self.kind].compose(self, rows, mixer)

    def mixer(self, key: jax.Array) -> dict[str, jax.Array]:
        """Initial dense parameters of the kind; {} for most."""
        return KINDS[self.kind].mixer(self, key)

    @property
    def num_codes(self) -> int:
        """Codes per id; 0 where the kind has none."""
        arrays = KINDS[self.kind].arrays(self)
        return arrays["codes"].dim if "codes" in arrays else 0

    @property
    def bytes(self) -> int:
        """Stored bytes, codes included, dense parameters of the kind included, optimizer slots not."""
        mixer = jax.eval_shape(self.mixer, jax.random.key(0))
        return sum(a.bytes for a in self.arrays().values()) + sum(4 * math.prod(x.shape) for x in mixer.values())


class Kind(NamedTuple):
    """See the module docstring. needs: the fields of Table that this kind reads besides num_ids, dim and dtype."""

    arrays: Callable[[Table], dict[str, Array]]
    compose: Callable[[Table, Rows, dict[str, jax.Array]], jax.Array] = lambda t, rows, mixer: rows[""]
    slots: Callable[..., dict[str, Any]] = lambda t, ids, codes, xp: {}
    mixer: Callable[[Table, jax.Array], dict[str, jax.Array]] = lambda t, key: {}
    needs: tuple[str, ...] = ()


def _full(t: Table) -> dict[str, Array]:
    return {"": Array(t.num_ids, t.dim, t.stddev)}


def hash_slots(ids: Any, salt: int, rows: int, xp: Any) -> Any:
    """Slots 1..rows of ids under hash function `salt`: the 32-bit finalizer of MurmurHash3 on id + salt * odd."""
    h = ids.astype(xp.uint32) + xp.uint32(salt * 0x9E3779B9 & 0xFFFFFFFF)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h = (h ^ (h >> xp.uint32(shift))) * xp.uint32(factor)
    h = h ^ (h >> xp.uint32(16))
    return 1 + (h % xp.uint32(rows)).astype(xp.int32)


def _hashed(t: Table) -> dict[str, Array]:
    width = t.dim if t.combine == "sum" else t.dim // t.parts
    return {"": Array(t.rows, width, t.stddev * (t.parts**-0.5 if t.combine == "sum" else 1.0), by_id=False)}


def _hashed_slots(t: Table, ids: Any, codes: Any, xp: Any) -> dict[str, Any]:
    return {"": xp.stack([hash_slots(ids, salt, t.rows, xp) for salt in range(t.parts)], axis=-1)}


def _joined(t: Table, rows: Rows, mixer: dict[str, jax.Array]) -> jax.Array:
    if t.kind != "pq" and t.combine == "sum":
        return rows[""].sum(axis=-2)
    return rows[""].reshape(*rows[""].shape[:-2], t.dim)


def _quotient_remainder(t: Table) -> dict[str, Array]:
    # The vector is the product of two rows: each has the root of the deviation.
    deviation = t.stddev**0.5
    return {
        "quotient": Array(t.num_ids // t.rows + 1, t.dim, deviation, by_id=False),
        "remainder": Array(t.rows, t.dim, deviation, by_id=False),
    }


def _quotient_remainder_slots(t: Table, ids: Any, codes: Any, xp: Any) -> dict[str, Any]:
    return {"quotient": (ids // t.rows + 1)[..., None], "remainder": (ids % t.rows + 1)[..., None]}


def _low_rank_mixer(t: Table, key: jax.Array) -> dict[str, jax.Array]:
    return {"projection": jax.random.normal(key, (t.inner, t.dim)) * t.inner**-0.5}


def _multi_mixer(t: Table, key: jax.Array) -> dict[str, jax.Array]:
    value, gate = jax.random.split(key)
    shape, scale = (t.parts, t.inner, t.dim), t.inner**-0.5
    # The gates start near 1/2: twice the scale keeps the deviation of a plain projection.
    return {
        "value": 2 * scale * t.parts**-0.5 * jax.random.normal(value, shape),
        "gate": scale / t.stddev * jax.random.normal(gate, shape),
    }


def _multi(t: Table, rows: Rows, mixer: dict[str, jax.Array]) -> jax.Array:
    sets = rows[""].reshape(*rows[""].shape[:-1], t.parts, t.inner)
    value = jnp.einsum("...me,med->...md", sets, mixer["value"])
    return (value * jax.nn.sigmoid(jnp.einsum("...me,med->...md", sets, mixer["gate"]))).sum(axis=-2)


def _codes(t: Table, count: int, dtype: str) -> Array:
    return Array(t.num_ids, count, 0.0, dtype, fixed=True)


def _pq(t: Table) -> dict[str, Array]:
    centroids = Array(t.parts * LEVELS, t.dim // t.parts, t.stddev, by_id=False)
    return {"codes": _codes(t, t.parts, "uint8"), "": centroids}


def _pq_slots(t: Table, ids: Any, codes: Any, xp: Any) -> dict[str, Any]:
    first = (1 + LEVELS * xp.arange(t.parts)).reshape((1,) * (codes.ndim - 1) + (-1,))
    return {"": codes.astype(xp.int32) + first}


def _capped(t: Table) -> dict[str, Array]:
    return {"codes": _codes(t, 1, "int32"), "": Array(t.rows, t.dim, t.stddev, by_id=False)}


def _ngram(t: Table) -> dict[str, Array]:
    return {
        "codes": _codes(t, t.parts, "uint8"),
        "": Array(t.rows, t.dim, t.stddev * t.parts**-0.5, by_id=False),
    }


def _ngram_slots(t: Table, ids: Any, codes: Any, xp: Any) -> dict[str, Any]:
    """One row per prefix of the codes: (c1), (c1, c2), ..., each hashed with its length as the salt."""
    prefix, slots = xp.zeros(codes.shape[:-1], xp.uint32), []
    for n in range(t.parts):
        prefix = prefix * xp.uint32(LEVELS + 1) + codes[..., n].astype(xp.uint32) + xp.uint32(1)
        slots.append(hash_slots(prefix, n, t.rows, xp))
    return {"": xp.stack(slots, axis=-1)}


KINDS: dict[str, Kind] = {
    "full": Kind(_full),
    "hashed": Kind(_hashed, _joined, _hashed_slots, needs=("rows", "parts", "combine")),
    # arXiv 1909.02107, product of the two.
    "quotient_remainder": Kind(
        _quotient_remainder,
        lambda t, rows, mixer: rows["quotient"][..., 0, :] * rows["remainder"][..., 0, :],
        _quotient_remainder_slots,
        needs=("rows",),
    ),
    "low_rank": Kind(
        lambda t: {"": Array(t.num_ids, t.inner, t.stddev)},
        lambda t, rows, mixer: rows[""] @ mixer["projection"],
        mixer=_low_rank_mixer,
        needs=("inner",),
    ),
    # arXiv 2312.06165 (RecJPQ): codes fixed before training, centroids trained.
    "pq": Kind(_pq, _joined, _pq_slots, needs=("parts",)),
    # After arXiv 2310.04400: independent sets, each with an interaction of its own (here a gated projection), summed.
    "multi": Kind(
        lambda t: {"": Array(t.num_ids, t.parts * t.inner, t.stddev)},
        _multi,
        mixer=_multi_mixer,
        needs=("parts", "inner"),
    ),
    # The rows - 1 most frequent ids have a row each, all others share the last one; codes hold the row.
    "capped": Kind(
        _capped, lambda t, rows, mixer: rows[""][..., 0, :], lambda t, ids, codes, xp: {"": codes}, needs=("rows",)
    ),
    "ngram": Kind(_ngram, lambda t, rows, mixer: rows[""].sum(axis=-2), _ngram_slots, needs=("rows", "parts")),
}


def information_abundance(vectors_VD: np.ndarray) -> float:
    """Sum of the singular values over the largest: 1 = collapsed to a line, D = all directions alike (2310.04400)."""
    values = np.linalg.svd(np.asarray(vectors_VD, np.float64), compute_uv=False)
    return float(values.sum() / values[0]) if values[0] > 0 else 0.0
