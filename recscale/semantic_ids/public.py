"""Published id tables: codes that others have trained, read for a log.

A table is a parquet file with the columns scheme, item_id (the source's item ids, as in items/raw_id), c0, c1, ..; it
holds one or more schemes.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from recscale.data.event_log import EventLog
from recscale.semantic_ids.catalogue import Codes, CodesError, of_log
from recscale.semantic_ids.diagnostics import describe


def schemes(path: str | Path) -> list[str]:
    """The schemes of a table, sorted; raises CodesError where the file is no such table."""
    return sorted(pc.unique(_read(Path(path))["scheme"]).to_pylist())


def read(path: str | Path, scheme: str, log: EventLog, *, size: int = 256) -> Codes:
    """The codes of a scheme for this log's items, with the codebook size `size` on every level.

    Raises CodesError: no such file, no such scheme (it lists those there are), an item of the log without codes or with
    two rows, codes outside 0..size - 1. Items of the table that the log lacks are counted in the facts.
    """
    path = Path(path)
    table = _read(path)
    rows = table.filter(pc.equal(table["scheme"], scheme))
    if len(rows) == 0:
        known = ", ".join(sorted(pc.unique(table["scheme"]).to_pylist()))
        raise CodesError(f"{path}: no scheme {scheme!r}; it has {known}")
    if "raw_id" not in log.items or np.asarray(log.items["raw_id"]).dtype.kind not in "iu":
        raise CodesError(f"{path}: its items are numbers of the source, but the log has no numbers in items/raw_id")
    keys, raw = rows["item_id"].to_numpy(), np.asarray(log.items["raw_id"])[1:]
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    if np.any(keys[1:] == keys[:-1]):
        raise CodesError(f"{path}: scheme {scheme}: item {keys[1:][keys[1:] == keys[:-1]][0]} has two rows")
    at = np.minimum(np.searchsorted(keys, raw), len(keys) - 1)
    missing = raw[keys[at] != raw]
    if len(missing):
        raise CodesError(
            f"{path}: scheme {scheme} has no codes for {len(missing):,} of {log.num_items:,} items, first raw id "
            f"{missing[0]}: is it the table of another dataset?"
        )
    names = _levels(table)
    codes_VQ = np.zeros((log.num_items + 1, len(names)), np.int32)
    for level, name in enumerate(names):
        codes_VQ[1:, level] = rows[name].to_numpy()[order][at]
    sizes = (size,) * len(names)
    facts = {
        "method": "published",
        "scheme": scheme,
        "source": path.name,
        "collisions": "as published",
        "items_not_in_the_log": len(keys) - log.num_items,
    }
    try:
        return of_log(log, codes_VQ, sizes, facts | {"diagnostics": describe(codes_VQ, sizes)})
    except CodesError as error:
        raise CodesError(f"{path}: scheme {scheme}: {error}") from None


def _levels(table: pa.Table) -> list[str]:
    return [f"c{level}" for level in range(len(table.column_names)) if f"c{level}" in table.column_names]


def _read(path: Path) -> pa.Table:
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise CodesError(f"{path}: not a readable parquet file ({' '.join(str(error).split())})") from None
    lacking = {"scheme", "item_id", "c0"} - set(table.column_names)
    if lacking:
        raise CodesError(f"{path}: no id table: it lacks {', '.join(sorted(lacking))}; found {table.column_names}")
    names = ["scheme", "item_id", *_levels(table)]
    wrong = [n for n in names[1:] if not pa.types.is_integer(table[n].type) or table[n].null_count]
    if wrong:
        raise CodesError(f"{path}: column {wrong[0]} is {table[wrong[0]].type} or has blanks, expected integers")
    return table.select(names).set_column(0, "scheme", table["scheme"].cast(pa.string()))
