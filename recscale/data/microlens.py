"""MicroLens, comments under short videos (Westlake University, arXiv:2309.15379), the part that IBA uses: order only.

IBA calls it a 5-core, but as released its users have 4 events or more, and some items a single one.

Source, parquet: user_id, item_id, timestamp (all null), pos; titles and, mostly empty, descriptions, brands and
categories as item text.
"""

from recscale.data.event_log import EventLog
from recscale.data.parquet_form import load_form
from recscale.data.sources import Dataset, Files, Layout

LICENCE = "MicroLens (Westlake University): research use only, no redistribution"
TEXT = ("title", "description", "brand", "categories")


def load(files: Files) -> EventLog:
    """The event log; raises EventLogError on wrong input."""
    return load_form(files, TEXT)


DATASETS = {
    "microlens": Dataset(
        "microlens",
        (Layout("parquet", {"events": "microlens.parquet"}, {"items": "microlens_items.parquet"}, "microlens"),),
        load,
        LICENCE,
        "https://github.com/westlake-repl/MicroLens; the part: https://github.com/suolong666/IBA (data/Microlens)",
    )
}
