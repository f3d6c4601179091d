"""Peaks of the chips that a run may be planned for, each with the public page it comes from, and names of topologies.

All figures are per chip and decimal unless they say GiB. Compute is dense (vendors of GPUs print twice that, "with
sparsity"). Link bandwidths are one direction, half of the bidirectional figure that vendors print.
"""

import dataclasses
import math
import re

GIB = 1 << 30
_V5E = "https://docs.cloud.google.com/tpu/docs/v5e: 197 TFLOPs bf16, 16 GB, 819 GBps, ICI 400 GBps bidirectional"
_V5P = "https://docs.cloud.google.com/tpu/docs/v5p: 459 TFLOPs bf16, 95 GiB, 2765 GBps, ICI 1200 GBps bidirectional"
_V6E = "https://docs.cloud.google.com/tpu/docs/v6e: 918 TFLOPs bf16, 32 GB, 1638 GBps, ICI 800 GBps bidirectional"
_H100 = "https://www.nvidia.com/en-us/data-center/h100: SXM, BF16 1,979 and TF32 989 TFLOPS with sparsity, 3.35 TB/s"
_H200 = "https://www.nvidia.com/en-us/data-center/h200: SXM, 141 GB, 4.8 TB/s, BF16 1,979 TFLOPS with sparsity"
_HGX = "https://www.nvidia.com/en-us/data-center/hgx: 8 x B200, BF16 36 and TF32 18 PFLOPS with sparsity"
_NVLINK4 = "https://developer.nvidia.com/blog/introducing-nvidia-hgx-h100: NVLink 900 GB/s bidirectional"
_DGX_H100 = "https://docs.nvidia.com/dgx/dgxh100-user-guide: one ConnectX-7 (400 Gb/s) per GPU"
_DGX_B200 = (
    "https://docs.nvidia.com/dgx/dgxb200-user-guide: 8 GPUs, 1,440 GB, NVLink 14.4 TB/s, one ConnectX-7 (400 Gb/s) each"
)
_B200_HBM = "https://www.nvidia.com/en-us/data-center/dgx-b200: 64 TB/s HBM3e over 8 GPUs"
_TPU_F32 = "no published float32 peak: jax multiplies float32 in one bfloat16 pass by default, so the bf16 peak holds"
_GPU_F32 = "jax multiplies float32 as TF32 by default, so the TF32 peak holds"


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peaks of one chip.

    flops: by type of the model's compute, FLOP/s. hbm: bytes. hbm_bandwidth, link (ICI or NVLink, one direction),
    network (between nodes, one direction; 0: not used): bytes/s. dims: lengths in a topology's name.
    target: what a CUDA compiler must know of the chip.
    """

    title: str
    platform: str
    flops: dict[str, float]
    f32_note: str
    hbm: int
    hbm_bandwidth: float
    link: float
    network: float
    dims: tuple[int, ...]
    sources: tuple[str, ...]
    target: str = ""


@dataclasses.dataclass(frozen=True)
class Topology:
    """A named arrangement of chips: the torus of a TPU slice, or (slices, hosts, GPUs per host)."""

    text: str
    name: str
    chip: Chip
    shape: tuple[int, ...]

    @property
    def chips(self) -> int:
        """How many."""
        return math.prod(self.shape)

    @property
    def per_node(self) -> int:
        """Chips that share the fast links: a node's GPUs, or the whole TPU slice."""
        return self.shape[-1] if self.chip.platform == "gpu" else self.chips


def _tpu(title: str, flops: float, hbm: int, hbm_bandwidth: float, link: float, dims: tuple[int, ...], source: str):
    peaks = {"bfloat16": flops, "float32": flops}
    return Chip(title, "tpu", peaks, _TPU_F32, hbm, hbm_bandwidth, link, 0.0, dims, (source,))


def _gpu(
    title: str,
    peaks: tuple[float, float],
    hbm: int,
    hbm_bandwidth: float,
    link: float,
    capability: int,
    cores: int,
    sources: tuple[str, ...],
) -> Chip:
    target = (
        f"gpu_device_info {{ cuda_compute_capability {{ major: {capability} }} core_count: {cores} fpus_per_core: 128 "
        "clock_rate_ghz: 1.98 threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048 "
        "block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 l2_cache_size: 52428800 "
        "shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472 "
        "registers_per_core_limit: 65536 registers_per_block_limit: 65536 "
        f'memory_bandwidth: {int(hbm_bandwidth)} device_memory_size: {hbm} }} platform_name: "CUDA"'
    )
    flops = {"bfloat16": peaks[0], "float32": peaks[1]}
    return Chip(title, "gpu", flops, _GPU_F32, hbm, hbm_bandwidth, link, 50e9, (1, 3), sources, target)


CHIPS: dict[str, Chip] = {
    "v5e": _tpu("TPU v5e", 197e12, 16 * GIB, 819e9, 200e9, (2,), _V5E),
    "v5p": _tpu("TPU v5p", 459e12, 95 * GIB, 2765e9, 600e9, (2, 3), _V5P),
    "v6e": _tpu("TPU v6e (Trillium)", 918e12, 32 * GIB, 1638e9, 400e9, (2,), _V6E),
    "h100": _gpu(
        "NVIDIA H100 SXM 80 GB",
        (989.5e12, 494.5e12),
        80 * 10**9,
        3.35e12,
        450e9,
        9,
        132,
        (_H100, _NVLINK4, _DGX_H100),
    ),
    "h200": _gpu(
        "NVIDIA H200 SXM 141 GB",
        (989.5e12, 494.5e12),
        141 * 10**9,
        4.8e12,
        450e9,
        9,
        132,
        (_H200, _NVLINK4, _DGX_H100),
    ),
    "b200": _gpu(
        "NVIDIA B200 180 GB",
        (2.25e15, 1.125e15),
        180 * 10**9,
        8e12,
        900e9,
        10,
        148,
        (_HGX, _DGX_B200, _B200_HBM),
    ),
}
NODE = 8  # GPUs of a node where only their number is given
EXAMPLES = "v5e:4x8, v5p:8x8x8, v6e:16x16, h100:64 (nodes of 8), h200:1x4x8 (slices x hosts x GPUs), b200:8"


def topology(text: str) -> Topology:
    """Read "v5p:8x8x8" or "h100:64". Raises ValueError naming what is known."""
    name, _, size = text.lower().partition(":")
    if name not in CHIPS:
        raise ValueError(f"topology {text!r}: no chip {name!r} in the table ({', '.join(CHIPS)}); examples: {EXAMPLES}")
    chip = CHIPS[name]
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", size):
        raise ValueError(f"topology {text!r}: expected sizes behind the colon; examples: {EXAMPLES}")
    shape = tuple(int(n) for n in size.split("x"))
    if len(shape) not in chip.dims:
        wanted = " or ".join(str(n) for n in chip.dims)
        raise ValueError(f"topology {text!r}: {chip.title} takes {wanted} sizes, found {len(shape)}; e.g. {EXAMPLES}")
    if chip.platform == "gpu" and len(shape) == 1:
        if shape[0] > NODE and shape[0] % NODE:
            raise ValueError(f"topology {text!r}: {shape[0]} GPUs do not fill nodes of {NODE}; e.g. {EXAMPLES}")
        shape = (1, max(1, shape[0] // NODE), min(shape[0], NODE))
    return Topology(text, name, chip, shape)
