"""HSTU of 1.0e9 dense parameters, histories of 8,192 events, a table of 1e9 rows x 64, for a pod of 512 TPU v5p chips.

Paper     shapes after arXiv 2402.17152 (generative recommenders at length 8,192); nobody has published this run
Data      none is included: 1e9 items and 1e12 events are what the plan counts with; point data.path at such a log
Command   python -m launch.plan --config=configs/hstu_1b_pod.py --topology=v5p:8x8x8
Hardware  512 TPU v5p; the plan says whether it fits, what bounds a step and how long it takes
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The baseline; every value here is in the record of a run."""
    c = ConfigDict()
    c.seed = 0
    c.study = ""
    c.cell = ConfigDict({"name": "hstu_1b_pod", "axes": (), "coordinates": ConfigDict()})

    c.data = ConfigDict(
        {
            "path": "logs/pod",
            "users": 0,
            "events_per_user": 0,
            "num_items": 1_000_000_000,
            "num_events": 1_000_000_000_000,
        }
    )
    c.split = ConfigDict({"name": "leave_one_out", "validation": True, "validation_users": 65_536})
    c.loader = ConfigDict(
        {
            "batch_size": 512,
            "length": 8192,
            "row_length": 0,
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
            "embed_dim": 64,
            "width": 2048,
            "depth": 48,
            "heads": 16,
            "qk_dim": 128,
            "v_dim": 128,
            "max_length": 8192,
            "output_length": 10,
            "dropout": 0.0,
            "time_bias": False,
            "query_time": "last_event",
            "dtype": "bfloat16",
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
            "optimizer": "rowwise_adagrad",
            "learning_rate": 0.05,
            "weight_decay": 0.0,
            "warmup": 2000,
        }
    )
    c.task_name = "next_item"
    c.task = ConfigDict(
        {
            "loss": "sampled",
            "negatives": 1024,
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
            "learning_rate": 3e-4,
            "warmup": 2000,
            "decay": 0.2,
            "b1": 0.9,
            "b2": 0.98,
            "weight_decay": 0.1,
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
            "log_every": 100,
            "eval_every": 0,
            "checkpoint_every": 1000,
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
            "batch_size": 512,
            "ks": (10, 100),
            "protocols": ("full",),
            "block": 16384,
            "chunk": 4096,
            "top_k": 100,
        }
    )
    c.mesh = ConfigDict({"replica": 1, "data": 64, "model": 8, "accumulate": 1, "remat": "layer"})
    return c.lock()
