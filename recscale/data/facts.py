"""Published counts of the public datasets: what a prepared log must have."""

KNOWN: dict[str, dict[str, int]] = {
    "ml-100k": {"users": 943, "items": 1_682, "events": 100_000},
    "ml-1m": {"users": 6_040, "items": 3_706, "events": 1_000_209},
    "ml-1m-sasrec": {"users": 6_040, "items": 3_416, "events": 999_611},
    "ml-20m": {"users": 138_493, "items": 26_744, "events": 20_000_263},
    "ml-latest-small": {"users": 610, "items": 9_724, "events": 100_836},
    "beauty": {"users": 22_363, "items": 12_101, "events": 198_502},
    "sports": {"users": 35_598, "items": 18_357, "events": 296_337},
    "toys": {"users": 19_412, "items": 11_924, "events": 167_597},
    "yelp": {"users": 30_431, "items": 20_033, "events": 316_354},
    "microlens": {"users": 13_210, "items": 5_312, "events": 78_255},
    # The archive: all standard exposures of 8 April to 8 May 2022. The parquet form: 25 April to 8 May only.
    "kuairand-pure/archive": {"events": 1_436_609},
    "kuairand-pure/parquet": {"users": 25_156, "items": 6_361, "events": 228_329},
    # At most 50 exposures a user of 9 to 24 April (817,187 in all), then those of 25 April to 8 May.
    "kuairand-pure-watch": {"users": 27_077, "items": 7_502, "events": 1_045_516},
    # By part: a source may have a train part too, whose counts nobody published.
    "dreamrec-yc": {"val_users": 12_847, "val_events": 57_062, "test_users": 12_847, "test_events": 55_245},
    "dreamrec-ks": {"val_users": 9_209, "val_events": 76_995, "test_users": 9_209, "test_events": 55_346},
}


def known_counts(dataset: str, layout: str) -> dict[str, int] | None:
    """Counts of `dataset`, or of this layout of it where they differ; None where nothing is known."""
    for name in (f"{dataset}/{layout}", dataset):
        if name in KNOWN:
            return KNOWN[name]
    return None
