"""Semantic ids of Amazon Beauty by residual k-means: 3 levels of 256 codes and a digit for what shares them.

Paper     arXiv 2507.22224 (GRID); arXiv 2502.18965 (OneRec) with model.balanced_iterations = 10
Data      python -m recscale.data.prepare --dataset=beauty --source=DIR --out=logs/beauty
Command   python -m recscale.semantic_ids.make --config=configs/rqkmeans_beauty.py --out=codes/beauty-rqkmeans
Hardware  2 CPU cores
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The baseline; every value here is in make.json of the codes."""
    c = ConfigDict()
    c.seed = 0
    c.data = ConfigDict({"path": "logs/beauty"})
    c.content = ConfigDict({"encoder": "tfidf_svd", "settings": ConfigDict({"dim": 256})})
    c.behaviour = ConfigDict({"source": "", "use": "join", "weight": 0.5})
    c.method = "rqkmeans"
    c.model = ConfigDict(
        {
            "levels": 3,
            "codebook": 256,
            "iterations": 50,
            "tolerance": 0.0,
            "points_per_code": 0,
            "normalize_residuals": False,
            "balanced_iterations": 0,
        }
    )
    c.collisions = ConfigDict({"policy": "digit", "maximum": 256, "epsilon": 0.003, "iterations": 50, "rounds": 30})
    return c.lock()
