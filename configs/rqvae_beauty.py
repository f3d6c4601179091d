"""Semantic ids of Amazon Beauty by RQ-VAE: 3 levels of 256 codes and a digit for what shares them.

Paper     arXiv 2305.05065 (TIGER); content by TF-IDF and SVD of the item text instead of Sentence-T5
Data      python -m recscale.data.prepare --dataset=beauty --source=DIR --out=logs/beauty
Command   python -m recscale.semantic_ids.make --config=configs/rqvae_beauty.py --out=codes/beauty-rqvae
Hardware  2 CPU cores
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The baseline; every value here is in make.json of the codes."""
    c = ConfigDict()
    c.seed = 0
    c.data = ConfigDict({"path": "logs/beauty"})
    c.content = ConfigDict({"encoder": "tfidf_svd", "settings": ConfigDict({"dim": 256})})
    c.behaviour = ConfigDict({"source": "", "use": "align", "weight": 0.5})  # weight: where use is "join"
    c.method = "rqvae"
    c.inputs = "standard"
    c.model = ConfigDict(
        {
            "hidden": (512, 256, 128),
            "latent": 32,
            "bias": True,
            "levels": 3,
            "codebook": 256,
            "straight_through": "per_level",
            "learning": "loss",
            "decay": 0.99,
            "assignment": "nearest",
            "sinkhorn_eps": 0.003,
            "sinkhorn_iterations": 50,
            "beta": 0.25,
            "over_dims": "mean",
            "over_levels": "sum",
            "align_weight": 0.0,
            "align_temperature": 0.07,
        }
    )
    c.fit = ConfigDict(
        {
            "steps": 4000,
            "batch_size": 1024,
            "chunk": 250,
            "optimizer": "adamw",
            "learning_rate": 1e-3,
            "weight_decay": 1e-4,
            "clip": 1.0,
            "schedule": "linear",
            "warmup": 100,
            "kmeans_iterations": 25,
            "kmeans_points": 65_536,
            "restart_every": 100,
        }
    )
    c.collisions = ConfigDict({"policy": "digit", "maximum": 256, "epsilon": 0.003, "iterations": 50, "rounds": 30})
    return c.lock()
