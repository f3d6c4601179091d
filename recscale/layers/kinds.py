"""Kinds of embedding table: how an id becomes rows of arrays, and how those rows become one vector.

A kind is four functions of the table's sizes. `arrays`: the arrays it keeps, by name ("" is the main one). `slots`: the
rows of every array that is not indexed by the id itself. `compose`: rows to vectors. `mixer`: small dense parameters
that `compose` needs. An array named "codes" is fixed: integers per id that decide its rows, computed before training.

To add a kind: write its functions, add a line to KINDS.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from recscale.layers.embedding import Array

LEVELS = 256  # values of a code that is one byte, as of every product-quantised table

Rows = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Table:
    """An embedding table: vectors [dim] for ids 1..num_ids; id 0 is padding and gives zeros.

    kind: one of KINDS. rows: of the shared array (hashed, n-grams), kept by frequency (capped), remainders
    (quotient_remainder), or the vocabulary (pieces); 0 for the others. parts: hash functions, codes read (pq, n-grams),
    most pieces of an id, or embedding sets. inner: width of a stored row (low_rank, multi); of n-grams, the values of a
    code where a byte does not hold it (0: at most 256). combine: "sum" or "concat" the parts of a hashed table. dtype:
    storage, "float32" or "bfloat16". cut: whether the normal it is drawn from ends at two sigma. Raises ValueError for
    sizes that do not fit the kind.
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
    cut: bool = True

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
        self._check_fields(KINDS[self.kind])
        split = self.kind == "pq" or (self.kind == "hashed" and self.combine == "concat")
        if split and self.dim % self.parts:
            raise ValueError(f"table.dim = {self.dim} does not divide into {self.parts} parts")

    def _check_fields(self, kind: "Kind") -> None:
        """A size that the kind needs is there, and no other is set."""
        for name in ("rows", "inner"):
            value, needed = getattr(self, name), name in kind.needs
            if kind.wide and name == "inner" and (value == 0 or value > LEVELS):
                continue
            if value < 0 or needed != (value > 0):
                verb = "needs" if needed else "has no"
                more = f": a code of {LEVELS} values or fewer is a byte, leave it at 0" if kind.wide else ""
                raise ValueError(f"table.kind = {self.kind!r} {verb} table.{name}, found {value}{more}")
        if "rows" in kind.needs and self.rows > self.num_ids:
            raise ValueError(f"table.rows = {self.rows} is beyond the {self.num_ids} ids: use kind 'full'")
        if self.combine == "concat" and "combine" not in kind.needs:
            raise ValueError(f"table.kind = {self.kind!r} has no table.combine: leave it at 'sum'")
        if self.parts > 1 and "parts" not in kind.needs:
            raise ValueError(f"table.kind = {self.kind!r} has no table.parts, found {self.parts}")

    def arrays(self) -> dict[str, Array]:
        """The arrays of the table."""
        made = KINDS[self.kind].arrays(self)
        learned = {"dtype": self.dtype, "fixed": self.fixed, "cut": self.cut}
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
    def levels(self) -> int:
        """Values that a code may have, 0..levels - 1."""
        return self.inner if KINDS[self.kind].wide and self.inner else LEVELS

    @property
    def bytes(self) -> int:
        """Stored bytes, codes included, dense parameters of the kind included, optimizer slots not."""
        mixer = jax.eval_shape(self.mixer, jax.random.key(0))
        return sum(a.bytes for a in self.arrays().values()) + sum(4 * math.prod(x.shape) for x in mixer.values())


class Kind(NamedTuple):
    """See the module docstring. needs: the fields of Table that this kind reads besides num_ids, dim and dtype.

    wide: its codes may be wider than a byte, `inner` says how wide.
    """

    arrays: Callable[[Table], dict[str, Array]]
    compose: Callable[[Table, Rows, dict[str, jax.Array]], jax.Array] = lambda t, rows, mixer: rows[""]
    slots: Callable[..., dict[str, Any]] = lambda t, ids, codes, xp: {}
    mixer: Callable[[Table, jax.Array], dict[str, jax.Array]] = lambda t, key: {}
    needs: tuple[str, ...] = ()
    wide: bool = False


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


def _grams(t: Table, count: int) -> dict[str, Array]:
    """Codes of an id, and the rows that its `count` n-grams share."""
    return {
        "codes": _codes(t, t.parts, np.min_scalar_type(t.levels - 1).name),
        "": Array(t.rows, t.dim, t.stddev * count**-0.5, by_id=False),
    }


def _summed(t: Table, rows: Rows, mixer: dict[str, jax.Array]) -> jax.Array:
    return rows[""].sum(axis=-2)


def _numbered(t: Table, codes: Any, xp: Any) -> list[Any]:
    """uint32 numbers of the prefixes (c1), (c1, c2), ... of codes [..., Q]."""
    base = xp.uint32((t.levels + 1) | 1)  # odd: a product modulo 2^32 loses nothing
    number, found = xp.zeros(codes.shape[:-1], xp.uint32), []
    for n in range(codes.shape[-1]):
        number = number * base + codes[..., n].astype(xp.uint32) + xp.uint32(1)
        found.append(number)
    return found


def _ngram_slots(t: Table, ids: Any, codes: Any, xp: Any) -> dict[str, Any]:
    """One row per prefix of the codes: (c1), (c1, c2), ..., each hashed with its length as the salt."""
    slots = [hash_slots(prefix, n, t.rows, xp) for n, prefix in enumerate(_numbered(t, codes, xp))]
    return {"": xp.stack(slots, axis=-1)}


def _groups(t: Table, width: int) -> int:
    return -(-t.parts // width)


def _group_slots(width: int, t: Table, ids: Any, codes: Any, xp: Any) -> dict[str, Any]:
    """One row per group of `width` consecutive codes: of its own where all groups have room, else hashed."""
    slots, room = [], t.levels**width
    for place in range(_groups(t, width)):
        group = codes[..., place * width : (place + 1) * width]
        if _groups(t, width) * room > t.rows:
            slots.append(hash_slots(_numbered(t, group, xp)[-1], place, t.rows, xp))
            continue
        number = xp.zeros(codes.shape[:-1], xp.int32)
        for n in range(group.shape[-1]):
            number = number * t.levels + group[..., n].astype(xp.int32)
        slots.append(1 + place * room + number)
    return {"": xp.stack(slots, axis=-1)}


def _grouped(width: int) -> "Kind":
    """Groups of `width` consecutive codes (arXiv 2306.08121): every group of codes is a word with an embedding."""
    return Kind(
        lambda t: _grams(t, _groups(t, width)),
        _summed,
        functools.partial(_group_slots, width),
        needs=("rows", "parts"),
        wide=True,
    )


def _pieces(t: Table) -> dict[str, Array]:
    return {
        "codes": _codes(t, t.parts, np.min_scalar_type(t.rows).name),
        "": Array(t.rows, t.dim, t.stddev * t.parts**-0.5, by_id=False),
    }


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
    # Prefixes of the codes (arXiv 2504.02137), and the n-grams of arXiv 2306.08121.
    "ngram": Kind(lambda t: _grams(t, t.parts), _summed, _ngram_slots, needs=("rows", "parts"), wide=True),
    "unigram": _grouped(1),
    "bigram": _grouped(2),
    # Pieces of the codes, learned on the training events (arXiv 2306.08121); codes hold the rows, 0 = no more pieces.
    "pieces": Kind(_pieces, _summed, lambda t, ids, codes, xp: {"": codes}, needs=("rows", "parts")),
}


def information_abundance(vectors_VD: np.ndarray) -> float:
    """Sum of the singular values over the largest: 1 = collapsed to a line, D = all directions alike (2310.04400)."""
    values = np.linalg.svd(np.asarray(vectors_VD, np.float64), compute_uv=False)
    return float(values.sum() / values[0]) if values[0] > 0 else 0.0
