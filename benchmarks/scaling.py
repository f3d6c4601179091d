"""Strong and weak scaling of the train step over 1, 2, 4 and 8 CPU devices, as compiled: no time is measured.

    python -m benchmarks.scaling [--items=1000000]

The real step (HSTU, sampled softmax, row-wise Adagrad) over a table of `items` x 64 is compiled for each number of
devices, with the same batch (strong) and with a batch that grows with them (weak). Per device: matrix FLOPs, bytes of
temporaries, bytes of its share of the table, bytes moved by collectives, and what the exchange of rows moves in one
direction over the rows it looks up. Writes benchmarks/results/scaling.json.
"""

import argparse
import os
from typing import Any

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

from benchmarks.training import save
from configs import hstu_planted
from launch import hlo
from recscale.program import abstract_batch, abstract_state, program
from recscale.step import make_train_step

DEVICES = (1, 2, 4, 8)
ROWS, LENGTH, DIM, NEGATIVES = 32, 64, 64, 128


def measure(devices: int, batch: int, items: int) -> dict[str, Any]:
    """One compiled step."""
    config = hstu_planted.get_config().unlock()
    config.loader.update({"batch_size": batch, "length": LENGTH, "row_length": LENGTH})
    config.model.update({"embed_dim": DIM, "width": DIM, "max_length": LENGTH, "depth": 4, "dropout": 0.0})
    config.model.update({"heads": 2, "qk_dim": 32, "v_dim": 32})
    config.task.update({"loss": "sampled", "negatives": NEGATIVES, "shared": "row", "sampler": "uniform"})
    config.task.update({"logq": "none"})
    config.table.optimizer = "rowwise_adagrad"
    config.eval.batch_size = 8
    config.mesh.data = devices
    run = program(config.lock(), items, {}, 100)
    compiled = make_train_step(run).lower(abstract_state(run), abstract_batch(run)).compile()
    read, memory = hlo.read(compiled.as_text()), compiled.memory_analysis()
    lookups = batch * (2 * LENGTH + NEGATIVES)
    one_way = sum(c.total for c in read.collectives if c.kind == "all-to-all") / 2
    return {
        "devices": devices,
        "batch": batch,
        "flops": read.matmul_flops,
        "temporaries": memory.temp_size_in_bytes,
        "arguments": memory.argument_size_in_bytes,
        "collectives": {kind: read.total(kind) for kind in hlo.KINDS},
        "largest_gather_or_reduce": max(
            (c.bytes for c in read.collectives if c.kind in ("all-gather", "all-reduce", "reduce-scatter")), default=0
        ),
        "exchange_over_lookups": one_way * devices / (lookups * DIM * 4),
    }


def main() -> None:
    """Command line of the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=1_000_000)
    items = parser.parse_args().items
    result = {
        "strong": [measure(n, ROWS, items) for n in DEVICES],
        "weak": [measure(n, ROWS * n // 8, items) for n in DEVICES if ROWS * n // 8 >= n],
    }
    for name, rows in result.items():
        print(f"{name}: per device")
        print(
            "devices batch   MFLOP   x n / first  temp MiB  args MiB  all-to-all MiB  largest AG/AR MiB  one way/rows"
        )
        for row in rows:
            share = row["flops"] * row["devices"] / rows[0]["flops"] * rows[0]["batch"] / row["batch"]
            print(
                f"{row['devices']:7d} {row['batch']:5d} {row['flops'] / 1e6:7.1f} {share:13.3f} "
                f"{row['temporaries'] / 2**20:9.1f} {row['arguments'] / 2**20:9.1f} "
                f"{row['collectives']['all-to-all'] / 2**20:15.2f} {row['largest_gather_or_reduce'] / 2**20:18.3f} "
                f"{row['exchange_over_lookups']:16.2f}"
            )
    save("scaling", {"items": items, **result})


if __name__ == "__main__":
    main()
