"""ARGUS pre-training on KuaiRand-Pure: the next video and what the user makes of it, in one pass.

Paper     arXiv 2507.15994 (collapsed tokens, mixed negatives, corrected logQ); encoder far below its "mini"
Data      python -m recscale.data.prepare --dataset=kuairand-pure --source=DIR --out=logs/kuairand-pure
Command   python -m recscale.train --config=configs/argus_kuairand.py --workdir=runs/argus_kuairand
Hardware  2 CPU cores, minutes; experiments/0006_rankers_kuairand has the times
Score     experiments/0006_rankers_kuairand: per feedback, against logistic regression and gradient boosting
"""

from ml_collections import ConfigDict

DAY = 86_400
TEST_FROM = 1_651_334_400  # 2022-05-01 00:00 in Beijing: where the source's own test part begins
VALIDATE_FROM = TEST_FROM - DAY


def get_config() -> ConfigDict:
    """The baseline; every value here is in the record of a run."""
    c = ConfigDict()
    c.seed = 0
    c.study = ""
    c.cell = ConfigDict({"name": "argus_kuairand", "axes": (), "coordinates": ConfigDict()})

    c.data = ConfigDict(
        {"path": "logs/kuairand-pure", "users": 0, "events_per_user": 0, "num_items": 0, "num_events": 0}
    )
    c.split = ConfigDict(
        {"name": "global_time", "test_from": TEST_FROM, "val_from": VALIDATE_FROM, "keep_new_users": True}
    )
    c.loader = ConfigDict(
        {
            "batch_size": 16,
            "length": 64,
            "row_length": 64,
            "layout": "packed",
            "window": "last",
            "inputs": ("is_click", "is_like", "long_view", "played_ratio", "tab", "items/tag", "items/video_seconds"),
            "queries": ("tab", "hour"),
            "horizon": 0,
            "positive": "",
            "lag": 0,
            "request_gap": 0,
            "alpha": 2.0,
            "segments": 0,
        }
    )

    c.model_name = "argus"
    c.model = ConfigDict(
        {
            "embed_dim": 64,
            "width": 64,
            "depth": 2,
            "heads": 2,
            "max_length": 64,
            "dropout": 0.1,
            "time_bias": True,
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
            "optimizer": "lazy_adam",
            "learning_rate": 3e-3,
            "weight_decay": 0.0,
            "warmup": 50,
        }
    )
    c.task_name = "feedback"
    c.task = ConfigDict(
        {
            "loss": "sampled",
            "negatives": 128,
            "sampler": "mixed",
            "shared": "row",
            "logq": "corrected",
            "similarity": "cosine",
            "temperature": 0.05,
            "gbce_t": 0.0,
            "next_item": 1.0,
            "heads": (
                ("is_click", "binary"),
                ("long_view", "binary"),
                ("is_like", "binary"),
                ("played_ratio", "ordinal"),
            ),
            "edges": (0.05, 0.2, 0.5, 0.9, 1.1),
            "form": "collapsed",
            "hidden": 64,
        }
    )
    c.optim = ConfigDict(
        {
            "schedule": "cosine",
            "learning_rate": 2e-3,
            "warmup": 50,
            "decay": 0.2,
            "b1": 0.9,
            "b2": 0.98,
            "weight_decay": 1e-2,
            "clip": 1.0,
            "parametrisation": "sp",
            "base_width": 0,
            "base_embed_dim": 0,
            "base_head_dim": 0,
        }
    )
    c.train = ConfigDict(
        {
            "epochs": 4.0,
            "log_every": 50,
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
            "block": 4096,
            "chunk": 256,
            "top_k": 0,
        }
    )
    c.mesh = ConfigDict({"replica": 1, "data": 1, "model": 1, "accumulate": 1, "remat": "layer"})
    return c.lock()
