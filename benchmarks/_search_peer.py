"""The best items of each query by faiss and by PyTorch: the other side of benchmarks.evaluation.

    TORCH_PYTHON benchmarks/_search_peer.py VECTORS.npy QUERIES.npy K THREADS

Needs torch, faiss-cpu and numpy only, so it runs in an environment of its own. "faiss" is IndexFlatIP given all queries
at once (it makes blocks of its own); "torch N" is matmul and topk over the whole catalogue for N queries at a time. The
process reads one JSON command a line from stdin and answers with one JSON line on stdout: {"do": NAME, "out": PATH}
searches once and writes the items (from 0) [Q, K].
"""

import json
import sys
import time

import faiss
import numpy as np
import torch


def main() -> None:
    """Answer commands until stdin ends."""
    vectors, queries = np.load(sys.argv[1]), np.load(sys.argv[2])
    count, threads = int(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    table = torch.from_numpy(vectors)

    def by_torch(size: int) -> np.ndarray:
        parts = torch.from_numpy(queries).split(size)
        return torch.cat([(part @ table.T).topk(count).indices for part in parts]).numpy()

    searches = {"faiss": lambda: index.search(queries, count)[1]}
    searches |= {f"torch {size}": lambda size=size: by_torch(size) for size in (64, 256)}
    print(json.dumps({"torch": torch.__version__, "faiss": faiss.__version__, "searches": list(searches)}), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        begin = time.perf_counter(), time.process_time()
        items = searches[command["do"]]()
        spent = {"wall": time.perf_counter() - begin[0], "cpu": time.process_time() - begin[1]}
        np.save(command["out"], items)
        print(json.dumps(spent), flush=True)


if __name__ == "__main__":
    main()
