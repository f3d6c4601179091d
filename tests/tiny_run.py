"""A run so small that a test can afford it: a planted log of a few users, a shipped config shrunk to fit it."""

from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from configs import dreamrec_yc, hstu_planted, sasrec_ml1m, tiger_beauty
from recscale.data.event_log import EventLog
from recscale.data.prepare import prepare
from recscale.semantic_ids import catalogue

BASES = {"hstu": hstu_planted, "sasrec": sasrec_ml1m}
ITEMS = 63  # with the padding row 64, one for each bucket of a small table


def make_log(folder: Path, users: int = 200, **settings: float) -> Path:
    """Write a planted log of short histories and return its path."""
    lengths = {"length_median": 10, "length_max": 24}
    world = {"items": ITEMS, "items_per_interest": 20, "interests": 6, "types": 6}
    prepare("planted", folder, settings={"users": users} | lengths | world | settings)
    return folder


def tiny(model: str, log: Path, **changes: object) -> ConfigDict:
    """The shipped config of a model on this log, tiny; changes: "section.key" -> value, with "__" for the dot."""
    config = BASES[model].get_config().unlock()
    config.data.path = str(log)
    config.split = ConfigDict({"name": "leave_one_out", "validation": True})
    config.loader.update({"batch_size": 8, "length": 16, "row_length": 0, "window": "last"})
    config.model.update({"embed_dim": 8, "width": 8, "heads": 2, "depth": 1, "max_length": 16, "dropout": 0.1})
    config.model.update({"qk_dim": 4, "v_dim": 4} if model == "hstu" else {"ffn": 16})
    config.table.warmup = 3
    config.optim.update({"warmup": 3, "learning_rate": 1e-2})
    config.train.update(
        {"epochs": 1.0, "log_every": 1, "eval_every": 0, "checkpoint_every": 0, "select": "", "patience": 0}
    )
    config.eval.update({"final": ("test",), "protocols": ("full",), "ks": (10,), "chunk": 64, "block": 64, "top_k": 0})
    return _changed(config, changes)


def _changed(config: ConfigDict, changes: dict[str, object]) -> ConfigDict:
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            config[section][name] = value
        else:
            config[section] = value
    return config.lock()


SAMPLED = {"task__loss": "sampled", "task__negatives": 7, "task__sampler": "mixed", "task__logq": "standard"}
FULL = {"task__loss": "full", "task__negatives": 0, "task__logq": "none"}


def make_codes(log: Path, folder: Path, levels: int = 3, size: int = 4, seed: int = 0) -> Path:
    """Random codes of a log's items, many of them shared, and their folder."""
    opened = EventLog.open(log)
    codes = np.zeros((opened.num_items + 1, levels), np.int32)
    codes[1:] = np.random.default_rng(seed).integers(0, size, (opened.num_items, levels))
    catalogue.write(catalogue.of_log(opened, codes, (size,) * levels, {"method": "random"}), folder)
    return folder


def tiny_tiger(log: Path, codes: Path, **changes: object) -> ConfigDict:
    """The shipped TIGER on this log and these codes, tiny; changes as for `tiny`."""
    config = tiger_beauty.get_config().unlock()
    config.data.path, config.table.codes = str(log), str(codes)
    config.split = ConfigDict({"name": "leave_one_out", "validation": True})
    config.loader.update({"batch_size": 8, "length": 8, "row_length": 9, "segments": 3})
    config.model.update({"embed_dim": 8, "depth": 1, "heads": 2, "head_dim": 4, "ffn": 16, "max_length": 9})
    config.model.update({"levels": 3, "codebook": 4})
    config.optim.warmup = 3
    config.train.update({"epochs": 0.2, "log_every": 1, "eval_every": 0, "checkpoint_every": 0, "select": ""})
    config.eval.update({"final": ("test",), "batch_size": 64, "ks": (1, 5), "top_k": 64})
    return _changed(config, changes)


def tiny_dreamrec(log: Path, **changes: object) -> ConfigDict:
    """The shipped DreamRec on this log, tiny; changes as for `tiny`."""
    config = dreamrec_yc.get_config().unlock()
    config.data.path = str(log)
    config.split = ConfigDict({"name": "leave_one_out", "validation": True})
    config.loader.update({"batch_size": 8, "length": 8, "row_length": 16, "segments": 8})
    config.model.update({"embed_dim": 8, "max_length": 8})
    config.task.update({"process": "linear", "steps": 6, "width": 8, "ffn": 8})
    config.train.update({"epochs": 0.2, "log_every": 1, "eval_every": 0, "checkpoint_every": 0, "select": ""})
    config.eval.update({"final": ("test",), "batch_size": 16, "ks": (1, 5), "top_k": 5, "protocols": ("full",)})
    return _changed(config, changes)
