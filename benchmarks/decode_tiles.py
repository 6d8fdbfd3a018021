"""What attention of one step of decoding costs on a CPU, by how its keys lie and how many it takes at once.

    python benchmarks/decode_tiles.py [--keys 8192] [--layers 4] [--heads 8] [--dim 32] [--rounds 15] [--quick]

Queries [G, R, K] of G groups read keys and values of every layer, one layer after the other, in float32: the loop of
lab.kernels.tiled without its masks. tokens: keys lie as [S, G, K], so that each tile is transposed for its products.
pages: as [S / tile, G, tile, K], which they take as it is. diagonal: [S, G, K], and one product for all groups, with
queries that are zero outside of their own. whole: no loop, one product with all keys, as [G, S, K]. ms: median and
least of calls, and those of all cores together in one. Then what each operation of the loop over tiles of 64 takes,
from JAX's profiler: microseconds at each time, and milliseconds of a call.
"""

import argparse
import collections
import pathlib
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def loop(q_GRK, keys, values, scores, weighed):
    """Softmax attention over tiles; keys and values [tiles, ...]."""

    def tile(j, carry):
        o_GRK, top_GR, sum_GR = carry
        k, v = (lax.dynamic_index_in_dim(x, j, 0, keepdims=False) for x in (keys, values))
        s_GRk = scores(q_GRK, k)
        new_GR = jnp.maximum(top_GR, s_GRk.max(-1))
        p_GRk, shrink_GR = jnp.exp(s_GRk - new_GR[..., None]), jnp.exp(top_GR - new_GR)
        return o_GRK * shrink_GR[..., None] + weighed(p_GRk, v), new_GR, sum_GR * shrink_GR + p_GRk.sum(-1)

    G, R, _ = q_GRK.shape
    empty = jnp.zeros(q_GRK.shape), jnp.full((G, R), -1e30), jnp.zeros((G, R))
    o_GRK, _, sum_GR = lax.fori_loop(0, len(keys), tile, empty)
    return o_GRK / sum_GR[..., None]


def tokens(q_GRK, k_SGK, v_SGK, tile: int):
    keys, values = (x.reshape(-1, tile, *x.shape[1:]) for x in (k_SGK, v_SGK))
    return loop(
        q_GRK, keys, values,
        lambda q, k: jnp.einsum("grd,gcd->grc", q, k.swapaxes(0, 1)),
        lambda p, v: jnp.einsum("grc,gcd->grd", p, v.swapaxes(0, 1)),
    )  # fmt: skip


def pages(q_GRK, k_SGK, v_SGK, tile: int):
    """The same numbers, taken to lie otherwise."""
    _, G, K = k_SGK.shape
    keys, values = (x.reshape(-1, G, tile, K) for x in (k_SGK, v_SGK))
    scores = lambda q, k: jnp.einsum("grd,gcd->grc", q, k)  # noqa: E731
    return loop(q_GRK, keys, values, scores, lambda p, v: jnp.einsum("grc,gcd->grd", p, v))


def diagonal(q_GRK, k_SGK, v_SGK, tile: int):
    G, R, K = q_GRK.shape
    keys, values = (x.reshape(-1, tile, G * K) for x in (k_SGK, v_SGK))

    def scores(q_GRK, k):
        own = jnp.einsum("grk,gh->grhk", q_GRK, jnp.eye(G)).reshape(G * R, G * K)
        return (own @ k.T).reshape(G, R, tile)

    def weighed(p_GRk, v):
        every = (p_GRk.reshape(G * R, tile) @ v).reshape(G, R, G, K)
        return jnp.stack([every[g, :, g] for g in range(G)])

    return loop(q_GRK, keys, values, scores, weighed)


def whole(q_GRK, k_SGK, v_SGK, tile: int):
    k_GSK, v_GSK = (x.reshape(x.shape[1], -1, x.shape[2]) for x in (k_SGK, v_SGK))
    p_GRS = jax.nn.softmax(jnp.einsum("grd,gsd->grs", q_GRK, k_GSK), axis=-1)
    return jnp.einsum("grs,gsd->grd", p_GRS, v_GSK)


WAYS = {
    "tokens, 64": (tokens, 64), "tokens, 256": (tokens, 256), "diagonal, 64": (diagonal, 64),
    "diagonal, 256": (diagonal, 256), "pages, 64": (pages, 64), "pages, 256": (pages, 256), "whole": (whole, 0),
}  # fmt: skip


def timed(run, arrays, rounds: int) -> tuple[float, float, float]:
    """ms of a call: median, least, and of the process."""
    jax.block_until_ready(run(*arrays))
    seconds, before = [], time.process_time()
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(run(*arrays))
        seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds), 1e3 * min(seconds), 1e3 * (time.process_time() - before) / rounds


def operations(run, arrays, calls: int = 5) -> list[tuple[str, float, float]]:
    """(name, microseconds at each time, milliseconds of a call) of the longest within loops."""
    with tempfile.TemporaryDirectory() as place:
        with jax.profiler.trace(place):
            for _ in range(calls):
                jax.block_until_ready(run(*arrays))
        (path,) = pathlib.Path(place).rglob("*.xplane.pb")
        found = collections.defaultdict(list)
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            for event in (event for line in plane.lines for event in line.events):
                if event.name.partition(".")[0].replace("-", "_").endswith(("fusion", "dot")):
                    found[event.name].append(event.duration_ns)
    each = {name: statistics.median(ns) for name, ns in found.items()}
    rows = [(name, ns / 1e3, ns * len(found[name]) / calls / 1e6) for name, ns in each.items()]
    return sorted(rows, key=lambda row: -row[2])[:8]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in dict(keys=8192, layers=4, heads=8, dim=32, rounds=15).items():
        parser.add_argument(f"--{name}", default=default, type=int)
    parser.add_argument("--quick", action="store_true", help="few keys, few rounds: does everything run?")
    flags = parser.parse_args()
    if flags.quick:
        flags.keys, flags.rounds = 1024, 2
    rng, H = np.random.default_rng(0), flags.heads
    drawn = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    print("| groups | queries of a group | way | median, ms | least | of both cores |", "| --: " * 6 + "|", sep="\n")
    for G, R in ((H, 1), (H // 4, 4), (H, 16)):
        q, *kv = drawn(G, R, flags.dim), *([drawn(flags.keys, G, flags.dim) for _ in range(flags.layers)] for _ in "kv")
        for name, (way, tile) in WAYS.items():

            @jax.jit
            def run(q, keys, values, way=way, tile=tile):
                for k, v in zip(keys, values, strict=True):
                    q = q + 1e-3 * way(q, k, v, tile)
                return q

            numbers = " | ".join(f"{x:.2f}" for x in timed(run, (q, *kv), flags.rounds))
            print(f"| {G} | {R} | {name} | {numbers} |", flush=True)
            if name == "tokens, 64":
                profiled = operations(run, (q, *kv))
        for name, us, ms in profiled:
            print(f"  {name}: {us:.2f} us each, {ms:.2f} ms", flush=True)


if __name__ == "__main__":
    main()
