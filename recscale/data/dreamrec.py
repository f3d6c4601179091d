"""YooChoose and KuaiRec in the sessions that DreamRec released (arXiv:2310.20453): order only, a user is a session.

A session lies in one part, train, val or test: users/part, what the split "parts" (parts.py) reads. The catalogue is
all items of the release, item i of it being item_id i + 1: many never occur in the parts that are at hand, but the
released model scores them all. In the released tables every event of a session is a row, with the last 10 items before
it; the first has none, and its history is empty. Sessions have 3 events or more.

Source, parquet: user_id (the session), item_id from 0, timestamp (all null), pos, and split, the session's part. The
release has no train part; where one is at hand, its sessions are further rows of the file with split "train", with
user_ids of their own.
"""

import dataclasses
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from recscale.data.event_log import EventLog, EventLogError
from recscale.data.parquet_form import read_ordered
from recscale.data.parts import PART, PARTS
from recscale.data.rows import build, with_tables
from recscale.data.sources import Dataset, Files, Layout, Member

ITEMS = {"yc": 9_514, "ks": 7_261}  # of the release; also the id of its padding


def load(files: Files, items: int) -> EventLog:
    """The event log, with `items` in its catalogue; raises EventLogError on wrong input.

    facts: `parts`, sessions and events of each part; `items_with_events`; and `train_part` where there is none.
    """
    member = files.members["events"]
    user, item, timestamp, table = read_ordered(member, {"split": pa.string()})
    if len(item) and item.max() >= items:
        at = int(np.argmax(item >= items))
        raise EventLogError(
            f"{member.name}: row {at + 1} has item_id {item[at]}, expected 0..{items - 1} ({items} is padding)."
        )
    log = build(user, item, timestamp, {}, order=None, name=member.name)
    part_E = np.array(table["split"].cast(pa.string()).fill_null("").to_pylist(), dtype=np.str_)
    part_U = _part_of_sessions(log, part_E, member)
    facts: dict[str, Any] = {"items": items, "items_with_events": log.num_items, "parts": _counts(log, part_U)}
    if "train" not in part_U:
        facts["train_part"] = "absent from the source: the split `parts` trains on sessions of the val part"
    raw = log.items["raw_id"][log.events["item_id"]]
    log = dataclasses.replace(
        log,
        events={**log.events, "item_id": (raw + 1).astype(np.int32)},
        num_items=items,
        items={"raw_id": np.concatenate([[0], np.arange(items)])},
    )
    return with_tables(log, users={PART: part_U}, facts=facts)


def _part_of_sessions(log: EventLog, part_E: np.ndarray, member: Member) -> np.ndarray:
    """Text [U]: the part of each session; raises EventLogError for another name and for a session in two parts."""
    wrong = ~np.isin(part_E, PARTS)
    if wrong.any():
        at = int(np.argmax(wrong))
        raise EventLogError(f"{member.name}: row {at + 1} has split {str(part_E[at])!r}, expected one of {PARTS}.")
    part_U = part_E[log.offsets[:-1]]
    torn = part_E != np.repeat(part_U, log.lengths)
    if torn.any():
        at = int(np.argmax(torn))
        session = log.users["raw_id"][int(np.searchsorted(log.offsets, at, side="right")) - 1]
        raise EventLogError(
            f"{member.name}: row {at + 1}: session {session} is in two parts, expected one. Give the sessions of each "
            "part user_ids of their own."
        )
    return part_U


def _counts(log: EventLog, part_U: np.ndarray) -> dict[str, int]:
    """Sessions and events of every part; a session has one event without history, its first."""
    counts = {}
    for part in PARTS:
        mine = part_U == part
        counts |= {f"{part}_users": int(mine.sum()), f"{part}_events": int(log.lengths[mine].sum())}
    return counts


def _dataset(short: str, licence: str, further: str) -> Dataset:
    name = f"dreamrec-{short}"
    return Dataset(
        name,
        (Layout("parquet", {"events": f"{short}.parquet"}, folder="dreamrec"),),
        partial(load, items=ITEMS[short]),
        licence,
        f"https://github.com/YangZhengyi98/DreamRec (data/{short}){further}",
        allow_repeats=True,
    )


DATASETS = {
    "dreamrec-yc": _dataset("yc", "YooChoose, RecSys Challenge 2015: CC BY-NC-ND 4.0", ""),
    "dreamrec-ks": _dataset(
        "ks", "KuaiRec: CC BY-SA 4.0", "; its val part: https://github.com/baiyimeng/DreamRec (data/ks)"
    ),
}
