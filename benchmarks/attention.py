"""Forward and backward of tiled attention against dense attention in plain jnp and in jax.nn, float32.

    python benchmarks/attention.py [--rounds 7] [--length 2048]

H 16, D 64, one row. Printed for each mask: medians of runs that take turns, and how many times faster than dense.
"""

import argparse
import pathlib
import statistics
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from lab import runtime

runtime.tune_allocator()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from lab.coordinates import Coordinates  # noqa: E402
from lab.kernels import attend, rules  # noqa: E402

HEADS, WIDTH = 16, 64


def branches(prompt: int, count: int, length: int, interleaved: bool) -> Coordinates:
    """A prompt, then `count` branches: one after the other, or column by column."""
    branch, offset = (x.reshape(-1) for x in np.indices((count, length)))
    order = np.lexsort((branch, offset)) if interleaved else np.arange(count * length)
    branch = np.concatenate([np.zeros(prompt, int), branch[order] + 1])
    time_ = np.concatenate([np.arange(prompt), prompt + offset[order]])
    rows = [np.asarray(x, np.int32)[None] for x in (0 * branch, branch, time_, np.arange(len(branch)))]
    return Coordinates(*rows)


def masks(T: int) -> dict[str, tuple[rules.Rule, Coordinates]]:
    """Name -> (rule, coordinates of T tokens)."""
    prompt = T // 4
    split = branches(prompt, 6, (T - prompt) // 6, interleaved=False)
    mixed = branches(prompt, 6, (T - prompt) // 6, interleaved=True)
    return {
        f"own_branch (prompt {prompt}, 6 x {(T - prompt) // 6})": (rules.own_branch, split),
        "all_branches, same texts": (rules.all_branches, mixed),
        "causal": (rules.causal, Coordinates.single(1, T)),
        "causal & window(256)": (rules.causal & rules.window(256), Coordinates.single(1, T)),
    }


def dense(q, k, v, coordinates, rule):
    s = jnp.einsum("bthk,bshk->bhts", q, k) * WIDTH**-0.5
    s = jnp.where(rules.visible(rule, coordinates, coordinates)[:, None], s, -1e30)
    return jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(s, axis=-1), v)


def library(q, k, v, coordinates, rule):
    seen = rules.visible(rule, coordinates, coordinates)[:, None]
    return jax.nn.dot_product_attention(q, k, v, mask=seen)


def tiled(q, k, v, coordinates, rule):
    return attend(q, k, v, coordinates, coordinates, rule, implementation="tiled")


def measure(rule, coordinates, rounds: int) -> dict[str, float]:
    """Median seconds of a forward and backward pass."""
    T = coordinates.shape[1]
    rng = np.random.default_rng(0)
    q, k, v, weight = (jnp.asarray(rng.normal(size=(1, T, HEADS, WIDTH)), jnp.float32) for _ in range(4))
    passes = {}
    for function in (dense, library, tiled):
        loss = lambda q, k, v, f=function: jnp.vdot(f(q, k, v, coordinates, rule), weight)  # noqa: E731
        passes[function.__name__] = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
    times = {name: [] for name in passes}
    for turn in range(rounds + 1):
        for name, run in passes.items():
            start = time.perf_counter()
            jax.block_until_ready(run(q, k, v))
            if turn:  # the first compiles
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--length", type=int, default=2048, help="tokens")
    arguments = parser.parse_args()
    print(f"{'mask':42} {'dense ms':>9} {'jax.nn ms':>10} {'tiled ms':>9} {'times faster':>13}")
    for name, (rule, coordinates) in masks(arguments.length).items():
        t = measure(rule, coordinates, arguments.rounds)
        shown = (1e3 * t[peer] for peer in ("dense", "library", "tiled"))
        print("{:42} {:9.0f} {:10.0f} {:9.0f} {:13.1f}x".format(name, *shown, t["dense"] / t["tiled"]), flush=True)


if __name__ == "__main__":
    main()
