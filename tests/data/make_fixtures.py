"""Invented data of 50 users in the file formats of the public archives, written at test time."""

import dataclasses
import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

USERS = 50
GENRES = ("Action", "Children's", "Drama", "Sci-Fi")


@dataclasses.dataclass(frozen=True)
class Ratings:
    """Rows in file order: user, item (raw ids with gaps), stars, time (with ties), all [E]; movies: all known ids."""

    user: np.ndarray
    item: np.ndarray
    stars: np.ndarray
    time: np.ndarray
    movies: np.ndarray

    def expected(self) -> list[tuple[int, int, float, int]]:
        """(user, item, stars, time) sorted by (user, time), ties in file order: plain Python."""
        rows = zip(self.user.tolist(), self.item.tolist(), self.stars.tolist(), self.time.tolist(), strict=True)
        return sorted(rows, key=lambda row: (row[0], row[3]))


def ratings(*, half: bool = False, grouped: bool = True, seed: int = 0) -> Ratings:
    """50 users with 3 to 20 ratings of 60 movies each; half: half stars; grouped: one user's rows together."""
    rng = np.random.default_rng(seed)
    movies = np.sort(rng.choice(np.arange(1, 4000), 60, replace=False))
    user, item, time = [], [], []
    for u in range(1, USERS + 1):
        n = int(rng.integers(3, 21))
        user += [3 * u] * n
        item += rng.choice(movies[:-2], n, replace=False).tolist()  # the last two movies are never rated
        time += (978_300_000 + 1000 * u + rng.integers(0, n, n)).tolist()
    order = np.arange(len(user)) if grouped else rng.permutation(len(user))
    stars = rng.integers(1, 11, len(user)) / 2 if half else rng.integers(1, 6, len(user)).astype(float)
    return Ratings(np.array(user)[order], np.array(item)[order], stars, np.array(time)[order], movies)


def write_ml_1m(folder: Path, rows: Ratings) -> Path:
    """ratings.dat, movies.dat and users.dat, latin-1."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = zip(rows.user, rows.item, rows.stars.astype(int), rows.time, strict=True)
    (folder / "ratings.dat").write_text("".join(f"{u}::{i}::{s}::{t}\n" for u, i, s, t in lines))
    movies = [f"{m}::{title(m)}::{'|'.join(genres(m))}\n" for m in rows.movies]
    (folder / "movies.dat").write_text("".join(movies), encoding="latin-1")
    users = [f"{u}::{'FM'[u % 2]}::25::{u % 21}::1234{u % 10}\n" for u in np.unique(rows.user)]
    (folder / "users.dat").write_text("".join(users))
    return folder


def write_ml_100k(folder: Path, rows: Ratings) -> Path:
    """u.data, u.item and u.user."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = zip(rows.user, rows.item, rows.stars.astype(int), rows.time, strict=True)
    (folder / "u.data").write_text("".join(f"{u}\t{i}\t{s}\t{t}\n" for u, i, s, t in lines))
    columns = ("unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama")
    columns += (
        "Fantasy",
        "Film-Noir",
        "Horror",
        "Musical",
        "Mystery",
        "Romance",
        "Sci-Fi",
        "Thriller",
        "War",
        "Western",
    )
    items = [
        "|".join([str(m), title(m), "01-Jan-1995", "", "http://x", *(str(int(c in genres(m))) for c in columns)]) + "\n"
        for m in rows.movies
    ]
    (folder / "u.item").write_text("".join(items), encoding="latin-1")
    jobs = ("artist", "doctor")
    (folder / "u.user").write_text("".join(f"{u}|30|M|{jobs[u % 2]}|T8H1N\n" for u in np.unique(rows.user)))
    return folder


def write_ml_csv(folder: Path, rows: Ratings) -> Path:
    """ratings.csv and movies.csv (ml-20m, ml-latest-small); titles with commas and quotes are quoted."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = zip(rows.user, rows.item, rows.stars, rows.time, strict=True)
    text = "".join(f"{u},{i},{s},{t}\n" for u, i, s, t in lines)
    (folder / "ratings.csv").write_text("userId,movieId,rating,timestamp\n" + text)
    movies = "".join(f'{m},"{title(m)}",{"|".join(genres(m)) or "(no genres listed)"}\n' for m in rows.movies)
    (folder / "movies.csv").write_text("movieId,title,genres\n" + movies, encoding="utf8")
    return folder


def title(movie: int) -> str:
    """A title with a colon, a comma and an accent, so that reading it wrongly shows."""
    return f"Épisode {movie}: One, Two (19{movie % 90 + 10})"


def genres(movie: int) -> list[str]:
    return [name for k, name in enumerate(GENRES) if (int(movie) >> k) & 1]


def write_parquet(path: Path, rows: Ratings, *, times: bool = True, **columns: pa.Array) -> Path:
    """The parquet form of grouped rows, sorted by (user, time); `columns` replaces or adds columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    user, item, stars, time = (np.array(x) for x in zip(*rows.expected(), strict=True))
    starts = np.flatnonzero(np.concatenate([[True], user[1:] != user[:-1]]))
    pos = np.arange(len(user)) - np.repeat(starts, np.diff(np.append(starts, len(user))))
    table = {
        "user_id": pa.array(user.astype(np.int32)),
        "item_id": pa.array(item.astype(np.int32)),
        "timestamp": pa.array(time) if times else pa.nulls(len(user), pa.int64()),
        "pos": pa.array(pos.astype(np.int32)),
        "rating": pa.array(stars.astype(np.float32)),
    }
    pq.write_table(pa.table({**table, **columns}), path)
    return path


def write_items(path: Path, ids: np.ndarray, **columns: list) -> Path:
    """An items file: item_id in falling order, a title per id, and further columns in the order of `ids`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = {"item_id": ids.astype(np.int32), "title": [title(i) for i in ids], **columns}
    pq.write_table(pa.table(table).take(np.arange(len(ids))[::-1]), path)
    return path


def write_s3rec(path: Path, seed: int = 0) -> list[list[int]]:
    """S3-Rec's Beauty.txt: lines "user item item ..."; returns the sequences."""
    rng = np.random.default_rng(seed)
    sequences = [(rng.choice(40, int(rng.integers(5, 15)), replace=False) + 1).tolist() for _ in range(USERS)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{u} {' '.join(map(str, s))}\n" for u, s in enumerate(sequences, 1)))
    return sequences


def write_reviews(path: Path, rows: Ratings) -> list[tuple[str, str, float, int]]:
    """reviews_NAME_5.json.gz, times whole days; returns (reviewer, asin, stars, time) sorted as the log must be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    reviews = [
        {
            "reviewerID": f"A{7 * u % 1000:03d}",
            "asin": f"B{i:06d}",
            "helpful": [0, 1],
            "reviewText": 'said "fine"',
            "overall": s,
            "unixReviewTime": t // 86400 * 86400,
        }
        for u, i, s, t in zip(*(x.tolist() for x in (rows.user, rows.item, rows.stars, rows.time)), strict=True)
    ]
    with gzip.open(path, "wt") as file:
        file.write("".join(json.dumps(review) + "\n" for review in reviews))
    found = [(r["reviewerID"], r["asin"], r["overall"], r["unixReviewTime"]) for r in reviews]
    return sorted(found, key=lambda row: (row[0], row[3]))


def write_kuairand(folder: Path, seed: int = 0) -> dict[str, np.ndarray]:
    """The four files of KuaiRand-Pure; returns the log's columns in file order, with one duplicated row."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    n = 600
    log = {
        "user_id": rng.integers(0, USERS, n),
        "video_id": rng.integers(0, 30, n),
        "date": np.full(n, 20220409),
        "hourmin": np.full(n, 1200),
        "time_ms": 1_649_400_000_000 + rng.integers(0, 3_000, n) * 100,
    }
    flags = ("is_click", "is_like", "is_follow", "is_comment", "is_forward", "is_hate", "long_view")
    log |= {name: rng.integers(0, 2, n) for name in flags}
    log["play_time_ms"] = rng.integers(0, 60_000, n)
    log["duration_ms"] = np.where(rng.random(n) < 0.1, 0, rng.integers(1_000, 60_000, n))
    log |= {"profile_stay_time": np.zeros(n, int), "comment_stay_time": np.zeros(n, int)}
    log |= {"is_profile_enter": rng.integers(0, 2, n), "is_rand": np.zeros(n, int), "tab": rng.integers(0, 15, n)}
    for values in log.values():
        values[1] = values[0]
    rows = [",".join(map(str, row)) + "\n" for row in zip(*(v.tolist() for v in log.values()), strict=True)]
    head = ",".join(log) + "\n"
    (folder / "log_standard_4_08_to_4_21_pure.csv").write_text(head + "".join(rows[:400]))
    (folder / "log_standard_4_22_to_5_08_pure.csv").write_text(head + "".join(rows[400:]))
    items = "video_id,author_id,video_type,upload_dt,upload_type,visible_status,video_duration,server_width,"
    items += "server_height,music_id,music_type,tag\n"
    for v in range(30):
        duration, tag = ("" if v % 7 == 0 else f"{1000.0 * v}"), ('"12,62"' if v % 2 else "unknown")
        items += f"{v},{v + 8_000_000_000},NORMAL,2022-04-08,Web,0.0,{duration},720.0,1280.0,{9 * v},9.0,{tag}\n"
    (folder / "video_features_basic_pure.csv").write_text(items)
    names = ["user_id", "user_active_degree", "is_lowactive_period", "is_live_streamer", "is_video_author"]
    names += ["follow_user_num", "follow_user_num_range", "fans_user_num", "fans_user_num_range", "friend_user_num"]
    names += ["friend_user_num_range", "register_days", "register_days_range", *(f"onehot_feat{k}" for k in range(18))]
    users = ",".join(names) + "\n"
    for u in range(USERS):
        users += f"{u},{('full_active', 'UNKNOWN')[u % 2]},0,-124,0,{u},0,1,0,2,0,300,0"
        users += "," + ",".join("" if k == 4 and u % 5 == 0 else str(float(u % 3)) for k in range(18)) + "\n"
    (folder / "user_features_pure.csv").write_text(users)
    return log
