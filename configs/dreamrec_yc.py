"""DreamRec on YooChoose, as the authors' README runs it: the next item's vector by diffusion, no negatives.

Paper     arXiv 2310.20453; T 500, schedule exp, lr .001, guidance 2, denoiser mlp1, batch 256 (their code); HR@20 and
          NDCG@20 of the paper, 4.78 and 2.23 %, are by the protocol "dreamrec_legacy" on data of which only the
          validation and test parts are public: not comparable with a run of this config
Data      python -m recscale.data.prepare --dataset=dreamrec-yc --source=DIR --out=logs/dreamrec-yc
Command   python -m recscale.train --config=configs/dreamrec_yc.py --workdir=runs/dreamrec_yc
Hardware  2 CPU cores, a few hundredths of a second a step
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The baseline; every value here is in the record of a run."""
    c = ConfigDict()
    c.seed = 0
    c.study = ""
    c.cell = ConfigDict({"name": "dreamrec_yc", "axes": (), "coordinates": ConfigDict()})

    c.data = ConfigDict({"path": "logs/dreamrec-yc", "users": 0, "events_per_user": 0, "num_items": 0, "num_events": 0})
    c.split = ConfigDict({"name": "parts", "held_out": 0.1, "history": 10, "first_events": True})
    c.loader = ConfigDict(
        {
            "batch_size": 32,
            "length": 10,
            "row_length": 40,
            "layout": "packed",
            "window": "prefixes",
            "inputs": (),
            "queries": (),
            "horizon": 0,
            "positive": "",
            "lag": 0,
            "request_gap": 0,
            "alpha": 2.0,
            "segments": 20,
        }
    )

    c.model_name = "dreamrec"
    c.model = ConfigDict({"embed_dim": 64, "max_length": 10, "dropout": 0.1, "dtype": "float32"})
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
    c.task_name = "denoising"
    c.task = ConfigDict(
        {
            "process": "exp",
            "steps": 500,
            "predicts": "x0",
            "weight": "none",
            "denoiser": "mlp1",
            "width": 64,
            "depth": 1,
            "ffn": 128,
            "heads": 1,
            "drop": 0.1,
            "target": "trainable",
            "normalise": False,
            "ranking": 0.0,
            "deviation": 1.0,
            "sampler": "ddpm",
            "sampling_steps": 0,
            "eta": 0.0,
            "guidance": 2.0,
            "similarity": "dot",
            "temperature": 1.0,
            "samples": 1,
            "combine": "mean",
            "seed": 0,
            "likelihood_steps": 0,
            "likelihood_probes": 1,
        }
    )
    c.optim = ConfigDict(
        {
            "schedule": "constant",
            "learning_rate": 1e-3,
            "warmup": 0,
            "decay": 0.0,
            "b1": 0.9,
            "b2": 0.999,
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
            "epochs": 100.0,
            "log_every": 50,
            "eval_every": 1000,
            "checkpoint_every": 1000,
            "select": "ndcg@20 max",
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
            "batch_size": 256,
            "ks": (10, 20, 50),
            "protocols": ("full", "dreamrec_legacy"),
            "block": 16384,
            "chunk": 512,
            "top_k": 50,
        }
    )
    c.mesh = ConfigDict({"replica": 1, "data": 1, "model": 1, "accumulate": 1, "remat": "layer"})
    return c.lock()
