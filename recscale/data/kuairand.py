"""KuaiRand-Pure: video exposures with several feedbacks, tabs and millisecond times (Gao et al., CIKM 2022).

Sources, one of:

* archive: the two log_standard_*_pure.csv (standard exposures, 8 April to 8 May 2022; the randomly inserted ones are
  left out), video_features_basic_pure.csv, user_features_pure.csv; sorted by (user, time_ms), ties in file order;
* parquet: 25 April to 8 May 2022 in kuairand_pure_0425_0508.parquet, its order kept; item and user tables, and item
  vectors (row k is video k) as items/vector.

`timestamp` is in seconds (time_ms // 1000), `time_ms` keeps the milliseconds. Feedback: eight 0/1 flags, and
played_ratio = play_time_ms / duration_ms (0 where the duration is 0; above 1 when a video is watched again). Context:
tab (the app's page, code + 1, 0 = unknown). The same video may come back, and rows with the same user, video and
millisecond occur: they are kept and counted in facts["duplicate_rows"].

The *_cnt and *_user_num item statistics are left out: they are counted over the whole period and so leak the future.
The user table is one snapshot: its counts of friends and followers may be later than an event.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recscale.data.event_log import Column, EventLog, EventLogError
from recscale.data.parquet_form import read_ordered
from recscale.data.rows import align, build, codes, with_tables
from recscale.data.sources import INT64_MAX, Dataset, Files, Layout, Member, integers, read_delimited, read_parquet

LICENCE = "CC BY-SA 4.0"
FLAGS = ("is_click", "is_like", "is_follow", "is_comment", "is_forward", "is_hate", "long_view", "is_profile_enter")
LOG = dict.fromkeys((*FLAGS, "time_ms", "tab", "play_time_ms", "duration_ms"), pa.int64())
TABS = 15
MAX_TIME_MS = 2**44
ITEM_NUMBERS = ("author_id", "music_id")
ITEM_CODES = ("video_type", "upload_type")
USER_NUMBERS = (
    "is_live_streamer",
    "is_video_author",
    "follow_user_num",
    "fans_user_num",
    "friend_user_num",
    "register_days",
)
USER_CODES = ("user_active_degree", *(f"onehot_feat{k}" for k in range(18)))


def load(files: Files) -> EventLog:
    """The event log of either layout; raises EventLogError on wrong input."""
    members = files.members
    if files.layout == "parquet":
        user, item, _, table = read_ordered(members["log"], LOG)
        log = _events(user, item, table, members["log"], ordered=True)
    else:
        types = {"user_id": pa.int64(), "video_id": pa.int64(), **LOG}
        table = pa.concat_tables([read_delimited(members[half], types) for half in ("first", "second")])
        user, item = integers(table, "user_id", members["first"]), integers(table, "video_id", members["first"])
        log = _events(user, item, table, members["first"], ordered=False)
    if "items" in members:
        log = _with_items(log, members["items"], "item_id" if files.layout == "parquet" else "video_id")
    if "users" in members:
        log = _with_users(log, members["users"])
    return _with_vectors(log, members["vectors"]) if "vectors" in members else log


def _events(user: np.ndarray, item: np.ndarray, table: pa.Table, member: Member, *, ordered: bool) -> EventLog:
    time_ms = integers(table, "time_ms", member, high=MAX_TIME_MS)
    play, duration = (integers(table, name, member) for name in ("play_time_ms", "duration_ms"))
    ratio = np.divide(play, duration, out=np.zeros(len(play), np.float64), where=duration > 0).astype(np.float32)
    columns: dict[str, tuple[Column, np.ndarray]] = {
        name: (Column("feedback", 2), integers(table, name, member, high=1).astype(np.int8)) for name in FLAGS
    }
    columns["played_ratio"] = Column("feedback"), ratio
    columns["tab"] = (
        Column("context", TABS + 1),
        (integers(table, "tab", member, high=TABS - 1) + 1).astype(np.int32),
    )
    columns["time_ms"] = Column("extra"), time_ms
    columns["play_time_ms"] = Column("extra"), play.astype(np.int32)
    columns["duration_ms"] = Column("extra"), duration.astype(np.int32)
    log = build(user, item, time_ms // 1000, columns, order=None if ordered else time_ms, name=member.name)
    return with_tables(log, facts={"duplicate_rows": _duplicates(user, item, time_ms)})


def _duplicates(user: np.ndarray, item: np.ndarray, time_ms: np.ndarray) -> int:
    """Rows whose user, item and millisecond all occurred in another row before."""
    order = np.lexsort((time_ms, item, user))
    same = [np.diff(values[order]) == 0 for values in (user, item, time_ms)]
    return int(np.logical_and.reduce(same).sum())


def _with_items(log: EventLog, member: Member, key: str) -> EventLog:
    """Author and music ids (0 = unknown), codes of video type, upload type and first tag, seconds, upload day."""
    types = {
        key: pa.int64(),
        **dict.fromkeys(ITEM_NUMBERS, pa.int64()),
        **dict.fromkeys((*ITEM_CODES, "tag", "upload_dt"), pa.string()),
        "video_duration": pa.float64(),
    }
    table = _read(member, types)
    keys, raw, facts = integers(table, key, member), log.items["raw_id"][1:], {}
    values = {name: integers(_filled(table, name), name, member, high=INT64_MAX) for name in ITEM_NUMBERS}
    for name in ITEM_CODES:
        values[name], facts[name] = codes(_known(table[name]))
    first = pc.list_element(pc.split_pattern(pc.fill_null(table["tag"].cast(pa.string()), "unknown"), ","), 0)
    values["tag"], facts["tag"] = codes(_known(first))
    values["video_seconds"] = pc.fill_null(table["video_duration"], 0).to_numpy().astype(np.float32) / np.float32(1000)
    day = pc.fill_null(table["upload_dt"].cast(pa.string()), "1970-01-01")
    try:
        values["upload_day"] = day.cast(pa.date32()).cast(pa.int32()).to_numpy()
    except pa.ArrowInvalid as error:
        raise EventLogError(f"{member.name}: column upload_dt: {error}, expected YYYY-MM-DD.") from None
    items = {name: align(raw, keys, array, member.name, padding=True) for name, array in values.items()}
    return with_tables(log, items=items, facts=facts)


def _with_users(log: EventLog, member: Member) -> EventLog:
    """Numbers as they are (negative = the source's own missing code), categories as codes (0 = unknown)."""
    types = {
        "user_id": pa.int64(),
        **dict.fromkeys(USER_NUMBERS, pa.int64()),
        **dict.fromkeys(USER_CODES, pa.float64()),
        "user_active_degree": pa.string(),
    }
    table = _read(member, types)
    keys, raw, facts = integers(table, "user_id", member), log.users["raw_id"], {}
    values = {name: integers(table, name, member, low=-MAX_TIME_MS).astype(np.int32) for name in USER_NUMBERS}
    for name in USER_CODES:
        values[name], names = codes(table[name])
        facts |= {name: names} if name == "user_active_degree" else {}
    users = {name: align(raw, keys, array, member.name, padding=False) for name, array in values.items()}
    return with_tables(log, users=users, facts=facts)


def _with_vectors(log: EventLog, member: Member) -> EventLog:
    """Item vectors float32 [videos, dim], row k is video k; items without one get zeros."""
    with member.open() as file:
        try:
            vectors = np.load(file, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise EventLogError(f"{member.name}: not a readable .npy file ({error}). Get it again.") from None
    if vectors.ndim != 2 or vectors.dtype != np.float32:
        raise EventLogError(f"{member.name}: {vectors.dtype} of shape {vectors.shape}, expected float32 [videos, dim].")
    keys = np.arange(len(vectors))
    return with_tables(log, items={"vector": align(log.items["raw_id"][1:], keys, vectors, member.name, padding=True)})


def _read(member: Member, types: dict[str, pa.DataType]) -> pa.Table:
    return read_parquet(member, types) if member.name.endswith(".parquet") else read_delimited(member, types)


def _filled(table: pa.Table, name: str) -> pa.Table:
    return pa.table({name: pc.fill_null(table[name], 0)})


def _known(text: pa.ChunkedArray) -> pa.ChunkedArray:
    text = text.cast(pa.string())
    return pc.if_else(pc.is_in(pc.utf8_lower(text), value_set=pa.array(["unknown", ""])), None, text)


DATASETS = {
    "kuairand-pure": Dataset(
        "kuairand-pure",
        (
            Layout(
                "archive",
                {
                    "first": "log_standard_4_08_to_4_21_pure.csv",
                    "second": "log_standard_4_22_to_5_08_pure.csv",
                    "items": "video_features_basic_pure.csv",
                    "users": "user_features_pure.csv",
                },
                folder="KuaiRand-Pure/data",
            ),
            Layout(
                "parquet",
                {"log": "kuairand_pure_0425_0508.parquet"},
                {
                    "items": "kuairand_pure_items.parquet",
                    "users": "kuairand_pure_users.parquet",
                    "vectors": "kuairand_pure_item_emb64.npy",
                },
                folder="impressions",
            ),
        ),
        load,
        LICENCE,
        "https://zenodo.org/records/10439422 (KuaiRand-Pure.tar.gz, unpacked)",
        allow_repeats=True,
    ),
}
