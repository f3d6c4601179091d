"""Public datasets as tensorflow-datasets builders: event log -> TFDS dataset on disk -> the same event log.

One example per user, in the log's order, in split `train`: `user_id`, `item_id` [n], `timestamp` [n] where times are
known, and every other event column as a 1-D tensor of the log's own dtype. A user without events keeps an example of
length 0. TensorFlow is never needed. Somebody who has only tensorflow-datasets reads it like any other dataset:

    import tensorflow_datasets as tfds
    users = tfds.builder_from_directory("DATA_DIR/recscale/ml-1m/1.0.0").as_data_source(split="train")
    users[7]["item_id"]

and, where this module has been imported, by name: `tfds.data_source("recscale/ml-1m", data_dir="DATA_DIR")["train"]`.
Beside the array_record shards lie `event_log.json` (counts, column kinds, facts), `items/` and `users/` (the side
tables, as in the event log). Training reads the event log, not this form: benchmarks/tfds_read.py has the ratio.

What we avoid, all seen with tensorflow-datasets 4.9.10 and no TensorFlow: `file_format="parquet"` loses rows and
reports success; tfrecord needs TensorFlow; GeneratorBasedBuilder needs it too once a split passes 1 GB (its sorting
buffer), hence ShardBasedBuilder, which streams and keeps the order; a float64 tensor is stored as float32 unless it is
encoded as bytes.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource

from recscale.data import DATASETS
from recscale.data.event_log import Column, EventLog, EventLogError, check, check_columns
from recscale.data.event_log_writer import Writer

FILE_FORMAT = "array_record"
SPLIT = "train"
META = "event_log.json"
META_VERSION = 1
USERS_PER_SHARD = 50_000  # TFDS holds the views of a whole shard's examples until it has counted them
READ_USERS = 1_000


class EventLogBuilder(tfds.core.ShardBasedBuilder):
    """TFDS builder `recscale/NAME` of an event log; BUILDER_CONFIGS names the public datasets, any other name works.

    `tfds.builder("recscale/ml-1m", log=LOG, data_dir=DIR).download_and_prepare()` writes DIR/recscale/ml-1m/1.0.0.
    `log` is an EventLog or its folder; it may be left out when the dataset is there already. Raises EventLogError for a
    file format other than array_record, a missing name or log, a log that `event_log.check` refuses, a column that
    would not come back exactly, and where the files hold another number of users than the log.
    """

    name = "recscale"
    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name) for name in DATASETS]  # noqa: RUF012 (TFDS's attribute)
    url_infos = {}  # noqa: RUF012 (nothing is downloaded; TFDS's own default needs the package importlib_resources)

    def __init__(self, *, log: EventLog | str | Path | None = None, file_format: Any = FILE_FORMAT, **kwargs: Any):
        _check_file_format(file_format)
        self._log = EventLog.open(log) if isinstance(log, str | Path) else log
        super().__init__(file_format=FILE_FORMAT, **kwargs)

    def download_and_prepare(self, *, file_format: Any = FILE_FORMAT, **kwargs: Any) -> None:
        """As in TFDS; nothing is downloaded: the log is the source."""
        _check_file_format(file_format)
        super().download_and_prepare(**kwargs)

    def _create_builder_config(self, builder_config: Any, version: Any) -> tfds.core.BuilderConfig:
        """Any name and version may be written, not only those of BUILDER_CONFIGS."""
        if builder_config is None:
            raise EventLogError(f"recscale: no dataset named; expected `recscale/NAME`, as in {sorted(DATASETS)}.")
        named = isinstance(builder_config, tfds.core.BuilderConfig)
        config = builder_config if named else tfds.core.BuilderConfig(name=builder_config)
        return dataclasses.replace(config, version=version or config.version or self.VERSION)

    def _info(self) -> tfds.core.DatasetInfo:
        name = self.builder_config.name
        dataset = DATASETS.get(name)
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"{name}: one example per user, events in the order of the source.",
            homepage=dataset.homepage if dataset else None,
            license=dataset.licence if dataset else None,
            features=self._features(),
            disable_shuffling=True,
        )

    def _features(self) -> Any:
        if self._log is None and (self.data_path / "features.json").exists():
            return tfds.features.FeaturesDict.from_config(self.data_path)
        return _features(self._source())

    def _source(self) -> EventLog:
        if self._log is None:
            raise EventLogError(
                f"{self.data_path}: no TFDS dataset here and no event log to make one of. Pass log=, the folder that "
                f"`python -m recscale.data.prepare` wrote, or a data_dir= that holds the dataset."
            )
        return self._log

    def _shard_iterators_per_split(self, dl_manager: Any) -> Mapping[str, list[Callable[[], Iterator]]]:
        log = self._source()
        starts = range(0, log.num_users, USERS_PER_SHARD)
        return {SPLIT: [_examples(log, a, min(a + USERS_PER_SHARD, log.num_users)) for a in starts]}

    def _download_and_prepare(self, dl_manager: Any, download_config: Any = None) -> None:
        """Works in TFDS's unfinished folder: what fails here leaves no dataset behind."""
        log = self._source()
        check(log)
        super()._download_and_prepare(dl_manager, download_config)
        _write_side_files(log, Path(self.data_path))
        verify_num_users(self.data_path, log.num_users)


def to_tfds(log: EventLog, data_dir: str | Path, name: str, version: str = "1.0.0") -> Path:
    """Write `log` as the TFDS dataset DATA_DIR/recscale/NAME/VERSION; returns that folder.

    The same log gives the same bytes. Raises EventLogError where the folder exists, and as EventLogBuilder does.
    """
    folder = Path(data_dir).expanduser() / EventLogBuilder.name / name / version
    if folder.exists():
        raise EventLogError(f"{folder}: there already. Remove it, or write another version.")
    EventLogBuilder(log=log, data_dir=data_dir, config=name, version=version).download_and_prepare()
    return folder


def from_tfds(folder: str | Path, path: str | Path) -> EventLog:
    """Write the TFDS dataset `folder` (to_tfds returned it) as an event log at `path`, equal to the one it came from.

    Streams: READ_USERS users are in memory at a time. Raises EventLogError where the folder is not such a dataset,
    users or events are missing or out of order, or `path` exists.
    """
    folder = Path(folder)
    meta = _read_meta(folder)
    verify_num_users(folder, meta["num_users"])
    source: Any = tfds.builder_from_directory(folder).as_data_source(split=SPLIT)
    columns = {name: Column(**spec) for name, spec in meta["columns"].items()}
    users = _load_tables(folder / "users")
    text = folder / "items/text.parquet"
    with Writer(path, columns, meta["num_items"]) as writer:
        for first in range(0, meta["num_users"], READ_USERS):
            last = min(first + READ_USERS, meta["num_users"])
            examples = source.__getitems__(range(first, last))
            if [int(example["user_id"]) for example in examples] != list(range(first, last)):
                raise EventLogError(f"{folder}: examples {first}:{last} are not these users in order: write it again.")
            events = {name: np.concatenate([example[name] for example in examples]) for name in columns}
            lengths = np.array([len(example["item_id"]) for example in examples])
            writer.append(lengths, events, {name: np.asarray(rows[first:last]) for name, rows in users.items()})
        if writer.num_events != meta["num_events"]:
            raise EventLogError(f"{folder}: {writer.num_events} events, expected {meta['num_events']}: write it again.")
        table = pq.read_table(text) if text.is_file() else None
        return writer.finish(_load_tables(folder / "items"), table, meta["facts"])


def verify_num_users(folder: str | Path, expected: int) -> None:
    """Count the records in the shards themselves; raises EventLogError where that is not `expected`."""
    shards = sorted(str(path) for path in Path(folder).glob(f"*-{SPLIT}.{FILE_FORMAT}*"))
    found = len(ArrayRecordDataSource(shards)) if shards else 0
    if found != expected:
        raise EventLogError(f"{folder}: {found} users in {len(shards)} shards, expected {expected}: write it again.")


def _check_file_format(file_format: Any) -> None:
    found = getattr(file_format, "value", file_format)
    if found not in (None, FILE_FORMAT):
        raise EventLogError(
            f"file_format={found!r}: expected {FILE_FORMAT!r}. tensorflow-datasets loses rows of a parquet split "
            f"without an error, and tfrecord and riegeli need TensorFlow. Leave file_format out."
        )


def _features(log: EventLog) -> Any:
    check_columns(log.columns, log.events, log.num_items)
    features: dict[str, Any] = {"user_id": np.int32}
    for name, column in log.events.items():
        if name == "user_id":
            raise EventLogError("event column user_id: TFDS examples have a user_id of their own. Rename the column.")
        if column.dtype.itemsize > 8 or not column.dtype.isnative:
            raise EventLogError(f"event column {name}: dtype {column.dtype}; expected native order, 64 bits at most.")
        # A TFDS float is 32 bits on disk, whatever the feature says.
        encoding = tfds.features.Encoding.BYTES if column.dtype == np.float64 else tfds.features.Encoding.NONE
        features[name] = tfds.features.Tensor(shape=(None,), dtype=column.dtype.type, encoding=encoding)
    return tfds.features.FeaturesDict(features)


def _examples(log: EventLog, first: int, last: int) -> Callable[[], Iterator[tuple[int, dict[str, Any]]]]:
    def generate() -> Iterator[tuple[int, dict[str, Any]]]:
        bounds = np.asarray(log.offsets[first : last + 1])
        for user, start, stop in zip(range(first, last), bounds[:-1], bounds[1:], strict=True):
            yield user, {"user_id": user, **{name: column[start:stop] for name, column in log.events.items()}}

    return generate


def _write_side_files(log: EventLog, folder: Path) -> None:
    for tables, name in ((log.items, "items"), (log.users, "users")):
        (folder / name).mkdir()
        for column, rows in tables.items():
            np.save(folder / name / f"{column}.npy", rows, allow_pickle=False)
    text = log.read_text()
    if text is not None:
        pq.write_table(text, folder / "items/text.parquet", compression="zstd")
    meta = {
        "version": META_VERSION,
        "num_users": log.num_users,
        "num_events": log.num_events,
        "num_items": log.num_items,
        "columns": {name: dataclasses.asdict(column) for name, column in log.columns.items()},
        "facts": dict(log.facts),
    }
    (folder / META).write_text(json.dumps(meta, indent=1) + "\n")


def _read_meta(folder: Path) -> dict[str, Any]:
    if not (folder / META).is_file():
        raise EventLogError(f"{folder}: {META} is missing; expected a folder that to_tfds wrote.")
    meta = json.loads((folder / META).read_text())
    if meta["version"] != META_VERSION:
        raise EventLogError(f"{folder / META}: version {meta['version']}, expected {META_VERSION}: write it again.")
    return meta


def _load_tables(folder: Path) -> dict[str, np.ndarray]:
    return {path.stem: np.load(path, mmap_mode="r") for path in sorted(folder.glob("*.npy"))}
