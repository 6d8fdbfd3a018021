"""Step time, peak temporary memory and FLOPs of every stream, and their ratios to the plain residual.

    python benchmarks/streams.py [NAME ...] [--lengths 512 2048] [--rounds 7] [--scan] [--quick]

8 layers of width 128, 4 heads over 2 groups, feed-forward 256, one row, float32: a table in Markdown for each length.
Time: medians of training steps, each stream taking turns with the plain one; the ratio is the median of those of single
turns, which a machine that is slower for a while does not move. Memory: temporary buffers of the compiled
step, by its own account; weights and the optimizer's state come on top, which only those of v4m1A, T^2 for each pair of
layers, make large: it comes last. FLOPs: of the formula.
"""

import argparse
import pathlib
import statistics
import sys
from typing import NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from lab import runtime

runtime.tune_allocator()

import numpy as np  # noqa: E402
import stepping  # noqa: E402

from lab import config as lab_config  # noqa: E402
from lab.coordinates import Coordinates  # noqa: E402
from lab.data import Batch  # noqa: E402
from lab.errors import choose  # noqa: E402
from lab.kernels import rules  # noqa: E402
from lab.model import abstract, accounting  # noqa: E402
from lab.model import mesh as lab_mesh  # noqa: E402
from lab.model.streams import STREAMS  # noqa: E402
from lab.train import compiled, optimizer, step  # noqa: E402

MEBIBYTE = 2**20
DIM, LAYERS = 128, 8
SIZES = {"copies": 4, "rank": DIM // 16, "blocks": LAYERS // 2}  # where a stream reads them
DENSE = "v4m1A"


class Measured(NamedTuple):
    seconds: float  # of a step, the median
    ratio: float  # to a plain step of the same turn, the median
    bytes: int  # of temporaries
    flops: float  # of a training step


def config_of(name: str, length: int, scan: bool):
    """The config of a stream on rows of so many tokens, its layers scanned or unrolled."""
    config = lab_config.base()
    config.model.update(dict(dim=DIM, layers=LAYERS))
    config.model.mixer.update(dict(heads=4, kv_heads=2, head_dim=32))
    config.model.stream.name, config.run.scan = name, scan
    sizes = SIZES | {"length": length}
    config.model.stream.update({field: sizes[field] for field in STREAMS[name].options if field in sizes})
    return config


def program_of(config, length: int):
    """(a function that makes one step and waits for it, its executable)"""
    tokens = np.random.default_rng(0).integers(0, config.model.vocabulary, (1, length)).astype(np.int32)
    mesh, program = lab_mesh.make(config.run.mesh), step.Program.of(config)
    batch = lab_mesh.place(Batch(tokens, np.roll(tokens, -1, axis=1), Coordinates.single(1, length)), mesh)
    state = compiled.initial_state(config, program, mesh)
    numbers = optimizer.numbers_by_step(config.train)(0)
    run = compiled.train_step(state, numbers, batch, program, mesh)

    return stepping.stepper(run, state, numbers, batch), run


def measure(name: str, length: int, rounds: int, scan: bool, plain) -> Measured:
    """plain: what makes one plain step."""
    config = config_of(name, length, scan)
    one, run = program_of(config, length)
    turns = stepping.turns(one, plain, rounds)
    seconds, ratio = (statistics.median(values) for values in zip(*turns, strict=True))
    visible = rules.mean_visible_keys(rules.parse(config.model.rule), Coordinates.single(1, length))
    flops = length * accounting.train_flops_per_token(abstract(config.model), [visible])
    return Measured(seconds, ratio, run.memory_analysis().temp_size_in_bytes, flops)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="streams beside the plain one (default: all)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048], help="tokens of the row")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each")
    parser.add_argument("--scan", action="store_true", help="layers scanned, as accelerators want them; else unrolled")
    parser.add_argument("--quick", action="store_true", help="256 tokens and two rounds: does everything run?")
    flags = parser.parse_args()
    lengths, rounds = ([256], 2) if flags.quick else (flags.lengths, flags.rounds)
    for name in flags.names:
        choose("a stream", name, STREAMS)
    names = flags.names or [*(name for name in STREAMS if name not in ("plain", DENSE)), DENSE]
    if flags.scan:
        names = [name for name in names if not STREAMS[name].grows]
    for length in lengths:
        plain, _ = program_of(config_of("plain", length, flags.scan), length)
        base = measure("plain", length, rounds, flags.scan, plain)
        print(f"\nL 8, T {length}, {'scanned' if flags.scan else 'unrolled'}\n")
        print("| stream | step ms | x plain | memory MiB | x plain | MFLOPs | x plain |")
        print("| --- | --: | --: | --: | --: | --: | --: |")
        for name in ["plain", *names]:
            found = measure(name, length, rounds, flags.scan, plain) if name != "plain" else base
            print(
                f"| {name} | {1e3 * found.seconds:.1f} | {found.ratio:.2f} "
                f"| {found.bytes / MEBIBYTE:.0f} | {found.bytes / base.bytes:.2f} "
                f"| {found.flops / 1e6:,.0f} | {found.flops / base.flops:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
