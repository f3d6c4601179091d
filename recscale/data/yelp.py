"""Yelp, the businesses that users reviewed in 2019, 5-core, as in S3-Rec and LETTER: real second-level times, no ties.

A user may come back to a business: 11,830 of the 316,354 events repeat an earlier item of their user.

Sources, one of:

* text: S3-Rec's sequences (RUCAIBox/CIKM2020-S3Rec, arXiv:2008.07873), lines "user item item ...": order only;
* parquet: user_id, item_id, timestamp, pos in S3-Rec's ids and order; title and description (the list of categories)
  as item text.

The forms are those of S3-Rec's Amazon sets, and so is the reader.
"""

from recscale.data import amazon2014
from recscale.data.event_log import EventLog
from recscale.data.parquet_form import load_form
from recscale.data.sources import Dataset, Files, Layout

LICENCE = "Yelp Dataset licence: academic use only, no redistribution"
TEXT = ("title", "description")


def load(files: Files) -> EventLog:
    """The event log of either layout; raises EventLogError on wrong input."""
    return amazon2014.load(files) if files.layout == "text" else load_form(files, TEXT)


DATASETS = {
    "yelp": Dataset(
        "yelp",
        (
            Layout("text", {"events": "Yelp.txt"}),
            Layout("parquet", {"events": "yelp.parquet"}, {"items": "yelp_items.parquet"}, "yelp"),
        ),
        load,
        LICENCE,
        "https://github.com/RUCAIBox/CIKM2020-S3Rec (data/Yelp.txt); the reviews: https://www.yelp.com/dataset",
        allow_repeats=True,
    )
}
