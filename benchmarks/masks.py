"""What full, windowed and sparse masks cost as rows grow: pairs, tiles, time and memory, and the exponent of each.

    python benchmarks/masks.py [--lengths 1024 2048 ...] [--rounds 5] [--heads 1] [--window 256] [--out FILE] [--quick]

One text in a row, float32 on a CPU, bfloat16 elsewhere; l is the multiple of 16 next to sqrt(T). Pairs: visible ones.
Tiles: pairs of the tiles that are computed, in the order that the packer gives. Time: medians of runs of `tiled` in
which masks take turns. Memory: temporary buffers of the program with backward, by its own account. Two tables in
Markdown: the numbers, and the exponents of T that a line through their logarithms has, with its standard error; what is
done is told on stderr. The pairs of strided(l) and fixed(l, 8), of the Sparse Transformer (arXiv 1904.10509), grow with
T^1.5.
"""

import argparse
import math
import pathlib
import sys
from typing import NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import attention  # first: it tunes the allocator before JAX is imported
import numpy as np

from lab import kernels
from lab.coordinates import Coordinates
from lab.kernels import rules
from lab.study.numbers import number, short

MEBIBYTE = 2**20
WIDTH = 64  # of a head
COLUMNS = ("pairs", "tiles", "forward ms", "with backward ms", "memory MiB")


class Measured(NamedTuple):
    """In the order of COLUMNS."""

    pairs: float
    tiles: float
    forward: float
    both: float
    memory: float


def masks(T: int, window: int) -> dict[str, str]:
    """Name -> rule."""
    stride = 16 * max(1, round(math.sqrt(T) / 16))
    return {
        "full": "causal",
        f"window({window})": f"causal & window({window})",
        "strided(l)": f"causal & strided({stride})",
        "fixed(l, 8)": f"causal & fixed({stride}, 8)",
    }


def measure(T: int, flags) -> dict[str, Measured]:
    """{mask: what it costs} of rows of T tokens."""
    runs, sizes = {}, {}
    for name, text in masks(T, flags.window).items():
        rule, alone = rules.parse(text), Coordinates.single(1, T)
        print(f"{T:,} tokens: {name}", file=sys.stderr, flush=True)
        order, share = kernels.arrange(alone, [rule], "tiled")
        at = alone.map(lambda x, order=order: np.take_along_axis(x, order, axis=1))
        needed = math.nan
        for both in (False, True) if flags.rounds else ():
            runs[name, attention.PASSES[both]], needed = attention.of_jax(
                attention.JAX["tiled"], rule, at, flags.heads, WIDTH, both
            )
        sides = (-(-T // side) * side for side in kernels.tile_sizes("tiled", T))
        sizes[name] = rules.mean_visible_keys(rule, alone) * T, share * math.prod(sides), needed / MEBIBYTE
    print(f"{T:,} tokens: {flags.rounds} turns of {len(runs)} programs", file=sys.stderr, flush=True)
    seconds, failed = attention.measure(runs, flags.rounds)
    if failed:
        raise RuntimeError(failed)
    return {
        name: Measured(pairs, tiles, *(1e3 * seconds.get((name, each), math.nan) for each in attention.PASSES), memory)
        for name, (pairs, tiles, memory) in sizes.items()
    }


def exponent(lengths: list[int], values: list[float]) -> str:
    """Of T, and its standard error where three lengths or more leave one."""
    if np.isnan(values).any():
        return "—"
    x, y = np.log(lengths), np.log(values)
    if len(lengths) < 3:
        return f"{np.polyfit(x, y, 1)[0]:.2f}"
    fitted, covariance = np.polyfit(x, y, 1, cov=True)
    return f"{fitted[0]:.2f} ± {math.sqrt(covariance[0, 0]):.2f}"


def head(*columns: str) -> str:
    left = len(columns) - len(COLUMNS)
    return f"\n| {' | '.join(columns)} |\n|{' --- |' * left}{' --: |' * len(COLUMNS)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2**n for n in range(10, 16)], help="tokens of a row")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each; 0: pairs and tiles alone")
    parser.add_argument("--heads", type=int, default=1)
    parser.add_argument("--window", type=int, default=256, help="time steps of the window")
    parser.add_argument("--out", type=pathlib.Path, help="a file for the tables, beside stdout")
    parser.add_argument("--quick", action="store_true", help="256 and 512 tokens, two rounds: does everything run?")
    flags = parser.parse_args()
    if flags.quick:
        flags.lengths, flags.rounds, flags.window = [256, 512], 2, 64
    lines, found = [], {}

    def tell(line: str) -> None:
        lines.append(line)
        print(line, flush=True)

    tell(head("T", "mask", *COLUMNS))
    for T in flags.lengths:
        found[T] = measure(T, flags)
        for name, one in found[T].items():
            measured = " | ".join(number(x, 1) for x in (one.forward, one.both, one.memory))
            tell(f"| {T:,} | `{name}` | {short(one.pairs)} | {short(one.tiles)} | {measured} |")
    tell(head("exponent of T", *COLUMNS))
    for name in found[T]:
        columns = zip(*(found[T][name] for T in flags.lengths), strict=True)
        tell(f"| `{name}` | {' | '.join(exponent(flags.lengths, column) for column in columns)} |")
    if flags.out:
        flags.out.write_text("\n".join(lines).strip() + "\n")


if __name__ == "__main__":
    main()
