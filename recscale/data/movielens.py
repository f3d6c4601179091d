"""MovieLens: ml-100k, ml-1m, ml-20m, ml-latest-small, and SASRec's version of ml-1m (ml-1m-sasrec).

Sources: the public archives' own files (a folder or the .zip from https://grouplens.org/datasets/movielens/), or the
parquet form (a table of user_id, item_id, timestamp, pos, rating sorted by user and pos).

* Archives are sorted by (user, time), ties in file order. The parquet form and SASRec's text file keep their order.
* `rating` is a feedback column of codes in half stars: 1 = half a star .. 10 = five stars, 0 = none (cardinality 11).
* Items are the rated movies in increasing movie id: items/raw_id, items/genres (multi-hot; names in facts["genres"]),
  items/year (0 = unknown), and the title in items/text.parquet. Users: raw_id; gender (1 F, 2 M), age, occupation
  (code + 1, or names in facts["occupations"]) and zip where known; 0 or "" = unknown.
* ml-1m-sasrec (kang205/SASRec, arXiv:1808.09781): 3,416 items with at least 5 ratings; items/raw_id are SASRec's ids.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recscale.data.event_log import EventLog
from recscale.data.parquet_form import read_ordered
from recscale.data.rows import align, align_text, build, codes, half_stars, multi_hot, with_tables
from recscale.data.sources import MAX_TIME, Dataset, Files, Layout, Member, integers, read_delimited, read_parquet

LICENCE = "GroupLens MovieLens licence: research use with citation; ml-100k, ml-1m and ml-20m may not be redistributed"
NO_GENRE = ("(no genres listed)", "unknown", "")
GENRES_100K = (
    *(
        "unknown",
        "Action",
        "Adventure",
        "Animation",
        "Children's",
        "Comedy",
        "Crime",
        "Documentary",
        "Drama",
        "Fantasy",
    ),
    *("Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western"),
)
U_ITEM = ("item_id", "title", "release_date", "video_date", "url", *GENRES_100K)
RATINGS = {"user": pa.int64(), "item": pa.int64(), "rating": pa.float64(), "time": pa.int64()}


def load(files: Files) -> EventLog:
    """The event log of any MovieLens layout but ml-1m-sasrec's; raises EventLogError on wrong input."""
    if files.layout == "parquet":
        log = _ordered(files.members["ratings"], with_rating=True)
    else:
        log = _ratings(files.members["ratings"], files.layout)
    if "movies" in files.members:
        log = _with_movies(log, *_movies(files.members["movies"], files.layout), files.members["movies"].name)
    if "users" in files.members:
        log = _with_users(log, files.members["users"], files.layout)
    return log


def load_sasrec(files: Files) -> EventLog:
    """ml-1m-sasrec from the parquet form or from SASRec's ml-1m.txt (lines "user item", in order)."""
    member = files.members["ratings"]
    if files.layout == "text":
        table = read_delimited(member, {"user": pa.int64(), "item": pa.int64()}, delimiter=" ", names=("user", "item"))
        user, item = integers(table, "user", member), integers(table, "item", member, low=1)
        return build(user, item, None, {}, order=None, name=member.name)
    log = _ordered(member, with_rating=False)
    if "map" not in files.members:
        return log
    mapping = read_parquet(files.members["map"], {"item_id": pa.int64(), "orig_item_id": pa.int64()})
    keys = integers(mapping, "item_id", files.members["map"])
    movie = integers(mapping, "orig_item_id", files.members["map"])
    movie_id = align(log.items["raw_id"][1:], keys, movie, files.members["map"].name, padding=True)
    log = with_tables(log, items={"movie_id": movie_id})
    if "movies" in files.members:
        name = files.members["movies"].name
        log = _with_movies(log, *_movies(files.members["movies"], "parquet"), name, raw=movie_id[1:])
    return log


def _ordered(member: Member, *, with_rating: bool) -> EventLog:
    user, item, timestamp, table = read_ordered(member, {"rating": pa.float64()} if with_rating else None)
    columns = {"rating": half_stars(table["rating"], member.name)} if with_rating else {}
    return build(user, item, timestamp, columns, order=None, name=member.name)


def _ratings(member: Member, layout: str) -> EventLog:
    """ratings.dat, u.data or ratings.csv, sorted by (user, time), ties in file order."""
    if layout == "csv":
        names = ("userId", "movieId", "rating", "timestamp")
        types = dict(zip(names, RATINGS.values(), strict=True))
        table = read_delimited(member, types).rename_columns(list(RATINGS))
    else:
        table = read_delimited(member, RATINGS, delimiter={"dat": "::", "u": "\t"}[layout], names=tuple(RATINGS))
    user, item = integers(table, "user", member), integers(table, "item", member)
    time = integers(table, "time", member, low=-MAX_TIME, high=MAX_TIME)
    return build(user, item, time, {"rating": half_stars(table["rating"], member.name)}, order=time, name=member.name)


def _movies(member: Member, layout: str) -> tuple[np.ndarray, pa.Table, pa.ChunkedArray]:
    """Movie ids [M], text columns (title and what else there is) and lists of genres of the movies file."""
    if layout == "parquet":
        wanted = {name: pa.string() for name in ("item_id", "title", "genres", "dbpedia_abstract")}
        table = read_parquet(member, {**wanted, "item_id": pa.int64()}, optional=("dbpedia_abstract",))
        return integers(table, "item_id", member), table.drop_columns(["item_id", "genres"]), table["genres"]
    if layout == "u":
        types = {"item_id": pa.int64(), "title": pa.string(), **dict.fromkeys(GENRES_100K, pa.int8())}
        table = read_delimited(member, types, delimiter="|", names=U_ITEM, encoding="latin-1")
        flags = np.stack([table[name].to_numpy() for name in GENRES_100K], axis=1)
        offsets = np.concatenate([[0], np.cumsum(flags.sum(1))])
        flat = pa.array(GENRES_100K).take(pa.array(np.nonzero(flags)[1]))
        genres = pa.chunked_array([pa.ListArray.from_arrays(offsets.astype(np.int32), flat)])
        return integers(table, "item_id", member), table.select(["title"]), genres
    names = ("item_id", "title", "genres") if layout == "dat" else ("movieId", "title", "genres")
    types = {names[0]: pa.int64(), "title": pa.string(), "genres": pa.string()}
    if layout == "dat":
        table = read_delimited(member, types, delimiter="::", names=names, encoding="latin-1")
    else:
        table = read_delimited(member, types)
    return integers(table, names[0], member), table.select(["title"]), pc.split_pattern(table["genres"], "|")


def _with_movies(
    log: EventLog,
    keys: np.ndarray,
    text: pa.Table,
    genres: pa.ChunkedArray,
    name: str,
    raw: np.ndarray | None = None,
) -> EventLog:
    raw = log.items["raw_id"][1:] if raw is None else raw
    hot, genre_names = multi_hot(genres, ignore=NO_GENRE)
    year = pc.struct_field(pc.extract_regex(text["title"], r"\((?P<year>\d{4})\)\s*$"), "year")
    year = year.cast(pa.int32()).fill_null(0).to_numpy()
    return with_tables(
        log,
        items={
            "genres": align(raw, keys, hot, name, padding=True),
            "year": align(raw, keys, year, name, padding=True),
        },
        text=align_text(raw, keys, text, name),
        facts={
            "genres": genre_names,
            "movies_in_file": len(keys),
            "items_without_metadata": int(np.isin(raw, keys, invert=True).sum()),
        },
    )


def _with_users(log: EventLog, member: Member, layout: str) -> EventLog:
    """users.dat, u.user or the parquet form."""
    number = layout != "u" and "100k" not in member.name
    names = (
        ("user_id", "gender", "age", "occupation", "zip")
        if number
        else ("user_id", "age", "gender", "occupation", "zip")
    )
    kind = pa.int64() if number else pa.string()
    types = {"user_id": pa.int64(), "gender": pa.string(), "age": pa.int64(), "occupation": kind, "zip": pa.string()}
    if layout == "parquet":
        table = read_parquet(member, types)
    else:
        table = read_delimited(
            member, types, delimiter={"dat": "::", "u": "|"}[layout], names=names, encoding="latin-1"
        )
    keys, raw, facts = integers(table, "user_id", member), log.users["raw_id"], {}
    gender = pc.index_in(table["gender"].cast(pa.string()), value_set=pa.array(["F", "M"])).fill_null(-1).to_numpy() + 1
    if number:
        occupation = (integers(table, "occupation", member) + 1).astype(np.int32)
    else:
        occupation, facts["occupations"] = codes(table["occupation"].cast(pa.string()))
    users = {
        "gender": gender.astype(np.int32),
        "age": integers(table, "age", member).astype(np.int32),
        "occupation": occupation,
        "zip": np.array(table["zip"].cast(pa.string()).fill_null("").to_pylist(), dtype=np.str_),
    }
    aligned = {name: align(raw, keys, values, member.name, padding=False) for name, values in users.items()}
    return with_tables(log, users=aligned, facts=facts)


def _dataset(name: str, archive: str, parquet: str | None) -> Dataset:
    files = {
        "dat": Layout("dat", {"ratings": "ratings.dat", "movies": "movies.dat"}, {"users": "users.dat"}, name),
        "u": Layout("u", {"ratings": "u.data", "movies": "u.item"}, {"users": "u.user"}, name),
        "csv": Layout("csv", {"ratings": "ratings.csv", "movies": "movies.csv"}, {}, name),
    }
    layouts = [files[archive]]
    if parquet is not None:
        movies = {"ml1m": "ml1m_movies", "ml100k": "ml100k_items"}.get(parquet, f"{parquet}_movies")
        side = {"movies": f"{movies}.parquet", "users": f"{parquet}_users.parquet"}
        layouts.append(Layout("parquet", {"ratings": f"{parquet}.parquet"}, side, "movielens"))
    home = f"https://files.grouplens.org/datasets/movielens/{name}.zip"
    return Dataset(name, tuple(layouts), load, LICENCE, home)


DATASETS = {
    "ml-100k": _dataset("ml-100k", "u", "ml100k"),
    "ml-1m": _dataset("ml-1m", "dat", "ml1m"),
    "ml-20m": _dataset("ml-20m", "csv", None),
    "ml-latest-small": _dataset("ml-latest-small", "csv", "ml_latest_small"),
    "ml-1m-sasrec": Dataset(
        "ml-1m-sasrec",
        (
            Layout("text", {"ratings": "ml-1m.txt"}),
            Layout(
                "parquet",
                {"ratings": "ml1m_sasrec.parquet"},
                {"map": "ml1m_sasrec_item_map.parquet", "movies": "ml1m_movies.parquet"},
                "movielens",
            ),
        ),
        load_sasrec,
        LICENCE,
        "https://github.com/kang205/SASRec (data/ml-1m.txt)",
    ),
}
