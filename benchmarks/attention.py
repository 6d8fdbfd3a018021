"""Attention of ours, of JAX and of PyTorch on the same masks: forward, and forward with backward.

    python benchmarks/attention.py [--lengths 2048] [--rounds 7] [--width 64] [--heads 16] [--peers NAME ...]
                                   [--plot FILE.png] [--torch-python PATH] [--quick]

One row; float32 on a CPU, bfloat16 elsewhere. Every implementation that runs here, plain jnp over the whole matrix,
jax.nn (cuDNN where it can), and PyTorch's FlexAttention and SDPA where an interpreter has it. Peers take turns; a table
in Markdown of medians for each mask: milliseconds, how many times the fastest of ours, and the share of the machine's
measured peak (a product of square matrices) that the unmasked area's FLOPs are. "-": it cannot, and why is said below;
what needs more memory than there is, is not tried.
"""

import argparse
import functools
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from lab import runtime

runtime.tune_allocator()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from lab import kernels  # noqa: E402
from lab.coordinates import Coordinates  # noqa: E402
from lab.errors import UserError  # noqa: E402
from lab.kernels import rules  # noqa: E402

PASSES = ("forward", "both")
TORCH = ("flex", "sdpa")


def branches(prompt: int, count: int, length: int, groups: int = 1) -> Coordinates:
    """Groups of a prompt and `count` branches, in the order of a packer: segment, time, branch."""
    time_ = np.concatenate([np.arange(prompt), np.repeat(prompt + np.arange(length), count)])
    branch = np.concatenate([np.zeros(prompt, int), np.tile(1 + np.arange(count), length)])
    n = len(time_)
    fields = np.repeat(np.arange(groups), n), *(np.tile(x, groups) for x in (branch, time_, np.arange(n)))
    return Coordinates(*(np.asarray(x, np.int32)[None] for x in fields))


def masks(T: int) -> dict[str, tuple[str, Coordinates]]:
    """Name -> (rule, coordinates of about T tokens): at 4096, those that are published."""
    few, many, four = (T // 4, 8, 3 * T // 32), (T // 8, 32, 7 * T // 256), (T // 8, 4, T // 32, 4)
    alone, width = Coordinates.single(1, T), min(1024, T // 4)
    return {
        "causal": ("causal", alone),
        f"own_branch {few}": ("own_branch", branches(*few)),
        f"own_branch {many}": ("own_branch", branches(*many)),
        f"all_branches {few}": ("all_branches", branches(*few)),
        f"own_branch, 4 groups of {four[:3]}": ("own_branch", branches(*four)),
        f"causal & window({width})": (f"causal & window({width})", alone),
    }


def dense(q, k, v, at, rule):
    s = jnp.einsum("bthk,bshk->bhts", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    s = jnp.where(rules.visible(rule, at, at)[:, None], s, -1e30)
    return jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(s, axis=-1).astype(v.dtype), v)


def library(q, k, v, at, rule):
    seen, cudnn = rules.visible(rule, at, at)[:, None], "cudnn" if jax.default_backend() == "gpu" else None
    return jax.nn.dot_product_attention(q, k, v, mask=seen, implementation=cudnn)


def ours(name, q, k, v, at, rule):
    return kernels.attend(q, k, v, at, at, rule, implementation=name)


def runs_here(name: str) -> bool:
    try:
        kernels.resolve(name)
    except UserError:
        return False
    return True


OURS = [name for name in kernels.IMPLEMENTATIONS if name != "reference" and runs_here(name)]
JAX = {"jnp": dense, "jax.nn": library} | {name: functools.partial(ours, name) for name in OURS}
DTYPE = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16


def memory() -> float:
    """Bytes that a program may take."""
    stats = jax.devices()[0].memory_stats() or {}
    return 0.8 * stats.get("bytes_limit", os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def of_jax(
    function, rule: rules.Rule, at: Coordinates, heads: int, width: int, both: bool
) -> tuple[Callable[[], float], int]:
    """A function that makes one run and gives its seconds; and its temporary bytes. MemoryError rather than run out."""
    rng = np.random.default_rng(0)
    q, k, v, weight = (jnp.asarray(rng.normal(size=(*at.shape, heads, width)), DTYPE) for _ in range(4))
    at = jax.tree.map(jnp.asarray, at)

    def forward(q, k, v, at, _):
        return function(q, k, v, at, rule)

    def forward_and_backward(q, k, v, at, weight):
        return jax.vjp(lambda q, k, v: forward(q, k, v, at, None), q, k, v)[1](weight)

    run = jax.jit(forward_and_backward if both else forward).lower(q, k, v, at, weight).compile()
    needed = run.memory_analysis().temp_size_in_bytes
    if needed > memory():
        raise MemoryError(f"needs {needed / 2**30:.0f} GiB")

    def once() -> float:
        start = time.perf_counter()
        jax.block_until_ready(run(q, k, v, at, weight))
        return time.perf_counter() - start

    once()
    return once, needed


class Torch:
    """The process that runs PyTorch's peers."""

    def __init__(self, python: str):
        script = str(pathlib.Path(__file__).with_name("torch_attention.py"))
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self._process = subprocess.Popen([python, script], **pipes)

    def run(self, request: dict) -> float:
        """Seconds. Raises RuntimeError with what PyTorch said."""
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline() or '{"error": "its process has ended"}')
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["seconds"]


def has_torch(python: str) -> bool:
    return not subprocess.run([python, "-c", "import torch"], capture_output=True).returncode


def settle() -> None:
    """Until this process does nothing: memory of the run before is given back after its result is there."""
    before = -1.0
    while time.process_time() - before > 1e-3:
        before = time.process_time()
        time.sleep(0.02)


def measure(peers: dict[tuple, Callable[[], float]], rounds: int) -> tuple[dict, dict[str, str]]:
    """({(peer, pass): median seconds}, {peer: why it cannot}); peers take turns."""
    times, reasons = {key: [] for key in peers}, {}
    for _ in range(rounds):
        for key, once in peers.items():
            if key in times:
                settle()
                try:
                    times[key].append(once())
                except Exception as error:
                    reasons[" ".join(key)] = str(error).splitlines()[0][:160]
                    del times[key]
    return {key: statistics.median(found) for key, found in times.items()}, reasons


def peak() -> float:
    """FLOPs a second of a product of square matrices, the best of a few."""
    n = 2048 if jax.default_backend() == "cpu" else 8192
    a = jnp.ones((n, n), DTYPE)
    run = jax.jit(lambda a: a @ a)
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        run(a).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / min(seconds[1:])


def table(name: str, text: str, at: Coordinates, flags, torch: Torch | None, most: float) -> dict[tuple, float]:
    """Prints the table of a mask; returns the seconds {(peer, pass): ..}."""
    rule, T = rules.parse(text), at.shape[1]
    order, share = kernels.arrange(at, [rule])
    at = at.map(lambda x: np.take_along_axis(x, order, axis=1))
    pairs = rules.mean_visible_keys(rule, at) * T
    peers, reasons = {}, {}
    with tempfile.NamedTemporaryFile(suffix=".npz") as file:
        np.savez(file, **{field: getattr(at, field)[0] for field in ("segment", "branch", "time", "index")})
        file.flush()
        for which in PASSES:
            for peer in flags.peers:
                if peer in TORCH:
                    request = dict(rule=text, coordinates=file.name, heads=flags.heads, width=flags.width, peer=peer)
                    peers[peer, which] = functools.partial(torch.run, request | {"pass": which})
                    continue
                try:
                    peers[peer, which], _ = of_jax(JAX[peer], rule, at, flags.heads, flags.width, which == "both")
                except Exception as error:
                    reasons[f"{peer} {which}"] = str(error).splitlines()[0][:160]
        seconds, failed = measure(peers, flags.rounds)
    of_ours = lambda which: [found for (peer, each), found in seconds.items() if each == which and peer in OURS]  # noqa: E731
    best = {which: min(of_ours(which), default=np.nan) for which in PASSES}
    print(f"\n{name}: T {T}, {pairs / T**2:.1%} of the pairs, {share:.1%} of the tiles\n")
    print("| peer | forward ms | x ours | of peak | both ms | x ours | of peak |\n| --- " + "| --: " * 6 + "|")
    for peer in flags.peers:
        cells = []
        for which, products in zip(PASSES, (2, 7), strict=True):  # of q k^T and p v; and five more
            found, flops = seconds.get((peer, which)), 2 * products * pairs * flags.heads * flags.width
            cells += (
                [f"{1e3 * found:.1f}", f"{found / best[which]:.2f}", f"{flops / found / most:.0%}"] if found else "---"
            )
        print(f"| {peer} | {' | '.join(cells)} |", flush=True)
    for which, why in (reasons | failed).items():
        print(f"\n{which}: {why}")
    return seconds


def plot(path: str, found: dict[str, dict[tuple, float]]) -> None:
    """Bars for each pass: how many times the fastest of ours each peer takes."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    figure, panels = plt.subplots(1, 2, figsize=(11, 0.55 * len(found) + 1.2), sharey=True, layout="constrained")
    places = np.arange(len(found))
    names = sorted({peer for row in found.values() for peer, _ in row}, key=[*JAX, *TORCH].index)
    for axes, which, title in zip(panels, PASSES, ("forward", "forward and backward"), strict=True):
        for i, peer in enumerate(names):
            ratios = [
                row.get((peer, which), np.nan)
                / min((row[name, which] for name in OURS if (name, which) in row), default=np.nan)
                for row in found.values()
            ]
            height = 0.8 / len(names)
            axes.barh(places + height * i, np.array(ratios) - 1, height, left=1, label=peer, align="edge")
        axes.set(title=title, xscale="log", xlabel="time over that of the fastest of ours")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
        axes.axvline(1, color="black", linewidth=0.8)
    panels[0].set(yticks=places + 0.4, yticklabels=[*found])
    panels[0].invert_yaxis()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(names), frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048], help="tokens of the row")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--width", type=int, default=64, help="of queries, keys and values")
    parser.add_argument(
        "--peers", nargs="+", choices=[*JAX, *TORCH], default=[*JAX, *TORCH], help="one of ours among them"
    )
    parser.add_argument("--plot", help="where to draw the ratios")
    parser.add_argument("--torch-python", default=sys.executable, help="an interpreter that has PyTorch")
    parser.add_argument("--quick", action="store_true", help="256 tokens and two rounds: does everything run?")
    flags = parser.parse_args()
    if not {*flags.peers} & {*OURS}:
        parser.error(f"--peers {' '.join(flags.peers)}: have one of ours among them: {', '.join(OURS)}")
    if not shutil.which(flags.torch_python):
        parser.error(f"--torch-python {flags.torch_python}: there is no such interpreter")
    if flags.quick:
        flags.lengths, flags.rounds = [256], 2
    most, found = peak(), {}  # before PyTorch's process begins, and takes its share
    torch = Torch(flags.torch_python) if has_torch(flags.torch_python) else None
    flags.peers = [peer for peer in flags.peers if torch or peer not in TORCH]
    print(f"{jax.devices()[0].device_kind}, {jnp.dtype(DTYPE).name}, peak {most / 1e12:.2f} TFLOP/s")
    print(f"{flags.heads} heads of {flags.width}" + ("" if torch else "; no PyTorch here"))
    for T in flags.lengths:
        for name, (text, at) in masks(T).items():
            found[f"{name}, T {T}"] = table(name, text, at, flags, torch, most)
            if flags.plot:  # now: long rows take their time
                plot(flags.plot, found)


if __name__ == "__main__":
    main()
