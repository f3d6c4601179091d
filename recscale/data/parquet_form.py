"""The parquet form of a log: user_id, item_id, timestamp, pos and further columns, sorted by user, then pos.

Beside it may lie a file of items: item_id and text.
"""

from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from recscale.data.event_log import EventLog, EventLogError
from recscale.data.rows import align, align_text, build, with_tables
from recscale.data.sources import MAX_TIME, Files, Member, integers, read_parquet

FORM = {"user_id": pa.int64(), "item_id": pa.int64(), "timestamp": pa.int64(), "pos": pa.int64()}


def load_form(files: Files, text: tuple[str, ...]) -> EventLog:
    """The log of the roles "events" and, where it is there, "items": its columns named in `text` become item text.

    A column `asin` among them becomes items/asin too. Raises EventLogError as `read_ordered` does, and for a file of
    items whose ids are no integers or come twice.
    """
    member = files.members["events"]
    user, item, timestamp, _ = read_ordered(member)
    log = build(user, item, timestamp, {}, order=None, name=member.name)
    return _with_items(log, files.members["items"], text) if "items" in files.members else log


def _with_items(log: EventLog, member: Member, names: tuple[str, ...]) -> EventLog:
    table = read_parquet(member, {"item_id": pa.int64(), **dict.fromkeys(names, pa.string())}, optional=names)
    keys, raw = integers(table, "item_id", member), log.items["raw_id"][1:]
    items = {}
    if "asin" in table.column_names:
        asin = np.array(table["asin"].cast(pa.string()).fill_null("").to_pylist(), dtype=np.str_)
        items["asin"] = align(raw, keys, asin, member.name, padding=True)
    text = align_text(raw, keys, table.drop_columns(["item_id"]), member.name)
    return with_tables(log, items=items, text=text)


def read_ordered(
    member: Member, further: Mapping[str, pa.DataType] | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, pa.Table]:
    """(user, item, timestamp, table) of a log in parquet form, each [rows] int64; table has the further columns too.

    timestamp is None where every time is null (only the order is known). Raises EventLogError: missing column, floats,
    blanks, negative or overflowing ids, times known in part, pos that does not count 0, 1, 2.. inside a user.
    """
    table = read_parquet(member, {**FORM, **(further or {})})
    user, item = integers(table, "user_id", member), integers(table, "item_id", member)
    check_pos(user, integers(table, "pos", member), member)
    timestamp = None
    if table["timestamp"].null_count < len(table):
        timestamp = integers(table, "timestamp", member, low=-MAX_TIME, high=MAX_TIME)
    return user, item, timestamp, table


def check_pos(user: np.ndarray, pos: np.ndarray, member: Member) -> None:
    """pos must count 0, 1, 2.. inside each run of one user; raises EventLogError."""
    if len(user) == 0:
        return
    starts = np.concatenate([[0], 1 + np.flatnonzero(user[1:] != user[:-1])])
    expected = np.arange(len(user)) - np.repeat(starts, np.diff(np.append(starts, len(user))))
    if not np.array_equal(pos, expected):
        at = int(np.argmax(pos != expected))
        raise EventLogError(
            f"{member.name}: row {at + 1} (user {user[at]}) has pos {pos[at]}, expected {expected[at]}: rows must be "
            "sorted by user, then pos, and pos must count 0, 1, 2.. without gaps."
        )
