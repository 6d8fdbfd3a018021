"""One training step of ours against the same model in PyTorch (torch.compile, SDPA with a dense boolean mask), fp32.

    python benchmarks/train_step.py [--torch-python PATH] [--rounds 7] [--steps 5]

Both peers run as processes of their own, take turns on the same cores, and do the same work: model of width 128, 4
layers, 4 query heads over 1 group, SwiGLU 384, vocabulary 258, AdamW with clipping, on packs of one group each in which
branches of 64 tokens are interleaved by time under `all_branches`. Printed: medians, and ours / theirs.

PyTorch is no requirement of the lab: install it beside, or name another interpreter that has it.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import time

import numpy as np
import stepping

PACKS = {"4x768": (4, 768), "2x2048": (2, 2048), "1x4096": (1, 4096)}
DIM, LAYERS, HEADS, GROUPS, FFN, VOCABULARY, BRANCH = 128, 4, 4, 1, 384, 258, 64
ROOT = pathlib.Path(__file__).resolve().parents[1]


def pack(rows: int, length: int) -> dict[str, np.ndarray]:
    """Random tokens; column t of every branch, then column t + 1, ..."""
    branches = length // BRANCH
    time_, branch = np.divmod(np.arange(length), branches)
    full = lambda x: np.broadcast_to(np.asarray(x, np.int32), (rows, length)).copy()  # noqa: E731
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (rows, length)).astype(np.int32)
    labels = np.where(full(time_) < BRANCH - 1, np.roll(tokens, -branches, axis=1), -1)
    return {"tokens": tokens, "labels": labels.astype(np.int32), "segment": full(0), "branch": full(branch + 1),
            "time": full(time_), "index": full(np.arange(length))}  # fmt: skip


def ours(rows: int, length: int):
    """A function that runs one step and waits for it."""
    sys.path.insert(0, str(ROOT))
    from lab import runtime

    runtime.tune_allocator()
    import jax

    from lab import config as lab_config
    from lab.coordinates import Coordinates
    from lab.data import Batch
    from lab.model import mesh as lab_mesh
    from lab.train import compiled, optimizer, step

    config = lab_config.branches(lab_config.base())
    config.model.update(dict(dim=DIM, layers=LAYERS))
    config.model.mixer.update(dict(heads=HEADS, kv_heads=GROUPS, head_dim=DIM // HEADS))
    config.model.feedforward.width = FFN
    data = np.gcd(rows, runtime.cores())
    config.run.mesh.update(dict(data=int(data), context=int(runtime.cores() // data)))
    jax.config.update("jax_num_cpu_devices", runtime.cores())
    mesh = lab_mesh.make(config.run.mesh)
    x = pack(rows, length)
    coordinates = Coordinates(x["segment"], x["branch"], x["time"], x["index"])
    batch = lab_mesh.place(Batch(tokens=x["tokens"], labels=x["labels"], coordinates=coordinates), mesh)
    program = step.Program.of(config)
    state = compiled.initial_state(config, program, mesh)
    numbers = optimizer.numbers_by_step(config.train)(0)
    run = compiled.train_step(state, numbers, batch, program, mesh)

    return stepping.stepper(run, state, numbers, batch)


def theirs(rows: int, length: int):
    """The same in PyTorch."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    torch.manual_seed(0)
    K = DIM // HEADS

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            linear = lambda i, o: nn.Linear(i, o, bias=False)  # noqa: E731
            self.n1, self.n2 = nn.RMSNorm(DIM, eps=1e-5), nn.RMSNorm(DIM, eps=1e-5)
            self.q, self.k, self.v = linear(DIM, DIM), linear(DIM, GROUPS * K), linear(DIM, GROUPS * K)
            self.o = linear(DIM, DIM)
            self.gate, self.up, self.down = linear(DIM, FFN), linear(DIM, FFN), linear(FFN, DIM)

        def forward(self, x, cos, sin, mask):
            B, T, _ = x.shape
            y = self.n1(x)
            heads = lambda z, n: z.view(B, T, n, K).transpose(1, 2)  # noqa: E731

            def rotate(z):
                a, b = z.chunk(2, -1)
                return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

            q, k, v = rotate(heads(self.q(y), HEADS)), rotate(heads(self.k(y), GROUPS)), heads(self.v(y), GROUPS)
            k, v = k.expand(B, HEADS, T, K), v.expand(B, HEADS, T, K)
            o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            x = x + self.o(o.transpose(1, 2).reshape(B, T, DIM))
            y = self.n2(x)
            return x + self.down(F.silu(self.gate(y)) * self.up(y))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(VOCABULARY, DIM)
            self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
            self.norm = nn.RMSNorm(DIM, eps=1e-5)

        def forward(self, tokens, labels, cos, sin, mask):
            x = self.embedding(tokens)
            for block in self.blocks:
                x = block(x, cos, sin, mask)
            logits = self.norm(x) @ self.embedding.weight.T
            return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-1)

    x = {name: torch.from_numpy(value).long() for name, value in pack(rows, length).items()}
    inverse = 1e6 ** (-2 * torch.arange(K // 2) / K)
    branch, time_ = x["branch"][..., None] * 128, x["time"][..., None]
    angle = torch.where(torch.arange(K // 2) % 2 == 0, branch, time_) * inverse
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    t, i = x["time"], x["index"]
    mask = ((t[:, None, :] < t[:, :, None]) | (i[:, None, :] == i[:, :, None]))[:, None]
    model = Model()
    compiled = torch.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.01, fused=True)

    def one():
        optimizer.zero_grad(set_to_none=True)
        loss = compiled(x["tokens"], x["labels"], cos, sin, mask)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss.item()

    return one


def serve(peer: str, packs: str) -> None:
    """A peer's process: warms up, then times as many steps as each line asks for."""
    one = {"ours": ours, "theirs": theirs}[peer](*PACKS[packs])
    for _ in range(3):
        one()
    print("ready", flush=True)
    for line in sys.stdin:
        times = []
        for _ in range(int(line)):
            start = time.perf_counter()
            one()
            times.append(time.perf_counter() - start)
        print(json.dumps(times), flush=True)


def measure(packs: str, rounds: int, steps: int, interpreters: dict[str, str]) -> dict[str, float]:
    """Median seconds of a step for each peer, the peers taking turns."""
    peers = {}
    for peer, interpreter in interpreters.items():
        command = [interpreter, __file__, "--peer", peer, "--packs", packs]
        peers[peer] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if peers[peer].stdout.readline().strip() != "ready":
            sys.exit(f"{peer}: did not start (is its package installed for {interpreter}?)")
    times = {peer: [] for peer in peers}
    for _ in range(rounds):
        for peer, process in peers.items():
            process.stdin.write(f"{steps}\n")
            process.stdin.flush()
            times[peer] += json.loads(process.stdout.readline())
    for process in peers.values():
        process.stdin.close()
        process.wait()
    return {peer: statistics.median(values) for peer, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch-python", default=sys.executable, help="an interpreter that has torch")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each peer")
    parser.add_argument("--steps", type=int, default=5, help="steps of a turn")
    parser.add_argument("--packs", choices=PACKS, help="only this shape")
    parser.add_argument("--peer", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peer:
        return serve(arguments.peer, arguments.packs)
    print(f"{'packs':>8} {'ours ms':>9} {'theirs ms':>10} {'ours / theirs':>14}")
    for packs in [arguments.packs] if arguments.packs else PACKS:
        interpreters = {"ours": sys.executable, "theirs": arguments.torch_python}
        medians = measure(packs, arguments.rounds, arguments.steps, interpreters)
        a, b = medians["ours"] * 1e3, medians["theirs"] * 1e3
        print(f"{packs:>8} {a:9.1f} {b:10.1f} {a / b:14.2f}", flush=True)


if __name__ == "__main__":
    main()
