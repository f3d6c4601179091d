"""The `chinchilla` package from PyPI (0.2.0, Apache-2.0) on the points of fits.py, in an environment of its own.

    CHINCHILLA_PYTHON benchmarks/_fits_peer.py POINTS.csv        (pip install chinchilla==0.2.0)

POINTS.csv has C, N, D, loss. Its README's grid of 3,125 starts, its Huber loss of logarithms with delta 1e-3; prints
one line of JSON: version, seconds of the fit alone, parameters.
"""

import functools
import importlib.metadata
import json
import logging
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from chinchilla import Chinchilla
from chinchilla._metrics import log_huber

GRID = {
    "E": np.linspace(1, 2, 5),
    "a": np.linspace(1, 10, 5),
    "b": np.linspace(1, 10, 5),
    "alpha": np.linspace(0.1, 0.7, 5),
    "beta": np.linspace(0.1, 0.7, 5),
}

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(sys.argv[1], Path(folder) / "df.csv")
        fitter = Chinchilla(folder, GRID, loss_fn=functools.partial(log_huber, delta=1e-3), log_level=logging.CRITICAL)
        began = time.perf_counter()
        fitter.fit()
        seconds = time.perf_counter() - began
    params = {name: float(getattr(fitter, name)) for name in ("E", "A", "B", "alpha", "beta")}
    version = importlib.metadata.version("chinchilla")
    print(json.dumps({"version": version, "seconds": seconds, "params": params}))
