"""HSTU and SASRec written plainly in PyTorch, as public code trains them: the other side of benchmarks.training.

    TORCH_PYTHON benchmarks/_torch_peer.py SETUP.npz

Needs torch and numpy only, so it runs in an environment of its own. Rows are right-padded to L, the item table is a
dense nn.Embedding, AdamW steps over everything, the loss is a sampled softmax with cosine scores. Negatives are drawn
"per token" (as public code does, over the supervised positions) or "per row" (shared by the positions of a user, as
this project's configs do). Equations: arXiv 2402.17152 with its released code; arXiv 1808.09781 with pre-norm blocks.

SETUP.npz holds `setup` (JSON: model, items, dim, depth, heads, length, dropout, negatives, temperature, threads), the
padded batches (item_id, target: [steps, B, L]) and the parameters to start from. The process reads one JSON command a
line from stdin and answers with one JSON line on stdout: {"do": "hidden", "out": PATH} writes the hidden states of
batch 0 without dropout; {"do": "run", "compiled": bool, "shared": bool, "seconds": S} trains for about S seconds.
"""

import json
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


class HstuLayer(nn.Module):
    """x + Wo dropout(u * LN(attention)), pointwise-SiLU attention with a learned bias by distance."""

    def __init__(self, c: dict):
        super().__init__()
        self.heads, self.width, self.n, self.rate = c["heads"], c["dim"], c["length"] + 11, c["dropout"]
        self.uvqk = nn.Parameter(torch.empty(self.width, 4 * self.width))
        self.out = nn.Linear(self.width, self.width)
        self.position_bias = nn.Parameter(torch.empty(2 * self.n - 1))

    def forward(self, x, mask_BLL, distance_LL):
        B, L, D = x.shape
        u, v, q, k = F.silu(F.layer_norm(x, (D,), eps=1e-6) @ self.uvqk).chunk(4, dim=-1)
        q, k, v = (part.view(B, L, self.heads, D // self.heads) for part in (q, k, v))
        scores = torch.einsum("blhd,bmhd->bhlm", q, k) + self.position_bias[distance_LL]
        weights = F.silu(scores) / self.n * mask_BLL[:, None]
        o = torch.einsum("bhlm,bmhd->blhd", weights, v).reshape(B, L, D)
        return x + self.out(F.dropout(u * F.layer_norm(o, (D,), eps=1e-6), self.rate, self.training))


class SasrecLayer(nn.Module):
    """x + attention(LN(x)), then x + FFN(LN(x)); right-padding needs no mask under causal attention."""

    def __init__(self, c: dict):
        super().__init__()
        D = c["dim"]
        self.heads, self.rate = c["heads"], c["dropout"]
        self.norm_attention, self.norm_ffn = nn.LayerNorm(D, eps=1e-8), nn.LayerNorm(D, eps=1e-8)
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.ffn_in, self.ffn_out = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x, mask_BLL, distance_LL):
        B, L, D = x.shape
        parts = self.qkv(self.norm_attention(x)).chunk(3, dim=-1)
        q, k, v = (part.view(B, L, self.heads, D // self.heads).transpose(1, 2) for part in parts)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, L, D)
        x = x + F.dropout(self.out(a), self.rate, self.training)
        hidden = F.dropout(F.relu(self.ffn_in(self.norm_ffn(x))), self.rate, self.training)
        return x + F.dropout(self.ffn_out(hidden), self.rate, self.training)


class Encoder(nn.Module):
    """Item ids [B, L] to hidden states [B, L, D]; the item table is part of it, as in public code."""

    def __init__(self, c: dict):
        super().__init__()
        hstu = c["model"] == "hstu"
        self.rate, self.scale, self.n = c["dropout"], c["dim"] ** 0.5, c["length"] + 11
        self.items = nn.Embedding(c["items"] + 1, c["dim"], padding_idx=0)
        self.positions = nn.Parameter(torch.empty(self.n if hstu else c["length"], c["dim"]))
        self.layers = nn.ModuleList((HstuLayer if hstu else SasrecLayer)(c) for _ in range(c["depth"]))
        self.norm = nn.Identity() if hstu else nn.LayerNorm(c["dim"], eps=1e-8)
        self.padding_is_zeroed = hstu

    def forward(self, item_BL):
        L = item_BL.shape[1]
        known_BL = item_BL > 0
        x = F.dropout(self.items(item_BL) * self.scale + self.positions[:L], self.rate, self.training)
        if self.padding_is_zeroed:
            x = x * known_BL[:, :, None]
        slot = torch.arange(L)
        mask_BLL = ((slot[None, :] <= slot[:, None]) & known_BL[:, None, :]).float()
        distance_LL = (slot[None, :] - slot[:, None]) + self.n - 1
        for layer in self.layers:
            x = layer(x, mask_BLL, distance_LL)
        return self.norm(x)


def sampled_softmax(query, target, items: nn.Embedding, c: dict, shared: bool):
    """Mean over the supervised positions of query [B, L, D] of -log softmax([s+, s-])[0]; cosine scores."""
    B = target.shape[0]
    valid = target > 0
    if shared:
        negative = torch.randint(1, c["items"] + 1, (B, c["negatives"]))
        vectors = F.normalize(items(negative), dim=-1, eps=1e-6)
        query = F.normalize(query, dim=-1, eps=1e-6)
        scores = torch.einsum("bld,bnd->bln", query, vectors).masked_fill(negative[:, None] == target[:, :, None], -5e4)
        scores, query, target = scores[valid], query[valid], target[valid]
    else:
        query, target = F.normalize(query[valid], dim=-1, eps=1e-6), target[valid]
        negative = torch.randint(1, c["items"] + 1, (len(target), c["negatives"]))
        vectors = F.normalize(items(negative), dim=-1, eps=1e-6)
        scores = torch.einsum("td,tnd->tn", query, vectors).masked_fill(negative == target[:, None], -5e4)
    positive = (query * F.normalize(items(target), dim=-1, eps=1e-6)).sum(-1, keepdim=True)
    logits = torch.cat([positive, scores], dim=1) / c["temperature"]
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long))


class Peer:
    """The model, its optimizer and its batches; one per process."""

    def __init__(self, path: str):
        data = dict(np.load(path))
        self.c = json.loads(str(data.pop("setup")))
        torch.set_num_threads(self.c["threads"])
        torch.manual_seed(0)
        self.item_id = torch.from_numpy(data.pop("item_id")).long()
        self.target = torch.from_numpy(data.pop("target")).long()
        self.model = Encoder(self.c)
        self.model.load_state_dict({name: torch.from_numpy(value) for name, value in data.items()})
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0)
        self.encoders = {False: self.model, True: torch.compile(self.model)}
        self.step = 0

    def hidden(self, out: str) -> dict:
        self.model.eval()
        with torch.no_grad():
            np.save(out, self.model(self.item_id[0]).numpy())
        self.model.train()
        return {}

    def run(self, compiled: bool, shared: bool, seconds: float) -> dict:
        events = steps = 0
        cpu, begin = time.process_time(), time.perf_counter()
        while steps == 0 or time.perf_counter() - begin < seconds:
            item_id, target = (x[self.step % len(x)] for x in (self.item_id, self.target))
            self.optimizer.zero_grad(set_to_none=True)
            loss = sampled_softmax(self.encoders[compiled](item_id), target, self.model.items, self.c, shared)
            loss.backward()
            self.optimizer.step()
            events += int((target > 0).sum())
            steps, self.step = steps + 1, self.step + 1
        wall = time.perf_counter() - begin
        return {"events": events, "steps": steps, "wall": wall, "cpu": time.process_time() - cpu, "loss": loss.item()}


def main() -> None:
    peer = Peer(sys.argv[1])
    print(json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads()}), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        action = command.pop("do")
        print(json.dumps({"hidden": peer.hidden, "run": peer.run}[action](**command)), flush=True)


if __name__ == "__main__":
    main()
