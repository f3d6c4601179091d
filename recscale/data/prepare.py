"""Builds the event log of a dataset: python -m recscale.data.prepare --dataset=NAME [--source=DIR] --out=DIR

A finished log of the same dataset and source files is recognised and left alone; a killed prepare goes on after its
last complete chunk. Counts are verified against the published ones. Wrong input: one line, exit code 2, no log.
"""

import argparse
import dataclasses
import difflib
import hashlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from recscale.data import DATASETS
from recscale.data.event_log import EventLog, EventLogError
from recscale.data.event_log_writer import Writer, write
from recscale.data.facts import known_counts
from recscale.data.planted import Planted, blocks, generate, settings_of
from recscale.data.sources import Dataset, Report, locate


def prepare(
    name: str,
    out: str | Path,
    *,
    source: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    expected: Mapping[str, int] | Literal["published"] | None = "published",
    report: Report = lambda line: None,
) -> EventLog:
    """Builds (or finds finished) the event log of dataset `name` at `out` and returns it opened.

    source: folder or .zip with the dataset's files. settings: fields of `Planted`, for name="planted". expected: counts
    (users, items, events) to verify, None to verify none. Raises EventLogError on an unknown name and on wrong input,
    OSError where `out` cannot be written.
    """
    out = Path(out)
    if name == "planted":
        config = planted_config(settings or {})
        identity = {"dataset": name, "sha256": _digest(json.dumps(settings_of(config), sort_keys=True))}
        return _finished(out, identity) or _write_planted(config, out, identity, report)
    if settings:
        raise EventLogError(f"--set is for --dataset=planted only; {name} has no settings.")
    dataset = find_dataset(name)
    if source is None:
        raise EventLogError(f"{name} needs --source: a folder or .zip with its files, from {dataset.homepage}")
    files = locate(dataset, Path(source), report)
    report(f"{name}: hashing {len(files.members)} files ({files.layout} layout)")
    source_files = files.sha256()
    identity = {"dataset": name, "sha256": _digest(json.dumps(source_files))}
    log = _finished(out, identity)
    if log is not None:
        report(f"{name}: {out} is already prepared from these files")
    else:
        report(f"{name}: reading {', '.join(source_files)}")
        log = dataset.load(files)
        facts = {
            "layout": files.layout,
            "licence": dataset.licence,
            "source": dataset.homepage,
            "source_files": source_files,
            "repeats": "allowed" if dataset.allow_repeats else "forbidden",
        }
        log = dataclasses.replace(log, facts={**identity, **facts, **log.facts})
        verify_counts(name, log, known_counts(name, files.layout) if expected == "published" else expected)
        progress = Progress(name, log.num_users, report)
        log = write(log, out, allow_repeats=dataset.allow_repeats, identity=identity, progress=progress)
    return log


def find_dataset(name: str) -> Dataset:
    """The dataset of that name; raises EventLogError naming the known ones and the closest."""
    if name not in DATASETS:
        names = [*DATASETS, "planted"]
        close = difflib.get_close_matches(name, names, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise EventLogError(f"unknown dataset {name!r}; known: {', '.join(sorted(names))}.{hint}")
    return DATASETS[name]


def verify_counts(name: str, log: EventLog, expected: Mapping[str, int] | None) -> None:
    """Compares users, items, events and facts["parts"] with published counts; raises EventLogError on others."""
    found = {"users": log.num_users, "items": log.num_items, "events": log.num_events, **log.facts.get("parts", {})}
    wrong = {key: count for key, count in (expected or {}).items() if found[key] != count}
    if wrong:
        text = ", ".join(f"{found[key]:,} {key} (expected {count:,})" for key, count in wrong.items())
        raise EventLogError(f"{name}: found {text}. The source is cut, changed or another version: get it again.")


def planted_config(settings: Mapping[str, Any]) -> Planted:
    """Planted(...) from field=value settings (text is read as JSON); raises EventLogError on a wrong one."""
    known = {field.name: field for field in dataclasses.fields(Planted)}
    values: dict[str, Any] = {}
    for key, value in settings.items():
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise EventLogError(f"planted has no setting {key!r}; known: {', '.join(known)}.{hint}")
        value = _read_setting(key, value) if isinstance(value, str) else value
        default = known[key].default
        if type(default) is float and type(value) is int:
            value = float(value)
        if type(value) is not type(default):
            raise EventLogError(f"planted setting {key}: found {value!r}, expected a {type(default).__name__}.")
        values[key] = value
    try:
        return Planted(**values)
    except ValueError as error:
        raise EventLogError(f"planted: {error}") from None


def _read_setting(key: str, text: str) -> Any:
    try:
        return json.loads(text.lower() if text in ("True", "False") else text)
    except json.JSONDecodeError:
        raise EventLogError(f"planted setting {key}: found {text!r}, expected a number, true or false.") from None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _finished(out: Path, identity: Mapping[str, str]) -> EventLog | None:
    """The finished log at `out`, None where there is none; raises EventLogError where it is another one."""
    if not (out / "meta.json").is_file():
        return None
    log = EventLog.open(out)
    found = {key: log.facts[key] for key in identity if key in log.facts}
    if found != dict(identity):
        raise EventLogError(
            f"{out} holds another log ({found or 'not made by prepare'}), not {dict(identity)}: remove it or choose "
            "another --out."
        )
    return log


def _write_planted(config: Planted, out: Path, identity: Mapping[str, str], report: Report) -> EventLog:
    """Block by block, so that the log may be larger than memory."""
    one = generate(dataclasses.replace(config, users=1))  # everything but the users is the same in any size
    progress = Progress("planted", config.users, report)
    with Writer(out, one.columns, one.num_items, identity=identity) as writer:
        drawn = 0
        for block in blocks(config):
            drawn += len(block["length"])
            if drawn > writer.num_users:
                writer.append(block["length"], {name: block[name] for name in one.columns})
                progress(writer.num_users, writer.num_events)
        facts = {"users": writer.num_users, "events": writer.num_events, "planted": dataclasses.asdict(config)}
        return writer.finish(one.items, facts={**identity, **one.facts, **facts})


class Progress:
    """Reports users and events written and the rate, at most once a second and at the end."""

    def __init__(self, name: str, total_users: int, report: Report):
        self.name, self.total, self.report = name, total_users, report
        self.started = self.last = time.monotonic()

    def __call__(self, users: int, events: int) -> None:
        now = time.monotonic()
        if users < self.total and now - self.last < 1.0:
            return
        self.last = now
        self.report(
            f"{self.name}: wrote {users:,} of {self.total:,} users, {events:,} events, "
            f"{events / max(now - self.started, 1e-9) / 1e6:.2f} M events/s"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code: 0, or 2 after one line on stderr."""
    parser = argparse.ArgumentParser(prog="python -m recscale.data.prepare", description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", required=True, help=f"one of {', '.join(sorted([*DATASETS, 'planted']))}")
    parser.add_argument("--source", help="folder or .zip with the dataset's files")
    parser.add_argument("--out", required=True, help="folder of the event log to build")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="a setting of planted")
    args = parser.parse_args(arguments)

    def report(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    try:
        wrong = [text for text in args.set if "=" not in text]
        if wrong:
            raise EventLogError(f"--set {wrong[0]}: expected FIELD=VALUE.")
        settings = dict(text.split("=", 1) for text in args.set)
        log = prepare(args.dataset, args.out, source=args.source, settings=settings, report=report)
    except (EventLogError, OSError) as error:
        report(f"prepare: {' '.join(str(error).split())}")
        return 2
    print(f"{args.out}: {log.num_users:,} users, {log.num_items:,} items, {log.num_events:,} events")
    for key, value in log.facts.items():
        print(f"  {key}: {json.dumps(value, ensure_ascii=False)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
