"""Hugging Face's T5 trained on code tokens, as public TIGER code trains it: the other side of benchmarks.tiger.

    TORCH_PYTHON benchmarks/_tiger_peer.py SETUP.npz

Needs torch, transformers and numpy only, so it runs in an environment of its own. T5ForConditionalGeneration with tied
embeddings, pad = eos = BOS = 0, mean cross-entropy over the tokens of the whole vocabulary, AdamW over everything.

SETUP.npz holds `setup` (JSON: config of the model, levels, codebook, dropout, threads), histories [steps, B, L, Q] and
targets [steps, B, Q] of codes, lengths [steps, B] of the histories, and the parameters to start from by their names.

The process reads one JSON command a
line from stdin and answers with one JSON line on stdout: {"do": "logits", "out": PATH} writes the scores [B, Q, K] of
batch 0 without dropout; {"do": "run", "compiled": bool, "seconds": S} trains for about S seconds.
"""

import json
import sys
import time

import numpy as np
import torch
import transformers
from transformers import T5Config, T5ForConditionalGeneration


class Peer:
    """The model, its optimizer and its batches; one per process."""

    def __init__(self, path: str):
        data = dict(np.load(path))
        self.c = json.loads(str(data.pop("setup")))
        torch.set_num_threads(self.c["threads"])
        torch.manual_seed(0)
        levels, codebook = self.c["levels"], self.c["codebook"]
        first = 1 + np.arange(levels) * codebook
        history, target = data.pop("history") + first, data.pop("target") + first
        self.lengths = torch.from_numpy(data.pop("lengths") * levels).long()
        self.inputs = torch.from_numpy(history.reshape(*history.shape[:2], -1)).long()
        self.labels = torch.from_numpy(target).long()
        size = self.c["model"]
        config = T5Config(
            vocab_size=1 + levels * codebook, num_decoder_layers=size["num_layers"], feed_forward_proj="relu",
            dropout_rate=self.c["dropout"], tie_word_embeddings=True, pad_token_id=0, eos_token_id=0,
            decoder_start_token_id=0, use_cache=False, **size,
        )  # fmt: skip
        self.model = T5ForConditionalGeneration(config)
        shared = {
            name: data["shared.weight"] for name in self.model.state_dict() if name.endswith("embed_tokens.weight")
        }
        weights = data | shared | {"lm_head.weight": data["shared.weight"]}
        self.model.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
        self.model.train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, weight_decay=0.01)
        self.models = {False: self.model, True: torch.compile(self.model)}
        self.step = 0

    def batch(self, step: int) -> dict[str, torch.Tensor]:
        """Histories padded to the longest of the batch, with their mask, as public code passes them."""
        inputs, labels, lengths = (x[step % len(x)] for x in (self.inputs, self.labels, self.lengths))
        mask = (torch.arange(inputs.shape[1])[None] < lengths[:, None]).long()[:, : int(lengths.max())]
        return {"input_ids": inputs[:, : mask.shape[1]] * mask, "attention_mask": mask, "labels": labels}

    def logits(self, out: str) -> dict:
        self.model.eval()
        with torch.no_grad():
            scores = self.model(**self.batch(0)).logits.numpy()
        self.model.train()
        K = self.c["codebook"]
        np.save(out, np.stack([scores[:, q, 1 + q * K : 1 + (q + 1) * K] for q in range(self.c["levels"])], axis=1))
        return {"parameters": sum(p.numel() for p in self.model.parameters())}

    def run(self, compiled: bool, seconds: float) -> dict:
        tokens = steps = 0
        cpu, begin = time.process_time(), time.perf_counter()
        while steps == 0 or time.perf_counter() - begin < seconds:
            batch = self.batch(self.step)
            self.optimizer.zero_grad(set_to_none=True)
            loss = self.models[compiled](**batch).loss
            loss.backward()
            self.optimizer.step()
            tokens += int(batch["attention_mask"].sum()) + batch["labels"].numel()
            steps, self.step = steps + 1, self.step + 1
        wall = time.perf_counter() - begin
        return {"events": tokens, "steps": steps, "wall": wall, "cpu": time.process_time() - cpu, "loss": loss.item()}


def main() -> None:
    peer = Peer(sys.argv[1])
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps(versions | {"threads": torch.get_num_threads()}), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        action = command.pop("do")
        print(json.dumps({"logits": peer.logits, "run": peer.run}[action](**command)), flush=True)


if __name__ == "__main__":
    main()
