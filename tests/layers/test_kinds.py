"""Kinds of table: slots and vectors against plain definitions, hash functions, sizes, initial deviation, collapse."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recscale.layers.kinds import KINDS, LEVELS, Table, hash_slots, information_abundance

IDS = 300
TABLES = {
    "full": Table(IDS, 12),
    "hashed": Table(IDS, 12, "hashed", rows=40),
    "hashed_sum": Table(IDS, 12, "hashed", rows=40, parts=3),
    "hashed_concat": Table(IDS, 12, "hashed", rows=40, parts=3, combine="concat"),
    "quotient_remainder": Table(IDS, 12, "quotient_remainder", rows=23),
    "low_rank": Table(IDS, 12, "low_rank", inner=5),
    "pq": Table(IDS, 12, "pq", parts=4),
    "multi": Table(IDS, 12, "multi", parts=2, inner=4),
    "capped": Table(IDS, 12, "capped", rows=30),
    "ngram": Table(IDS, 12, "ngram", rows=50, parts=3),
    "unigram": Table(IDS, 12, "unigram", rows=50, parts=3),
    "bigram": Table(IDS, 12, "bigram", rows=50, parts=3),
    "pieces": Table(IDS, 12, "pieces", rows=50, parts=3),
}
WIDE_CODES = {
    "ngram_wide": Table(IDS, 12, "ngram", rows=50, parts=3, inner=2048),
    "ngram_widest": Table(IDS, 12, "ngram", rows=50, parts=2, inner=70_001),
    "bigram_wide": Table(IDS, 12, "bigram", rows=50, parts=4, inner=257),
    "unigram_own": Table(IDS * 3, 12, "unigram", rows=800, parts=3),
}
each_table = pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
each_or_wide = pytest.mark.parametrize("table", (TABLES | WIDE_CODES).values(), ids=TABLES | WIDE_CODES)


def plain_hash(number: int, salt: int, rows: int) -> int:
    """MurmurHash3's 32-bit finalizer in Python integers."""
    h = (number + salt * 0x9E3779B9) % 2**32
    h = (h ^ h >> 16) * 0x85EBCA6B % 2**32
    h = (h ^ h >> 13) * 0xC2B2AE35 % 2**32
    return 1 + (h ^ h >> 16) % rows


def plain_slots(table: Table, item: int, code: np.ndarray) -> dict[str, list[int]]:
    """Slots of one item in every array that is not by id."""
    code = [int(c) for c in code]
    if table.kind == "hashed":
        return {"": [plain_hash(item, salt, table.rows) for salt in range(table.parts)]}
    if table.kind == "quotient_remainder":
        return {"quotient": [item // table.rows + 1], "remainder": [item % table.rows + 1]}
    if table.kind == "pq":
        return {"": [1 + 256 * part + c for part, c in enumerate(code)]}
    if table.kind == "capped":
        return {"": code}
    if table.kind == "pieces":
        return {"": code}
    if table.kind == "ngram":
        return {"": [plain_gram(table, code[: n + 1], n) for n in range(table.parts)]}
    if table.kind in ("unigram", "bigram"):
        width = {"unigram": 1, "bigram": 2}[table.kind]
        groups = [code[n : n + width] for n in range(0, table.parts, width)]
        if table.rows >= len(groups) * table.levels**width:
            own = [sum(c * table.levels ** (len(g) - 1 - k) for k, c in enumerate(g)) for g in groups]
            return {"": [1 + place * table.levels**width + number for place, number in enumerate(own)]}
        return {"": [plain_gram(table, group, place) for place, group in enumerate(groups)]}
    return {}


def plain_gram(table: Table, gram: list[int], salt: int) -> int:
    """The row of some codes in order, as digits of a number whose base is odd and above every digit."""
    base = table.levels + 1 + table.levels % 2
    number = sum((c + 1) * base ** (len(gram) - 1 - k) for k, c in enumerate(gram))
    return plain_hash(number % 2**32, salt, table.rows)


def plain_vector(table: Table, values: dict[str, np.ndarray], mixer: dict, item: int, code: np.ndarray) -> np.ndarray:
    """The vector of one item; values: array -> [slots, D], by slot."""
    slots = plain_slots(table, item, code)
    own = values[""][item] if not slots else None
    if table.kind == "quotient_remainder":
        return values["quotient"][slots["quotient"][0]] * values["remainder"][slots["remainder"][0]]
    if table.kind == "low_rank":
        return np.asarray(mixer["projection"]).T @ own
    if table.kind == "multi":
        sets, vector = np.split(own, table.parts), np.zeros(table.dim)
        for embedding, value, gate in zip(sets, np.asarray(mixer["value"]), np.asarray(mixer["gate"]), strict=True):
            vector += (embedding @ value) / (1 + np.exp(-(embedding @ gate)))
        return vector
    if table.kind == "full":
        return own
    rows = [values[""][slot] for slot in slots[""]]
    return np.concatenate(rows) if table.kind == "pq" or table.combine == "concat" else np.sum(rows, axis=0)


def random_codes(table: Table, seed: int = 0) -> np.ndarray:
    """Codes [IDS + 1, Q] of the table's dtype over their whole range, padding zero."""
    rng = np.random.default_rng(seed)
    low, high = (1, table.rows + 1) if table.kind in ("capped", "pieces") else (0, table.levels)
    codes = rng.integers(low, high, (table.num_ids + 1, table.num_codes))
    codes[0] = 0
    return codes.astype(table.arrays()["codes"].dtype if table.num_codes else np.uint8)


def rows_of(table: Table, values: dict[str, np.ndarray], ids: np.ndarray, slots: dict) -> dict[str, jax.Array]:
    """What a lookup hands to `compose`: rows by id, or the rows of the slots."""
    return {name: jnp.asarray(by_slot[slots.get(name, ids)], jnp.float32) for name, by_slot in values.items()}


@each_or_wide
@pytest.mark.parametrize("shape", [(), (3, 5)])
def test_slots_and_vectors_are_the_plain_definition(table, shape):
    rng = np.random.default_rng(0)
    ids = np.array(rng.integers(0, IDS + 1, shape), np.int32)
    codes, mixer = random_codes(table), table.mixer(jax.random.key(1))
    arrays = {name: array for name, array in table.arrays().items() if name != "codes"}
    values = {name: rng.normal(size=(array.num_rows + 1, array.dim)) for name, array in arrays.items()}
    for by_slot in values.values():
        by_slot[0] = 0
    slots = jax.tree.map(np.asarray, jax.jit(table.slots)(ids, codes[ids]))
    assert set(slots) == {name for name, array in arrays.items() if not array.by_id}
    found = jax.jit(table.compose)(rows_of(table, values, ids, slots), mixer)
    assert found.shape == (*shape, table.dim) and found.dtype == jnp.float32
    for place in np.ndindex(shape):
        item = int(ids[place])
        expected_slots = plain_slots(table, item, codes[item])
        for name, of_name in slots.items():
            assert of_name[place].tolist() == (expected_slots[name] if item else [0] * of_name.shape[-1])
        expected = plain_vector(table, values, mixer, item, codes[item]) if item else np.zeros(table.dim)
        np.testing.assert_allclose(np.asarray(found)[place], expected, rtol=1e-5, atol=1e-5)


@each_table
def test_padding_has_no_slots_and_a_zero_vector(table):
    ids = np.zeros(4, np.int32)
    slots = table.slots(ids, random_codes(table)[5 + ids])  # whatever codes stand there
    assert not any(s.any() for s in slots.values())
    values = {n: np.zeros((a.num_rows + 1, a.dim)) for n, a in table.arrays().items() if n != "codes"}
    vectors = table.compose(rows_of(table, values, ids, slots), table.mixer(jax.random.key(0)))
    assert not np.asarray(vectors).any()


@each_or_wide
@pytest.mark.parametrize("ids_type", [np.int32, np.int64, np.uint32])
def test_slots_are_in_range_and_the_same_on_host_and_device(table, ids_type):
    ids, codes = np.arange(IDS + 1, dtype=ids_type), random_codes(table)[: IDS + 1]
    host = table.slots(ids, codes)
    device = jax.jit(table.slots)(jnp.asarray(ids, jnp.int32), jnp.asarray(codes))
    assert set(host) == set(device)
    for name, slots in host.items():
        assert isinstance(slots, np.ndarray) and slots.dtype == device[name].dtype == np.int32
        np.testing.assert_array_equal(slots, device[name])
        assert slots[1:].min() >= 1 and slots[1:].max() <= table.arrays()[name].num_rows


@pytest.mark.parametrize("kind, sizes", [("hashed", {"parts": 4}), ("quotient_remainder", {})])
def test_slots_of_the_largest_ids(kind, sizes):
    table = Table(2**31 - 2, 8, kind, rows=50_000, **sizes)
    ids = np.array([1, 49_999, 50_000, 2**30, 2**31 - 3, 2**31 - 2], np.int32)
    host, device = table.slots(ids, None), jax.jit(lambda i: table.slots(i, None))(ids)
    for name, slots in host.items():
        np.testing.assert_array_equal(slots, device[name])
        assert slots.tolist() == [plain_slots(table, int(i), np.zeros(0))[name] for i in ids]
        assert slots.max() <= table.arrays()[name].num_rows


def test_codes_choose_the_rows_of_their_part():
    table, codes = TABLES["pq"], random_codes(TABLES["pq"])
    slots = table.slots(np.arange(IDS + 1), codes)[""][1:]
    assert set(np.unique((slots - 1) // LEVELS, axis=0).ravel()) == {0, 1, 2, 3}
    np.testing.assert_array_equal((slots - 1) % LEVELS, codes[1:])


def test_every_pair_of_quotient_and_remainder_is_one_id():
    for rows in (1, 2, 23, 299, 300):
        slots = Table(IDS, 4, "quotient_remainder", rows=rows).slots(np.arange(1, IDS + 1), None)
        assert len(set(zip(slots["quotient"][:, 0], slots["remainder"][:, 0], strict=True))) == IDS


def test_an_ngram_is_a_prefix_of_the_codes():
    table = Table(2**20, 8, "ngram", rows=2**20, parts=4)
    codes = np.array([[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 0, 4], [1, 0, 3, 4], [2, 1, 3, 4], [1, 1, 1, 1]], np.uint8)
    slots = table.slots(np.arange(1, 7), codes)[""]
    shared = [int((slots[i] == slots[j]).sum()) for i, j in itertools.combinations(range(5), 2)]
    assert shared == [3, 2, 1, 0, 2, 1, 0, 1, 0, 0]  # the length of the common prefix
    assert len(set(slots[5])) == 4  # (1), (1, 1), ... are four n-grams


@pytest.mark.parametrize("levels", [257, 300, 2048, 70_000])
def test_wide_codes_part_where_a_byte_would_meet(levels):
    table = Table(2**20, 8, "ngram", rows=2**20, parts=2, inner=levels)
    codes = np.array([[1, levels - 1], [2, levels - 1 - 257], [1, levels - 1 - 256], [2, 0], [1, 256]])
    slots = table.slots(np.arange(1, 6), codes)[""]
    assert len(set(slots[:, 1])) == len(np.unique(codes, axis=0)) and len(set(slots[:, 0])) == 2
    assert table.arrays()["codes"].dtype == ("uint16" if levels <= 65_536 else "uint32")
    assert table.bytes == 2**20 * (4 * 8 + 2 * (2 if levels <= 65_536 else 4))


def test_groups_have_rows_of_their_own_where_they_fit():
    ids, codes = np.arange(2**17), np.random.default_rng(0).integers(0, 256, (2**17, 4))
    for kind, width in (("unigram", 1), ("bigram", 2)):
        groups, room = 4 // width, 256**width
        own = Table(2**20, 8, kind, rows=groups * room, parts=4).slots(ids, codes)[""][1:]
        assert own.shape[1] == groups
        for place in range(groups):
            assert (own[:, place] > place * room).all() and (own[:, place] <= (place + 1) * room).all()
            gram = codes[1:, place * width : (place + 1) * width]
            assert len(np.unique(own[:, place])) == len(np.unique(gram, axis=0))
            pairs = np.unique(np.concatenate([gram, own[:, place : place + 1]], axis=1), axis=0)
            assert len(pairs) == len(np.unique(gram, axis=0))
        fewer = Table(2**20, 8, kind, rows=groups * room - 1, parts=4).slots(ids, codes)[""][1:]
        assert (fewer != own).any() and fewer.max() <= groups * room - 1


def test_an_id_with_fewer_pieces_sums_fewer_rows():
    table = TABLES["pieces"]
    codes = np.zeros((IDS + 1, 3), np.uint8)
    codes[1], codes[2] = (7, 0, 0), (7, 9, 0)
    slots = table.slots(np.array([0, 1, 2]), codes[:3])[""]
    by_slot = np.random.default_rng(0).normal(size=(51, 12)).astype(np.float32)
    by_slot[0] = 0
    vectors = np.asarray(table.compose({"": jnp.asarray(by_slot[slots])}, {}))
    np.testing.assert_array_equal(vectors, [np.zeros(12), by_slot[7], by_slot[7] + by_slot[9]])


@pytest.mark.parametrize("first", [1, 2**31 - 1 - 40_000])
@pytest.mark.parametrize("salts", list(itertools.combinations(range(4), 2)))
def test_hash_functions_are_uniform_and_independent_of_each_other(first, salts):
    ids, rows = first + np.arange(40_000, dtype=np.int32), 16
    one, other = (hash_slots(ids, salt, rows, np) - 1 for salt in salts)
    for cells, where in ((rows, one), (rows, other), (rows * rows, one * rows + other)):
        mean = len(ids) / cells
        chi2 = ((np.bincount(where, minlength=cells) - mean) ** 2 / mean).sum()
        assert abs(chi2 - (cells - 1)) < 5 * np.sqrt(2 * (cells - 1))  # neither worse nor better than random


def test_ids_that_meet_under_one_function_part_under_another():
    ids, rows = np.arange(1, 20_001), 1000
    slots = np.stack([hash_slots(ids, salt, rows, np) for salt in range(2)], axis=1)
    assert len(np.unique(slots[:, 0])) == rows
    repeats = len(ids) - len(np.unique(slots, axis=0))
    assert abs(repeats - 200) < 5 * np.sqrt(200)  # n^2 / 2 / rows^2 pairs meet twice by chance


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"kind": "sparse"}, r"table.kind = 'sparse': expected one of \('full', 'hashed'"),
        ({"num_ids": 0}, "table of 0 ids, dim 12, rows 0, parts 1: expected positive sizes"),
        ({"dim": 0}, "dim 0, .* expected positive sizes"),
        ({"rows": -1}, "rows -1, .* expected positive sizes"),
        ({"kind": "pq", "parts": 0}, "parts 0: expected positive sizes"),
        ({"dtype": "float16"}, "table.dtype = 'float16': expected 'float32' or 'bfloat16'"),
        ({"kind": "hashed", "rows": 9, "combine": "mean"}, "table.combine = 'mean': expected 'sum' or 'concat'"),
        ({"kind": "hashed", "rows": IDS + 1}, "table.rows = 301 is beyond the 300 ids: use kind 'full'"),
        ({"kind": "pq", "parts": 5}, "table.dim = 12 does not divide into 5 parts"),
        ({"kind": "hashed", "rows": 9, "parts": 5, "combine": "concat"}, "table.dim = 12 does not divide into 5"),
        ({"kind": "ngram", "rows": 9, "inner": 256}, "has no table.inner, found 256: a code of 256 values or fewer is"),
        ({"kind": "bigram", "rows": 9, "inner": -300}, "table.kind = 'bigram' has no table.inner, found -300"),
        ({"kind": "pieces", "rows": 9, "inner": 300}, "table.kind = 'pieces' has no table.inner, found 300"),
        ({"kind": "low_rank", "inner": -1}, "table.kind = 'low_rank' needs table.inner, found -1"),
    ],
)
def test_sizes_are_checked(sizes, message):
    with pytest.raises(ValueError, match=message):
        Table(**({"num_ids": IDS, "dim": 12} | sizes))


@each_table
def test_a_size_that_the_kind_does_not_have_is_refused(table):
    needs = KINDS[table.kind].needs
    sizes = {name: getattr(table, name) for name in needs}
    assert Table(IDS, 12, table.kind, **sizes) == table
    for name, value in (("rows", 7), ("inner", 3), ("parts", 2)):
        if name not in needs:
            with pytest.raises(ValueError, match=f"table.kind = '{table.kind}' has no table.{name}, found {value}"):
                Table(IDS, 12, table.kind, **sizes, **{name: value})
    for name in set(needs) & {"rows", "inner"}:
        with pytest.raises(ValueError, match=f"table.kind = '{table.kind}' needs table.{name}, found 0"):
            Table(IDS, 12, table.kind, **(sizes | {name: 0}))


def test_only_what_is_split_must_divide():
    assert Table(IDS, 12, "hashed", rows=9, parts=5).arrays()[""].dim == 12  # a sum splits nothing
    assert Table(IDS, 12, "hashed", rows=9, parts=4, combine="concat").arrays()[""].dim == 3
    assert Table(IDS, 12, "ngram", rows=9, parts=5).arrays()[""].dim == 12
    assert Table(IDS, 12, "multi", parts=5, inner=7).arrays()[""].dim == 35


BYTES = {
    "full": 4 * IDS * 12,
    "hashed": 4 * 40 * 12,
    "hashed_sum": 4 * 40 * 12,
    "hashed_concat": 4 * 40 * 4,
    "quotient_remainder": 4 * 12 * (14 + 23),  # quotients 0..13
    "low_rank": 4 * (IDS * 5 + 5 * 12),
    "pq": IDS * 4 + 4 * 256 * 4 * 3,
    "multi": 4 * (IDS * 8 + 2 * 2 * 4 * 12),
    "capped": 4 * IDS + 4 * 30 * 12,
    "ngram": IDS * 3 + 4 * 50 * 12,
    "unigram": IDS * 3 + 4 * 50 * 12,
    "bigram": IDS * 3 + 4 * 50 * 12,
    "pieces": IDS * 3 + 4 * 50 * 12,
}


@pytest.mark.parametrize("name", TABLES)
def test_bytes_count_codes_and_mixers(name):
    assert TABLES[name].bytes == BYTES[name]
    assert TABLES[name].num_codes == {"pq": 4, "capped": 1, "ngram": 3, "unigram": 3, "bigram": 3, "pieces": 3}.get(
        name, 0
    )


@each_table
def test_storage_type_and_fixed_reach_every_learned_array_and_no_codes(table):
    sizes = {name: getattr(table, name) for name in KINDS[table.kind].needs}
    arrays = Table(IDS, 12, table.kind, dtype="bfloat16", fixed=True, **sizes).arrays()
    assert "" in arrays or set(arrays) == {"quotient", "remainder"}
    for name, array in arrays.items():
        integers = "int32" if table.kind == "capped" else "uint8"
        assert array.fixed and array.dtype == (integers if name == "codes" else "bfloat16")
        assert array.by_id == (name == "codes" or table.kind in ("full", "low_rank", "multi"))
    learned = [array for name, array in table.arrays().items() if name != "codes"]
    assert learned and not any(array.fixed for array in learned)


WIDE = {
    "full": {},
    "hashed": {"rows": 400, "parts": 1},
    "hashed_sum": {"rows": 400, "parts": 4},
    "hashed_concat": {"rows": 400, "parts": 4, "combine": "concat"},
    "quotient_remainder": {"rows": 45},
    "low_rank": {"inner": 16},
    "pq": {"parts": 8},
    "multi_1": {"parts": 1, "inner": 32},
    "multi_4": {"parts": 4, "inner": 16},
    "capped": {"rows": 500},
    "ngram": {"rows": 400, "parts": 4},
    "unigram": {"rows": 1024, "parts": 4},
    "bigram": {"rows": 400, "parts": 4},
    "pieces": {"rows": 400, "parts": 4},
}


@pytest.mark.parametrize(
    "name, stddev", [(name, 0.02) for name in WIDE] + [("quotient_remainder", 0.3), ("multi_4", 0.3)]
)
def test_initial_vectors_have_the_deviation_of_a_full_table(name, stddev):
    kind = next(kind for kind in KINDS if name.startswith(kind))
    table = Table(2000, 64, kind, stddev=stddev, **WIDE[name])
    key, ids = jax.random.key(3), np.arange(1, 2001)
    slots = table.slots(ids, random_codes(table)[1:])
    rows = {
        part: np.asarray(jax.jit(array.init_rows)(jax.random.fold_in(key, i), np.arange(array.num_rows + 1)))
        for i, (part, array) in enumerate(table.arrays().items())
        if part != "codes"
    }
    rows = {part: jnp.asarray(by_slot[slots.get(part, ids)]) for part, by_slot in rows.items()}
    vectors = np.asarray(table.compose(rows, table.mixer(jax.random.fold_in(key, 9))), np.float64)
    assert vectors.std() == pytest.approx(0.8796 * stddev, rel=0.2)  # a normal cut at two sigma
    assert abs(vectors.mean()) < 0.05 * stddev


@pytest.mark.parametrize("stddev", [0.02, 0.3])
def test_the_gates_of_multi_start_apart_whatever_the_deviation(stddev):
    table = Table(IDS, 64, "multi", parts=2, inner=16, stddev=stddev)
    sets = stddev * np.random.default_rng(0).normal(size=(1000, 2, 16))
    gate = np.asarray(table.mixer(jax.random.key(0))["gate"])
    assert np.einsum("nme,med->nmd", sets, gate).std() == pytest.approx(1, rel=0.1)


def test_information_abundance_of_known_cases():
    rng = np.random.default_rng(0)
    orthonormal = np.linalg.qr(rng.normal(size=(50, 8)))[0]
    assert information_abundance(orthonormal) == pytest.approx(8)
    assert information_abundance(np.outer(rng.normal(size=50), rng.normal(size=8))) == pytest.approx(1)
    assert information_abundance(orthonormal * [4, 2, 1, 1, 0, 0, 0, 0]) == pytest.approx(2)
    assert information_abundance(np.zeros((5, 3))) == 0
    vectors = rng.normal(size=(50, 8)).astype(np.float32)
    assert information_abundance(3 * vectors[::-1]) == pytest.approx(information_abundance(vectors))
    assert 1 < information_abundance(vectors) < 8
