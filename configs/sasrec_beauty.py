"""SASRec with sampled softmax on Amazon Beauty (5-core, 2014), leave-one-out.

Paper     arXiv 1808.09781 with the loss of arXiv 2402.17152; published R@10 .0921, N@10 .0531 (RecSys'25 comparison).
Data      python -m recscale.data.prepare --dataset=beauty --source=DIR --out=logs/beauty
Command   python -m recscale.train --config=configs/sasrec_beauty.py --workdir=runs/sasrec_beauty
Hardware  2 CPU cores
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The baseline; every value here is in the record of a run."""
    c = ConfigDict()
    c.seed = 0
    c.study = ""
    c.cell = ConfigDict({"name": "sasrec_beauty", "axes": (), "coordinates": ConfigDict()})

    c.data = ConfigDict({"path": "logs/beauty", "users": 0, "events_per_user": 0, "num_items": 0, "num_events": 0})
    c.split = ConfigDict({"name": "leave_one_out", "validation": True, "validation_users": 4096})
    c.loader = ConfigDict(
        {
            "batch_size": 64,
            "length": 50,
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
            "depth": 1,
            "heads": 1,
            "ffn": 256,
            "max_length": 50,
            "dropout": 0.5,
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
            "learning_rate": 1e-3,
            "weight_decay": 0.0,
            "warmup": 0,
        }
    )
    c.task_name = "next_item"
    c.task = ConfigDict(
        {
            "loss": "sampled",
            "negatives": 256,
            "sampler": "uniform",
            "shared": "row",
            "logq": "none",
            "similarity": "cosine",
            "temperature": 0.05,
            "gbce_t": 0.0,
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
            "epochs": 90.0,
            "log_every": 50,
            "eval_every": 225,
            "checkpoint_every": 225,
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
