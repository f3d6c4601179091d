"""An embedding table trained plainly in PyTorch: the other side of benchmarks.tables.

    TORCH_PYTHON benchmarks/_tables_peer.py

nn.Embedding(sparse=True) with SparseAdam. Needs torch and numpy only. Reads JSON lines {"rows", "dim", "lookups",
"steps", "seed", "threads"} from stdin and answers each with a line {"seconds": [...]}, one value a step.
"""

import json
import sys
import time

import numpy as np
import torch


def steps(rows: int, dim: int, lookups: int, steps: int, seed: int, threads: int) -> list[float]:
    """Seconds of each step after one that warms up: look up, sum of squares, backward, sparse update."""
    torch.set_num_threads(threads)
    table = torch.nn.Embedding(rows, dim, sparse=True)
    optimizer = torch.optim.SparseAdam(table.parameters(), lr=1e-3)
    rng = np.random.default_rng(seed)
    seconds = []
    for _ in range(steps + 1):
        ids = torch.from_numpy(np.exp(rng.uniform(0, np.log(rows), lookups)).astype(np.int64).clip(0, rows - 1))
        started = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        table(ids).square().sum().backward()
        optimizer.step()
        seconds.append(time.perf_counter() - started)
    return seconds[1:]


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps({"seconds": steps(**json.loads(line))}), flush=True)
