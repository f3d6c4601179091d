"""Amazon reviews 2014, 5-core: beauty, sports, toys (McAuley et al., SIGIR 2015).

Sources, one of:

* text: S3-Rec's sequences (RUCAIBox/CIKM2020-S3Rec, arXiv:2008.07873), lines "user item item ...": order only;
* archive: reviews_NAME_5.json.gz, rows sorted by (user, time), ties in file order (times are whole days: about 40 % of
  the events tie), with `rating` in half stars  as feedback;
* parquet: user_id, item_id, timestamp, pos in S3-Rec's ids and order; item attributes and keywords as item text.

Items are numbered in increasing raw id (S3-Rec's number, or the ASIN).
"""

import gzip

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pajson

from recscale.data.event_log import MAX_ID, EventLog, EventLogError
from recscale.data.parquet_form import load_form
from recscale.data.rows import build, half_stars
from recscale.data.sources import MAX_TIME, Dataset, Files, Layout, Member, integers

LICENCE = "McAuley Amazon product reviews 2014: crawled reviews, no open licence; research use with citation"
TEXT = ("asin", "attribute_ids", "attributes", "keywords")
REVIEW = pa.schema(
    [
        ("reviewerID", pa.string()),
        ("asin", pa.string()),
        ("overall", pa.float64()),
        ("unixReviewTime", pa.int64()),
    ]
)


def load(files: Files) -> EventLog:
    """The event log of any of the three layouts; raises EventLogError on wrong input."""
    member = files.members["events"]
    if files.layout == "text":
        return _sequences(member)
    if files.layout == "archive":
        return _reviews(member)
    return load_form(files, TEXT)


def _sequences(member: Member) -> EventLog:
    """Lines "user item item ...", in order."""
    with member.open() as file:
        lines = pa.array(file.readall().decode("ascii", errors="replace").splitlines(), pa.string())
    lines = pc.utf8_trim_whitespace(lines)
    lines = lines.filter(pc.greater(pc.utf8_length(lines), 0))
    tokens = pc.utf8_split_whitespace(lines)
    lengths = pc.list_value_length(tokens).to_numpy().astype(np.int64)
    if len(lengths) == 0:
        raise EventLogError(f"{member.name}: empty log: the file has no lines.")
    if lengths.min() < 2:
        at = int(np.argmax(lengths < 2))
        raise EventLogError(f"{member.name}: line {at + 1} has no items, expected `user item item ...`.")
    try:
        numbers = pc.list_flatten(tokens).cast(pa.int64()).to_numpy()
    except pa.ArrowInvalid as error:
        raise EventLogError(f"{member.name}: {error}. Expected lines of whole numbers: user item item ...") from None
    heads = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    is_item = np.ones(len(numbers), bool)
    is_item[heads] = False
    if numbers.min() < 0 or numbers.max() > MAX_ID:
        bad = numbers[(numbers < 0) | (numbers > MAX_ID)][0]
        raise EventLogError(f"{member.name}: id {bad} is outside 0..{MAX_ID}.")
    user = np.repeat(numbers[heads], lengths - 1)
    users, counts = np.unique(numbers[heads], return_counts=True)
    if counts.max() > 1:
        raise EventLogError(f"{member.name}: user {users[counts > 1][0]} has two lines, expected one line per user.")
    return build(user, numbers[is_item], None, {}, order=None, name=member.name)


def _reviews(member: Member) -> EventLog:
    """One JSON object per line, gzipped."""
    try:
        with member.open() as file, gzip.open(file) as stream:
            table = pajson.read_json(
                stream,
                read_options=pajson.ReadOptions(block_size=1 << 24),
                parse_options=pajson.ParseOptions(explicit_schema=REVIEW, unexpected_field_behavior="ignore"),
            )
    except (pa.ArrowInvalid, OSError, EOFError) as error:
        if "Empty JSON" in str(error):
            raise EventLogError(f"{member.name}: empty log: the file has no lines.") from None
        raise EventLogError(f"{member.name}: not gzipped JSON lines of {', '.join(REVIEW.names)} ({error}).") from None
    for name in REVIEW.names:
        if table[name].null_count == len(table):
            raise EventLogError(f"{member.name}: missing column {name}; expected {', '.join(REVIEW.names)}.")
        if table[name].null_count:
            at = int(np.argmax(pc.is_null(table[name]).to_numpy()))
            raise EventLogError(f"{member.name}: line {at + 1} has no {name}.")
    user = np.array(table["reviewerID"].to_pylist(), dtype=np.str_)
    item = np.array(table["asin"].to_pylist(), dtype=np.str_)
    time = integers(table, "unixReviewTime", member, low=-MAX_TIME, high=MAX_TIME)
    return build(user, item, time, {"rating": half_stars(table["overall"], member.name)}, order=time, name=member.name)


def _dataset(name: str, category: str) -> Dataset:
    layouts = (
        Layout("text", {"events": f"{category}.txt"}),
        Layout("archive", {"events": f"reviews_{category}_5.json.gz"}),
        Layout("parquet", {"events": f"{name}.parquet"}, {"items": f"{name}_items.parquet"}, "amazon2014"),
    )
    home = "https://cseweb.ucsd.edu/~jmcauley/datasets/amazon/links.html (5-core), or RUCAIBox/CIKM2020-S3Rec (text)"
    return Dataset(name, layouts, load, LICENCE, home)


DATASETS = {
    "beauty": _dataset("beauty", "Beauty"),
    "sports": _dataset("sports", "Sports_and_Outdoors"),
    "toys": _dataset("toys", "Toys_and_Games"),
}
