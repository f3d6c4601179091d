"""Beam search over a catalogue's codes with Hugging Face `generate` in PyTorch: the other side of benchmarks.beam.

    TORCH_PYTHON benchmarks/_beam_peer.py

T5ForConditionalGeneration of the size asked for with random weights, num_beams = width, and a prefix_allowed_tokens_fn
that looks the prefix up in a dictionary made beforehand. Needs torch, transformers and numpy. Reads JSON lines
{"codes": NPY FILE [V + 1, Q] or "" (no constraint), "shape": {..}, "batch", "length", "width", "rounds", "threads"} and
answers each with a line {"seconds": [...], "versions": {...}}, one value a batch.
"""

import functools
import json
import sys
import time

import numpy as np
import torch
import transformers


@functools.cache
def allowed(path: str, codebook: int) -> dict[tuple[int, ...], list[int]]:
    """Prefix of tokens -> the tokens that may follow; token of code c at level q: 1 + q * codebook + c."""
    codes = np.load(path)[1:]
    tokens = np.unique(codes + 1 + codebook * np.arange(codes.shape[1]), axis=0)
    follow: dict[tuple[int, ...], list[int]] = {}
    for level in range(tokens.shape[1]):
        for row in np.unique(tokens[:, : level + 1], axis=0).tolist():
            follow.setdefault(tuple(row[:-1]), []).append(row[-1])
    return follow


@functools.cache
def model(d_model: int, depth: int, heads: int, head_dim: int, ffn: int, vocabulary: int):
    """The T5, to be evaluated."""
    config = transformers.T5Config(
        vocab_size=vocabulary, d_model=d_model, d_kv=head_dim, d_ff=ffn, num_layers=depth, num_decoder_layers=depth,
        num_heads=heads, feed_forward_proj="relu", decoder_start_token_id=0, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config).eval()


def batches(codes: str, shape: dict, batch: int, length: int, width: int, rounds: int, threads: int) -> list[float]:
    """Seconds of each batch, encoder included, after a batch of one row that warms up."""
    torch.set_num_threads(threads)
    levels, codebook = shape["levels"], shape["codebook"]
    sizes = {name: shape[name] for name in ("d_model", "depth", "heads", "head_dim", "ffn")}
    t5 = model(**sizes, vocabulary=1 + levels * codebook)
    follow = allowed(codes, codebook) if codes else None
    rng = np.random.default_rng(0)
    seconds = []
    for rows in [1] + rounds * [batch]:
        history = rng.integers(0, codebook, (rows, length, levels)) + 1 + codebook * np.arange(levels)
        inputs = torch.from_numpy(history.reshape(rows, -1))
        started = time.perf_counter()
        with torch.inference_mode():
            found = t5.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                num_beams=width,
                num_return_sequences=width,
                do_sample=False,
                min_new_tokens=levels,
                max_new_tokens=levels,
                length_penalty=0.0,
                prefix_allowed_tokens_fn=follow and (lambda _, prefix: follow.get(tuple(prefix[1:].tolist()), [0])),
            )
        seconds.append(time.perf_counter() - started)
        assert found.shape == (rows * width, 1 + levels), found.shape
    return seconds[1:]


if __name__ == "__main__":
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    transformers.utils.logging.set_verbosity_error()
    for line in sys.stdin:
        print(json.dumps({"seconds": batches(**json.loads(line)), "versions": versions}), flush=True)
