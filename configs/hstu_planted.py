"""HSTU on planted data, whose Bayes-optimal loss is known: the base of the four-axis demonstration.

Paper     arXiv 2402.17152 (encoder), full softmax over the 1,000 items, one pass over the data
Data      python -m recscale.data.prepare --dataset=planted --out=logs/planted
Command   python -m recscale.train --config=configs/hstu_planted.py --workdir=runs/hstu_planted
Hardware  1 CPU core; the demo's base cell took 17 s
Score     with 8,000 training users 5.26 nats, 0.35 above the floor of a 32-event history
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The baseline; every value here is in the record of a run."""
    c = ConfigDict()
    c.seed = 0
    c.study = ""
    c.cell = ConfigDict({"name": "hstu_planted", "axes": (), "coordinates": ConfigDict()})

    c.data = ConfigDict({"path": "logs/planted", "users": 0, "events_per_user": 0, "num_items": 0, "num_events": 0})
    c.split = ConfigDict({"name": "by_user", "train_users": 12_000, "eval_users": 4_000, "eval_targets": 1})
    c.loader = ConfigDict(
        {
            "batch_size": 4,
            "length": 32,
            "row_length": 64,
            "layout": "packed",
            "window": "all",
            "inputs": (),
            "queries": (),
            "horizon": 0,
            "positive": "",
            "lag": 0,
            "request_gap": 0,
            "alpha": 2.0,
            "segments": 0,
        }
    )

    c.model_name = "hstu"
    c.model = ConfigDict(
        {
            "embed_dim": 32,
            "width": 32,
            "depth": 2,
            "heads": 1,
            "qk_dim": 32,
            "v_dim": 32,
            "max_length": 64,
            "output_length": 10,
            "dropout": 0.0,
            "time_bias": False,
            "query_time": "last_event",
            "dtype": "float32",
        }
    )
    c.table = ConfigDict(
        {
            "kind": "full",
            "rows": 0,
            "parts": 1,
            "inner": 0,
            "combine": "sum",
            "dtype": "float32",
            "codes": "",
            "optimizer": "adam",
            "learning_rate": 5e-3,
            "weight_decay": 0.0,
            "warmup": 50,
        }
    )
    c.task_name = "next_item"
    c.task = ConfigDict(
        {
            "loss": "full",
            "negatives": 0,
            "sampler": "uniform",
            "shared": "row",
            "logq": "none",
            "similarity": "dot",
            "temperature": 1.0,
            "gbce_t": 0.0,
        }
    )
    c.optim = ConfigDict(
        {
            "schedule": "cosine",
            "learning_rate": 3e-3,
            "warmup": 50,
            "decay": 0.2,
            "b1": 0.9,
            "b2": 0.98,
            "weight_decay": 0.0,
            "clip": 1.0,
            "parametrisation": "sp",
            "base_width": 0,
            "base_embed_dim": 0,
            "base_head_dim": 0,
        }
    )
    c.train = ConfigDict(
        {
            "epochs": 1.0,
            "log_every": 20,
            "eval_every": 0,
            "checkpoint_every": 0,
            "select": "",
            "patience": 0,
            "keep_steps": (),
            "branch_from": "",
            "branch_step": 0,
            "warm_start": "",
        }
    )
    c.eval = ConfigDict(
        {
            "during": "val",
            "final": ("test",),
            "batch_size": 64,
            "ks": (10,),
            "protocols": ("full",),
            "block": 1024,
            "chunk": 512,
            "top_k": 0,
        }
    )
    c.mesh = ConfigDict({"replica": 1, "data": 1, "model": 1, "accumulate": 1, "remat": "layer"})
    return c.lock()
