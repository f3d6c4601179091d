"""KuaiRand-Pure as one long watch sequence a user: what was shown from 9 April to 8 May 2022, in order, without times.

Source, parquet form: `watch_seq` of kuairand_pure_history.parquet (the last exposures of 9 to 24 April, at most 50,
oldest first, one row a user), then the exposures of kuairand_pure_0425_0508.parquet (25 April to 8 May) in their order.
The first part has neither times nor feedback, so the log has none: item_id alone. Users of either file are in it, in
increasing id; a video may come back. The dataset with times and feedback is kuairand-pure (kuairand.py).
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recscale.data.event_log import MAX_ID, EventLog, EventLogError
from recscale.data.kuairand import LICENCE
from recscale.data.parquet_form import read_ordered
from recscale.data.rows import build, with_tables
from recscale.data.sources import Dataset, Files, Layout, Member, integers, read_parquet

SEQUENCE = "watch_seq"


def load(files: Files) -> EventLog:
    """The event log; raises EventLogError on wrong input. facts["events_before"]: how many come from the first file."""
    early_user, early_item = _sequences(files.members["history"])
    user, item, _, _ = read_ordered(files.members["log"])
    both = np.concatenate([early_user, user])
    order = np.argsort(both, kind="stable")  # the first file's events of a user stay before the second's
    items = np.concatenate([early_item, item])[order]
    log = build(both[order], items, None, {}, order=None, name=files.members["log"].name)
    return with_tables(log, facts={"events_before": len(early_user)})


def _sequences(member: Member) -> tuple[np.ndarray, np.ndarray]:
    """(user, item), each int64 [rows], of a table with one list of items a user."""
    table = read_parquet(member, {"user_id": pa.int64(), SEQUENCE: pa.list_(pa.int64())})
    users, lists = integers(table, "user_id", member), table[SEQUENCE]
    found, counts = np.unique(users, return_counts=True)
    if len(found) and counts.max() > 1:
        raise EventLogError(f"{member.name}: user {found[counts > 1][0]} has two rows, expected one row per user.")
    if not pa.types.is_list(lists.type) or not pa.types.is_integer(lists.type.value_type):
        raise EventLogError(f"{member.name}: column {SEQUENCE} is {lists.type}, expected lists of integer item ids.")
    flat = pc.list_flatten(lists)
    if lists.null_count or flat.null_count:
        raise EventLogError(f"{member.name}: column {SEQUENCE} has missing values, expected lists of item ids.")
    item = flat.cast(pa.int64()).to_numpy()
    if len(item) and (item.min() < 0 or item.max() > MAX_ID):
        bad = item[(item < 0) | (item > MAX_ID)][0]
        raise EventLogError(f"{member.name}: column {SEQUENCE}: id {bad} is outside 0..{MAX_ID}.")
    return users[pc.list_parent_indices(lists).to_numpy()], item


DATASETS = {
    "kuairand-pure-watch": Dataset(
        "kuairand-pure-watch",
        (
            Layout(
                "parquet",
                {"history": "kuairand_pure_history.parquet", "log": "kuairand_pure_0425_0508.parquet"},
                folder="impressions",
            ),
        ),
        load,
        LICENCE,
        "https://zenodo.org/records/10439422 (KuaiRand-Pure.tar.gz); the parquet form is made from it",
        allow_repeats=True,
    )
}
