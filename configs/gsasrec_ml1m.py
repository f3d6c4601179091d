"""SASRec with gBCE (gSASRec) on its own version of MovieLens-1M: 3,416 items, leave-one-out, seen items filtered.

Paper     arXiv 2308.07192 (256 negatives, t = 0.75); published R@10 .3003, NDCG@10 .1726 with width 128, dropout .5
          and a separate output table; here width 64, dropout .2, tied table, pre-norm
Data      python -m recscale.data.prepare --dataset=ml-1m-sasrec --source=DIR --out=logs/ml-1m-sasrec
Command   python -m recscale.train --config=configs/gsasrec_ml1m.py --workdir=runs/gsasrec_ml1m
Hardware  1 CPU core
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The baseline; every value here is in the record of a run."""
    c = ConfigDict()
    c.seed = 0
    c.study = ""
    c.cell = ConfigDict({"name": "gsasrec_ml1m", "axes": (), "coordinates": ConfigDict()})

    c.data = ConfigDict(
        {"path": "logs/ml-1m-sasrec", "users": 0, "events_per_user": 0, "num_items": 0, "num_events": 0}
    )
    c.split = ConfigDict({"name": "leave_one_out", "validation": True, "validation_users": 1024})
    c.loader = ConfigDict(
        {
            "batch_size": 8,
            "length": 200,
            "row_length": 0,
            "layout": "packed",
            "window": "last",
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

    c.model_name = "sasrec"
    c.model = ConfigDict(
        {
            "embed_dim": 64,
            "width": 64,
            "depth": 2,
            "heads": 1,
            "ffn": 64,
            "max_length": 200,
            "dropout": 0.2,
            "activation": "relu",
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
            "warmup": 0,
        }
    )
    c.task_name = "next_item"
    c.task = ConfigDict(
        {
            "loss": "gbce",
            "negatives": 256,
            "sampler": "uniform",
            "shared": "row",
            "logq": "none",
            "similarity": "dot",
            "temperature": 1.0,
            "gbce_t": 0.75,
        }
    )
    c.optim = ConfigDict(
        {
            "schedule": "cosine",
            "learning_rate": 1e-3,
            "warmup": 0,
            "decay": 0.2,
            "b1": 0.9,
            "b2": 0.98,
            "weight_decay": 0.0,
            "clip": 0.0,
            "parametrisation": "sp",
            "base_width": 0,
            "base_embed_dim": 0,
            "base_head_dim": 0,
        }
    )
    c.train = ConfigDict(
        {
            "epochs": 20.0,
            "log_every": 50,
            "eval_every": 824,
            "checkpoint_every": 1648,
            "select": "ndcg@10/unseen max",
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
            "final": ("val", "test"),
            "batch_size": 64,
            "ks": (1, 5, 10, 50, 200),
            "protocols": ("full", "unseen"),
            "block": 16384,
            "chunk": 512,
            "top_k": 50,
        }
    )
    c.mesh = ConfigDict({"replica": 1, "data": 1, "model": 1, "accumulate": 1, "remat": "layer"})
    return c.lock()
