"""TIGER on Amazon Beauty (5-core, 2014), leave-one-out: an encoder-decoder over semantic ids of the items' text.

Paper     arXiv 2305.05065; published R@10 .0648, N@10 .0384; public re-runs .0559 to .0721. The width
          is the paper's 128 (4.59 M parameters where tied; embed_dim 384 has the 13.8 M that it also states).
          Weights are drawn at .02 and not tied, as in the re-runs that train well: T5's own start needs T5's
          learning rate of .01 (experiments/LOG.md).
Data      python -m recscale.data.prepare --dataset=beauty --source=DIR --out=logs/beauty
          python -m recscale.semantic_ids.make --config=configs/rqvae_beauty.py --out=codes/beauty-rqvae
Command   python -m recscale.train --config=configs/tiger_beauty.py --workdir=runs/tiger_beauty
Hardware  a GPU; on 2 CPU cores an epoch takes about a quarter of an hour
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The baseline; every value here is in the record of a run."""
    c = ConfigDict()
    c.seed = 0
    c.study = ""
    c.cell = ConfigDict({"name": "tiger_beauty", "axes": (), "coordinates": ConfigDict()})

    c.data = ConfigDict({"path": "logs/beauty", "users": 0, "events_per_user": 0, "num_items": 0, "num_events": 0})
    c.split = ConfigDict({"name": "leave_one_out", "validation": True, "validation_users": 4096})
    c.loader = ConfigDict(
        {
            "batch_size": 64,
            "length": 20,
            "row_length": 21,
            "layout": "packed",
            "window": "prefixes",
            "inputs": ("users/hash2000",),
            "queries": (),
            "horizon": 0,
            "positive": "",
            "lag": 0,
            "request_gap": 0,
            "alpha": 2.0,
            "segments": 6,
        }
    )

    c.model_name = "tiger"
    c.model = ConfigDict(
        {
            "embed_dim": 128,
            "depth": 4,
            "heads": 6,
            "head_dim": 64,
            "ffn": 1024,
            "levels": 4,
            "codebook": 256,
            "max_length": 21,
            "dropout": 0.1,
            "dtype": "float32",
            "init": "small",
            "tied": False,
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
            "codes": "codes/beauty-rqvae",
            "optimizer": "adam",
            "learning_rate": 3e-4,
            "weight_decay": 0.0,
            "warmup": 0,
        }
    )
    c.task_name = "semantic_id"
    c.task = ConfigDict({"label_smoothing": 0.0})
    c.optim = ConfigDict(
        {
            "schedule": "cosine",
            "learning_rate": 1e-3,
            "warmup": 1000,
            "decay": 0.2,
            "b1": 0.9,
            "b2": 0.999,
            "weight_decay": 0.01,
            "clip": 1.0,
            "parametrisation": "sp",
            "base_width": 0,
            "base_embed_dim": 0,
            "base_head_dim": 0,
        }
    )
    c.train = ConfigDict(
        {
            "epochs": 60.0,
            "log_every": 50,
            "eval_every": 1000,
            "checkpoint_every": 1000,
            "select": "ndcg@10 max",
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
            "ks": (5, 10, 20),
            "protocols": ("full", "unseen"),
            "block": 16384,
            "chunk": 512,
            "top_k": 50,
        }
    )
    c.mesh = ConfigDict({"replica": 1, "data": 1, "model": 1, "accumulate": 1, "remat": "layer"})
    return c.lock()
