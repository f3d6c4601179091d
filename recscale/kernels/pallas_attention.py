"""Attention by Pallas kernels: Mosaic on TPUs, Triton on NVIDIA GPUs, interpreted (slowly) on any other device.

Forward and backward passes hold nothing of the size of all pairs: outputs, and for softmax one statistic a query. The
lookup of time buckets takes a device's own logarithm: a difference within rounding of a bucket's edge may fall on the
other side of it than in another implementation.
"""

import dataclasses
import functools
import importlib

import jax

from recscale.kernels.pairs import Bias
from recscale.kernels.tiles import Options, make_plan

BACKENDS = {"tpu": "recscale.kernels.pallas_tpu", "gpu": "recscale.kernels.pallas_gpu"}
"""Modules, imported when first used: Pallas takes half a second, which a process without these kernels does not pay."""


def attention_pallas(
    q_BLHD,
    k_BLHD,
    v_BLHE,
    segment_ids_BL,
    bias: Bias,
    *,
    kind,
    n,
    scale=1.0,
    window=0,
    prefix=0,
    targets_BL=None,
    block_q: int | None = None,
    block_kv: int | None = None,
    backend: str | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Arguments and result as `recscale.kernels.attention.attention`; any length, differentiable in q, k, v, tables.

    block_q, block_kv: powers of two, on TPUs multiples of 128; None = the backend's own. backend: "tpu" or "gpu" takes
    that kernel, interpreted where `interpret` says so; None the one of the platform that the program is compiled for.
    """
    has = (targets_BL is not None, bias.time is not None)
    options = Options(kind, n, float(scale), window, prefix, *has, block_q, block_kv, interpret)
    plan = make_plan(segment_ids_BL, bias.query_time_BL, bias.time_BL, targets_BL, options)
    return _attend(options, backend, q_BLHD, k_BLHD, v_BLHE, bias.position, bias.time, plan)


def _dispatch(name: str, options: Options, backend: str | None, *args):
    """`forward` or `backward` of a backend, or a choice among them that is made when the program is lowered."""

    def compute(backend: str, **changed):
        function = getattr(importlib.import_module(BACKENDS[backend]), name)
        return functools.partial(function, options=dataclasses.replace(options, **changed))

    if backend is not None:
        return compute(backend)(*args)
    interpreted = compute("gpu", interpret=True)  # of the two it compiles faster on a CPU
    return jax.lax.platform_dependent(*args, tpu=compute("tpu"), cuda=compute("gpu"), default=interpreted)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(options: Options, backend: str | None, q, k, v, position, time, plan):
    return _dispatch("forward", options, backend, q, k, v, position, time, plan)[0]


def _attend_forward(options, backend, q, k, v, position, time, plan):
    out, logsumexp = _dispatch("forward", options, backend, q, k, v, position, time, plan)
    return out, (q, k, v, position, time, plan, out if options.softmax else None, logsumexp)


def _attend_backward(options, backend, kept, out_gradient):
    *gradients, position, time = _dispatch("backward", options, backend, *kept, out_gradient)
    tables = [None if x is None else x.astype(like.dtype) for x, like in zip((position, time), kept[3:5], strict=True)]
    return *gradients, *tables, None


_attend.defvjp(_attend_forward, _attend_backward)
