"""Residual k-means by faiss: the other side of benchmarks.rqkmeans.

    FAISS_PYTHON benchmarks/_kmeans_peer.py VECTORS.npy LEVELS CODES ITERATIONS THREADS

Needs faiss-cpu and numpy only, so it runs in an environment of its own. One JSON command a line from stdin,
{"do": NAME}, one JSON answer a line on stdout with the seconds of fit and of coding, and the error that is left.
"kmeans all" is faiss.Kmeans level by level on all vectors, "kmeans 256" on 256 vectors per code (faiss's own limit),
"residual quantizer" is faiss.ResidualQuantizer with a beam of 1 and plain k-means, as faiss limits it.
"""

import json
import sys
import time

import faiss
import numpy as np

vectors = np.load(sys.argv[1])
LEVELS, CODES, ITERATIONS, THREADS = (int(value) for value in sys.argv[2:6])


def kmeans(points: int) -> tuple[float, float, np.ndarray]:
    """Seconds of fit and of coding, and what is left over."""
    residual, fit, code = vectors, 0.0, 0.0
    for level in range(LEVELS):
        begin = time.perf_counter()
        model = faiss.Kmeans(
            vectors.shape[1], CODES, niter=ITERATIONS, seed=level, max_points_per_centroid=points, verbose=False
        )
        model.train(residual)
        middle = time.perf_counter()
        _, found = model.index.search(residual, 1)
        residual = residual - model.centroids[found[:, 0]]
        fit, code = fit + middle - begin, code + time.perf_counter() - middle
    return fit, code, residual


def residual_quantizer() -> tuple[float, float, np.ndarray]:
    """The same by faiss.ResidualQuantizer."""
    model = faiss.ResidualQuantizer(vectors.shape[1], LEVELS, int(np.log2(CODES)))
    model.train_type = faiss.ResidualQuantizer.Train_default
    model.max_beam_size = 1
    model.cp.niter = ITERATIONS
    begin = time.perf_counter()
    model.train(vectors[: 256 * CODES])
    middle = time.perf_counter()
    codes = model.compute_codes(vectors)
    end = time.perf_counter()
    return middle - begin, end - middle, vectors - model.decode(codes)


def main() -> None:
    """Answer commands until stdin ends."""
    faiss.omp_set_num_threads(THREADS)
    fits = {
        "kmeans all": lambda: kmeans(len(vectors)),
        "kmeans 256": lambda: kmeans(256),
        "residual quantizer": residual_quantizer,
    }
    print(json.dumps({"faiss": faiss.__version__, "fits": list(fits)}), flush=True)
    for line in sys.stdin:
        cpu = time.process_time()
        fit, code, left = fits[json.loads(line)["do"]]()
        error = float(np.square(left, dtype=np.float64).sum() / np.square(vectors - vectors.mean(axis=0)).sum())
        print(json.dumps({"fit": fit, "code": code, "cpu": time.process_time() - cpu, "error": error}), flush=True)


if __name__ == "__main__":
    main()
