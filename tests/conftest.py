"""What every test runs under: eight CPU devices, no silent rank promotion, one compilation cache.

This file sets the environment before anything imports jax, so that processes started by a test inherit it too.
"""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Eight devices on few cores: one thread per matrix product, and patience where a loaded machine is slow to let all
# eight arrive at a collective (the default aborts the process after 40 s).
XLA_FLAGS = (
    "--xla_force_host_platform_device_count=8",
    "--xla_cpu_multi_thread_eigen=false",
    "--xla_cpu_collective_call_terminate_timeout_seconds=600",
)

os.environ["XLA_FLAGS"] = " ".join((os.environ.get("XLA_FLAGS", ""), *XLA_FLAGS)).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ.setdefault("MPLBACKEND", "agg")
for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")


@pytest.fixture(scope="session")
def recscale_data() -> Path:
    """The folder of real data that RECSCALE_DATA names. Skips where the variable is unset, fails where it is wrong."""
    value = os.environ.get("RECSCALE_DATA")
    if not value:
        pytest.skip("real data: set RECSCALE_DATA to the folder that holds it")
    folder = Path(value).resolve()
    if not folder.is_dir():
        pytest.fail(f"RECSCALE_DATA={value} is not a folder: unset it or name the folder that holds the real data")
    return folder


@pytest.fixture(scope="session")
def recscale_data_file(recscale_data: Path) -> Callable[[str], Path]:
    """`recscale_data_file("folder/name.parquet")` is that file of RECSCALE_DATA; skips, naming both, where missing."""

    def find(name: str) -> Path:
        path = recscale_data / name
        if not path.exists():
            pytest.skip(f"real data: {name} is not in RECSCALE_DATA ({recscale_data})")
        return path

    return find
