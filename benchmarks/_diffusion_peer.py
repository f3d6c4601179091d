"""DreamRec (denoiser mlp1) in plain PyTorch, trained and sampled: the other side of benchmarks.diffusion.

    TORCH_PYTHON benchmarks/_diffusion_peer.py SETUP.npz

Needs torch and numpy only, so it runs in an environment of its own. One row per target, its history left-aligned and
right-padded with the id behind the last item; AdamW over everything; the formulas of the paper (arXiv 2310.20453) and
of its sampler, one line of code each. Three samplers give the same vectors from the same noise: "plain" is the loop as
the paper states it, two passes of the whole network per step for the whole batch; "compiled" is its torch.compile;
"tuned" is what can be taken out of the loop by hand for this one network: the times of all steps and the shares of h
and of the null are computed once, and one product of D x D is left per step.

SETUP.npz holds `setup` (JSON: items, dim, length, steps, guidance, dropout, drop, learning_rate, threads), histories
[batches, B, S], lengths [batches, B], targets [batches, B], and the parameters to start from by their names here.

The process reads one JSON command a line from stdin and answers with one JSON line on stdout: {"do": "compare", "x",
"out": PATHS} reads x_t and t, and writes h, x0 and the vectors that DDIM ends with; {"do": "train", "compiled",
"seconds"} and {"do": "sample", "variant", "sampler", "steps", "users", "seconds"} run for about that long.
"""

import json
import math
import sys
import time

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

MASKED = -(2.0**32) + 1


class Encoder(nn.Module):
    """One block of attention over the history; the state at its last event."""

    def __init__(self, dim: int, length: int, rate: float):
        super().__init__()
        self.positions = nn.Parameter(torch.empty(length, dim))
        self.norm_queries, self.norm_ffn, self.norm_out, self.norm = (nn.LayerNorm(dim) for _ in range(4))
        self.query, self.key, self.value, self.ffn_in, self.ffn_out = (nn.Linear(dim, dim) for _ in range(5))
        self.dropout = nn.Dropout(rate)
        self.register_buffer("later", torch.ones(length, length).triu(1).bool())

    def forward(self, vectors: torch.Tensor, real: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        s = self.dropout(vectors + self.positions) * real[..., None]
        asked = self.norm_queries(s)
        q, k, v = self.query(asked), self.key(s), self.value(s)
        logits = q @ k.transpose(1, 2) / math.sqrt(s.shape[-1])
        logits = logits.masked_fill((s.sum(-1) == 0)[:, None], MASKED).masked_fill(self.later, MASKED)
        a = self.dropout(logits.softmax(-1)) @ v + asked
        y = self.norm_ffn(a)
        f = self.norm_out(y + self.dropout(self.ffn_out(F.relu(self.ffn_in(y))))) * real[..., None]
        return self.norm(f)[torch.arange(len(f)), lengths - 1]


class DreamRec(nn.Module):
    """Item vectors, encoder, time embedding, null condition and the linear denoiser of [x ; h ; t]."""

    def __init__(self, items: int, dim: int, length: int, rate: float):
        super().__init__()
        self.padding = items
        self.items, self.null = nn.Embedding(items + 1, dim), nn.Embedding(1, dim)
        self.encoder = Encoder(dim, length, rate)
        self.time_first, self.time_last = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)
        self.out = nn.Linear(3 * dim, dim)

    def encode(self, history: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        return self.encoder(self.items(history), (history != self.padding).float(), lengths)

    def time(self, t: torch.Tensor) -> torch.Tensor:
        half = self.null.weight.shape[1] // 2
        angle = t[:, None].float() * torch.exp(-math.log(1e4) / (half - 1) * torch.arange(half))
        return self.time_last(F.gelu(self.time_first(torch.cat([angle.sin(), angle.cos()], dim=1))))

    def forward(self, x: torch.Tensor, h: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.out(torch.cat([x, h, self.time(t)], dim=1))

    def guided(self, x: torch.Tensor, h: torch.Tensor, t: torch.Tensor, weight: float) -> torch.Tensor:
        free = self(x, self.null.weight.expand(len(x), -1), t)
        return (1 + weight) * self(x, h, t) - weight * free


def signal(steps: int) -> np.ndarray:
    """abar of the schedule "exp", behind 1 at the data: float64 [T + 1]."""
    x = np.linspace(1, 2 * steps + 1, steps)
    return np.append(1.0, np.exp(-np.cumsum(0.1 / steps + 0.5 * x * 9.9 / steps**2)))


def visits(T: int, sampler: str, steps: int) -> tuple[np.ndarray, ...]:
    """Times from noise to data, and of every one how much x0, x and noise make up the next x."""
    grid = np.round(np.linspace(T - 1, -1, steps + 1)).astype(int) + 1
    now, then = signal(T)[grid[:-1]], signal(T)[grid[1:]]
    noise = np.sqrt((1 - then) / (1 - now) * (1 - now / then)) * (sampler == "ddpm")
    keep = np.sqrt(1 - then - noise**2) / np.sqrt(1 - now)
    return grid[:-1] - 1, np.sqrt(then) - np.sqrt(now) * keep, keep, noise


class Peer:
    """The model, its optimizer and its batches; one per process."""

    def __init__(self, path: str):
        data = dict(np.load(path))
        self.c = json.loads(str(data.pop("setup")))
        torch.set_num_threads(self.c["threads"])
        torch.manual_seed(0)
        self.history, self.lengths, self.target = (
            torch.from_numpy(data.pop(name)).long() for name in ("history", "lengths", "target")
        )
        self.model = DreamRec(self.c["items"], self.c["dim"], self.c["length"], self.c["dropout"])
        loaded = {name: torch.from_numpy(value) for name, value in data.items()}
        missing = self.model.load_state_dict(loaded, strict=False)
        assert not missing.unexpected_keys and missing.missing_keys == ["encoder.later"], missing
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.c["learning_rate"], weight_decay=0.0)
        abar = torch.from_numpy(signal(self.c["steps"])[1:])
        self.a, self.s = abar.sqrt().float(), (1 - abar).sqrt().float()
        self.losses = {False: self.loss, True: torch.compile(self.loss)}
        self.networks = {"plain": self.model.guided, "compiled": torch.compile(self.model.guided)}
        self.step = 0

    def loss(self, history: torch.Tensor, lengths: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        h = self.model.encode(history, lengths)
        h = torch.where(torch.rand(len(h), 1) < self.c["drop"], self.model.null.weight, h)
        x0 = self.model.items(target)
        t, noise = torch.randint(0, self.c["steps"], (len(h),)), torch.randn_like(x0)
        x = self.a[t][:, None] * x0 + self.s[t][:, None] * noise
        return F.mse_loss(self.model(x, h, t), x0)

    def train(self, compiled: bool, seconds: float) -> dict:
        self.model.train()
        count = steps = 0
        cpu, begin = time.process_time(), time.perf_counter()
        while steps == 0 or time.perf_counter() - begin < seconds:
            batch = [x[self.step % len(x)] for x in (self.history, self.lengths, self.target)]
            self.optimizer.zero_grad(set_to_none=True)
            loss = self.losses[compiled](*batch)
            loss.backward()
            self.optimizer.step()
            count, steps, self.step = count + len(batch[0]), steps + 1, self.step + 1
        wall = time.perf_counter() - begin
        return {"events": count, "steps": steps, "wall": wall, "cpu": time.process_time() - cpu, "loss": loss.item()}

    def one_by_one(self, h: torch.Tensor, x: torch.Tensor, plan: tuple[np.ndarray, ...], variant: str) -> torch.Tensor:
        network = self.networks[variant]
        times, *columns = plan
        clean, keep, noise = (torch.from_numpy(column).float() for column in columns)
        for i in range(len(times)):
            t = torch.full((len(h),), int(times[i]))
            x = clean[i] * network(x, h, t, self.c["guidance"]) + keep[i] * x
            if noise[i] > 0:
                x = x + noise[i] * torch.randn_like(x)
        return x

    def tuned(self, h: torch.Tensor, x: torch.Tensor, plan: tuple[np.ndarray, ...]) -> torch.Tensor:
        times, *columns = plan
        clean, keep, noise = (column.tolist() for column in columns)
        w, (of_x, of_h, of_t) = self.c["guidance"], self.model.out.weight.T.chunk(3)
        share = ((1 + w) * h - w * self.model.null.weight) @ of_h + self.model.out.bias
        moved = self.model.time(torch.from_numpy(times.copy())) @ of_t
        for i in range(len(times)):
            x0 = torch.addmm(share + moved[i], x, of_x)
            x = x0.mul_(clean[i]).add_(x, alpha=keep[i])
            if noise[i] > 0:
                x.add_(torch.randn_like(x), alpha=noise[i])
        return x

    @torch.no_grad()
    def generate(self, variant: str, history, lengths, plan, x: torch.Tensor | None = None) -> torch.Tensor:
        self.model.eval()
        h = self.model.encode(history, lengths)
        x = torch.randn_like(h) if x is None else x
        return self.tuned(h, x, plan) if variant == "tuned" else self.one_by_one(h, x, plan, variant)

    def sample(self, variant: str, sampler: str, steps: int, users: int, seconds: float) -> dict:
        history, lengths = (x.flatten(0, 1)[:users] for x in (self.history, self.lengths))
        count, plan = 0, visits(self.c["steps"], sampler, steps)
        cpu, begin = time.process_time(), time.perf_counter()
        while count == 0 or time.perf_counter() - begin < seconds:
            self.generate(variant, history, lengths, plan)
            count += users
        wall = time.perf_counter() - begin
        return {"events": count, "wall": wall, "cpu": time.process_time() - cpu}

    @torch.no_grad()
    def compare(self, x: str, out: str) -> dict:
        given = {name: torch.from_numpy(value) for name, value in np.load(x).items()}
        self.model.eval()
        history, lengths, plan = self.history[0], self.lengths[0], visits(self.c["steps"], "ddim", 50)
        h = self.model.encode(history, lengths)
        x0 = self.model.guided(given["x"], h, given["t"].long(), self.c["guidance"])
        ends = {v: self.generate(v, history, lengths, plan, given["x"]).numpy() for v in ("plain", "tuned")}
        np.savez(out, h=h.numpy(), x0=x0.numpy(), **ends)
        return {"parameters": sum(p.numel() for p in self.model.parameters())}


def main() -> None:
    peer = Peer(sys.argv[1])
    print(json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads()}), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        action = command.pop("do")
        print(json.dumps({"compare": peer.compare, "train": peer.train, "sample": peer.sample}[action](**command)))
        sys.stdout.flush()


if __name__ == "__main__":
    main()
