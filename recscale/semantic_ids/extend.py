"""Codes for a catalogue that has grown: python -m recscale.semantic_ids.extend --codes=DIR --data.path=LOG --out=DIR2

Items are matched by raw id. Those of DIR keep their codes bit for bit; the others are encoded by the text encoder and
the codebooks that DIR keeps, and what they share is resolved by DIR's own policy. DIR is not touched. In DIR2 the facts
of the fit stay those of the first folder; "extensions" says what was added since, a row a time, with the SHA-256 of the
codes that were extended.

An item that the new log lacks is an error: its tuple would become free, and a later item could get what a trained model
knows as another one. Each folder thus holds all items of the ones before it.
"""

import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import app, flags, logging

from recscale.data.event_log import EventLog
from recscale.semantic_ids import catalogue, collisions, content, diagnostics, encoding
from recscale.semantic_ids.catalogue import Codes, CodesError
from recscale.semantic_ids.make import parse_flags

ALIKE = 0.5  # share of old items that must come out with their first code: else these are other texts


class Matched(NamedTuple):
    """Item ids in the new log: of the old items in their old order, int64 [V], and of the new ones, ascending."""

    old: np.ndarray
    new: np.ndarray


def extend(folder: str | Path, log_path: str | Path, out: str | Path) -> Codes:
    """Codes for all items of the log at `log_path`, old ones as in `folder`, written into `out`.

    Raises ValueError (CodesError, ContentError, EventLogError among them) with one line: codes that cannot be extended,
    an old item that the log lacks, no new item, texts that are not those of the old items, a bucket that is full.
    """
    if (Path(out) / "meta.json").exists():
        raise CodesError(f"{out}: holds codes already; runs may depend on them: choose another --out")
    parent = catalogue.read(folder, encoder=True)
    check_extendable(parent, folder)
    log = EventLog.open(log_path)
    items = match(parent, log, folder)
    vectors_VD, said_V = content.encode_again(log, parent.facts["content"], encoding.part(parent.encoder, "text"))
    found = encoding.encode(parent, vectors_VD[1:])
    nearest_VQ, decoded_VD = (np.pad(array, ((1, 0), (0, 0))) for array in found)
    _check_alike(parent, nearest_VQ[items.old], log_path)
    grown = _grown(parent, nearest_VQ, items)
    learned = parent.facts["learned_levels"]
    unmoved = np.array_equal(grown.codes_VQ[:, :learned], nearest_VQ)
    described = diagnostics.describe(
        grown.codes_VQ,
        grown.sizes,
        vectors_VD=vectors_VD,
        reconstruction_VD=decoded_VD if unmoved else None,
        learned=learned,
    )
    lost_old, lost_new = (_lost(vectors_VD, decoded_VD, some, items.old) for some in items)
    row = {
        "parent": {"sha256": parent.sha256, "num_items": parent.num_items, "sizes": list(parent.sizes)},
        "items_added": len(items.new),
        "old_encoded_alike": int((parent.codes_VQ[1:, :learned] == nearest_VQ[items.old]).all(axis=1).sum()),
        "new_said_nothing": int((~said_V[items.new]).sum()),
        "new_sharing_learned": _sharing(grown.codes_VQ[:, :learned], items.new),
        "new_sharing": _sharing(grown.codes_VQ, items.new),
        "lost_of_old": lost_old,
        "lost_of_new": lost_new,
    }
    facts = {
        **parent.facts,
        "collisions": grown.facts,
        "diagnostics": described | {"as_fitted": diagnostics.reconstruction_error(vectors_VD, decoded_VD)},
        "extensions": [*parent.facts.get("extensions", []), row],
    }
    codes = catalogue.of_log(log, grown.codes_VQ, grown.sizes, facts, parent.codebooks, parent.encoder)
    catalogue.write(codes, out)
    return codes


def check_extendable(codes: Codes, name: str | Path) -> None:
    """Raises CodesError where these codes keep nothing that encodes further items, and says which kind they are."""
    method, made = codes.facts.get("method"), codes.facts.get("content", {})
    if method not in encoding.QUANTIZERS:
        raise CodesError(
            f"{name}: codes by method {method!r} have no encoder that could say those of a new item; expected one of "
            f"{', '.join(encoding.QUANTIZERS)}: make codes for the new log with `{catalogue.MAKE}`"
        )
    if made.get("behaviour", {}).get("use") == "join":
        raise CodesError(
            f"{name}: codes of behaviour vectors (behaviour.use = 'join'): new items have none in the space of the old "
            f"ones; make codes for the new log with `{catalogue.MAKE}`"
        )
    if not codes.encoder:
        raise CodesError(
            f"{name}: keeps no encoder (encoder.npz), it is older than this command: make the codes anew with "
            f"`{catalogue.MAKE}`"
        )
    version = int(codes.encoder["version"])
    if version != encoding.VERSION:
        raise CodesError(
            f"{name}/encoder.npz: version {version}, this code reads {encoding.VERSION}: make the codes anew with "
            f"`{catalogue.MAKE}`"
        )


def match(codes: Codes, log: EventLog, name: str | Path = "codes") -> Matched:
    """Where the items of these codes are in the log, by raw id; raises CodesError: one is missing, none is new."""
    if "raw_id" not in log.items:
        raise CodesError(
            f"{log.path}: no items/raw_id by which the items of {name} could be found: prepare it with them"
        )
    if codes.raw_id is None:
        raise CodesError(f"{name}: its log had no items/raw_id, so its items cannot be found again: make codes anew")
    theirs, ours = codes.raw_id[1:], np.asarray(log.items["raw_id"])[1:]
    if (theirs.dtype.kind == "U") != (ours.dtype.kind == "U"):
        raise CodesError(f"{log.path}: items/raw_id is {ours.dtype}, in {name} it is {theirs.dtype}: another dataset?")
    for where, ids in ((name, theirs), (log.path, ours)):
        if len(np.unique(ids)) != len(ids):
            raise CodesError(f"{where}: two items have the same raw id; expected one item for each")
    order = np.argsort(ours)
    at = order[np.minimum(np.searchsorted(ours, theirs, sorter=order), len(ours) - 1)]
    gone = theirs[ours[at] != theirs]
    if len(gone):
        raise CodesError(
            f"{log.path}: lacks {len(gone):,} of the {len(theirs):,} items of {name}, first raw id {gone[0]}: their "
            "codes would be given again; prepare a log that keeps all old items, or make codes and models anew"
        )
    new = np.setdiff1d(np.arange(1, len(ours) + 1), at + 1)
    if len(new) == 0:
        raise CodesError(f"{log.path}: all {len(ours):,} items have codes in {name}: there is nothing to add")
    return Matched(at + 1, new)


def _grown(parent: Codes, nearest_VQ: np.ndarray, items: Matched) -> collisions.Resolved:
    """Codes of all items in the order of the log: the new ones get what their policy leaves free."""
    policy, maximum = parent.facts["collisions"]["policy"], parent.facts["collisions"]["maximum"]
    settings = {"maximum": maximum, "seed": parent.facts["seed"]}
    found = collisions.extend(policy, parent.codes_VQ, parent.sizes, nearest_VQ[items.new], **settings)
    codes_VQ = np.zeros_like(found.codes_VQ)
    codes_VQ[np.concatenate(items)] = found.codes_VQ[1:]
    return found._replace(codes_VQ=codes_VQ, facts={**found.facts, "maximum": maximum})


def _check_alike(parent: Codes, nearest_VQ: np.ndarray, path: str | Path) -> None:
    """The stored first codes must mostly come out again; later levels may have been moved to end collisions."""
    alike = parent.codes_VQ[1:, 0] == nearest_VQ[:, 0]
    if alike.mean() < ALIKE:
        raise CodesError(
            f"{path}: only {int(alike.sum()):,} of {len(alike):,} old items come out with their first code, expected "
            f"{ALIKE:.0%} or more: their texts are not those that the codes were made from; is it another dataset?"
        )


def _sharing(codes_VQ: np.ndarray, items: np.ndarray) -> int:
    """How many of the items share their tuple with any other."""
    bucket, count = collisions.buckets(codes_VQ)
    return int((count[bucket[items - 1]] > 1).sum())


def _lost(vectors_VD: np.ndarray, decoded_VD: np.ndarray, items: np.ndarray, old: np.ndarray) -> float:
    """Mean squared error of some items, by the variance of the old items."""
    x = vectors_VD[old].astype(np.float64)
    variance = ((x - x.mean(axis=0)) ** 2).sum(axis=1).mean()
    error = ((vectors_VD[items] - decoded_VD[items]).astype(np.float64) ** 2).sum(axis=1).mean()
    return float(error / variance) if variance else 0.0


def summary(codes: Codes) -> list[str]:
    """What the last extension did, in lines to print."""
    row = codes.facts["extensions"][-1]
    parent = row["parent"]
    lines = [
        f"{parent['num_items']:,} old items keep their codes; today the encoder gives {row['old_encoded_alike']:,} "
        "of them the same learned codes (less: moved or balanced codes, changed texts)",
        f"{row['items_added']:,} new items: {row['new_sharing_learned']:,} share their learned tuple, "
        f"{row['new_sharing']:,} all codes; {row['new_said_nothing']:,} have no text or no known word",
        f"reconstruction: {row['lost_of_old']:.4f} of the old items' variance is lost on old items, "
        f"{row['lost_of_new']:.4f} on new ones",
    ]
    before, after = parent["sizes"][-1], codes.sizes[-1]
    if after > before:
        lines.append(
            f"level {codes.levels - 1}, the digit, grew from {before} to {after} codes: a model needs model.codebook "
            f">= {max(codes.sizes)}, and one trained before has never seen codes {before}..{after - 1} there"
        )
    return lines


def main(_: list[str]) -> None:
    """Command line of the module docstring; one line and status 1 where it does not end well."""
    logging.set_verbosity(logging.WARNING)
    try:
        codes = extend(str(_CODES.value), str(_PATH.value), str(_OUT.value))
    except (ValueError, TypeError, OSError) as error:
        sys.exit(" ".join(str(error).split()))
    print("\n".join(summary(codes)))
    print(f"{_OUT.value}: codes {codes.sha256[:12]} of {codes.num_items:,} items, sizes {list(codes.sizes)}")


if __name__ == "__main__":
    _CODES = flags.DEFINE_string("codes", None, "Folder of the codes to extend")
    _PATH = flags.DEFINE_string("data.path", None, "Event log of the grown catalogue")
    _OUT = flags.DEFINE_string("out", None, "Folder for the codes of all its items")
    flags.mark_flags_as_required(["codes", "data.path", "out"])
    app.run(main, flags_parser=parse_flags)
