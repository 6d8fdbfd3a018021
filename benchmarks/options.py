"""Step time, bytes moved and FLOPs of every option of an architecture, beside what it is compared with.

    python benchmarks/options.py [PART ...] [--width 128] [--layers 2] [--length 256] [--rows 4] [--rounds 11]
                                 [--out docs/options.md] [--quick]

Options: the cells of configs/architecture_ablation.py, part by part at one size, the optimizers of
configs/optimizer_ablation.py, and those of `further`, which are in neither. What is added to either is measured here.
Each stands beside the baseline of its part, at equal parameters where the part matches them.

Time: training steps on Python's own sources, on one device, each option in turns with its baseline: the median, and the
median and quartiles of ratios of single turns, which a machine that is slower for a while does not move. Bytes and
FLOPs: XLA's analysis of that compiled step. Layers are unrolled and attention is plain XLA (`reference`), since a loop,
over layers or tiles, would count as one turn of it; so a mask saves nothing here, see benchmarks/masks.py. Compiling
takes most of the time. A page in Markdown; what is done is told on stderr. --rounds 0 measures no time.
"""

import argparse
import pathlib
import statistics
import sys
import textwrap
import time
from collections.abc import Iterator
from typing import NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from lab import runtime

runtime.tune_allocator()

import jax  # noqa: E402
import numpy as np  # noqa: E402
import stepping  # noqa: E402

from configs import architecture_ablation, optimizer_ablation  # noqa: E402
from lab import data as lab_data  # noqa: E402
from lab import model as lab_model  # noqa: E402
from lab.config import base, sized  # noqa: E402
from lab.errors import choose  # noqa: E402
from lab.model import mesh as lab_mesh  # noqa: E402
from lab.study.define.cell import Cell  # noqa: E402
from lab.study.define.cells import chain, named  # noqa: E402
from lab.study.define.resolve import resolve  # noqa: E402
from lab.study.numbers import number, short  # noqa: E402
from lab.train import compiled, step  # noqa: E402
from lab.train.workload import Member, Workload  # noqa: E402

DEEP = (("model.placement.name", "deepnorm"), ("model.init.name", "deepnorm"))
COLUMNS = ("step ms", "x baseline [quartiles]", "bytes", "x baseline", "FLOPs", "x baseline")


def optimizers(config) -> None:
    names = optimizer_ablation.OPTIMIZERS
    chosen = {name: optimizer_ablation.override_of(name, config.train.steps) for name in names}
    config.study.cells = chain(*(named(name, *pairs) for name, (pairs,) in chosen.items()))
    config.study.baseline = (("variant", names[0]),)


def further(config) -> None:
    """What neither of the two configs has."""
    sites = {"attention": "attention", "sublayers": "residual", "the embedding": "embedding"}
    dropped = (named(f"dropout of {name}", (f"train.dropout.{field}", 0.1)) for name, field in sites.items())
    config.study.cells = chain(named("none"), *dropped, named("DeepNorm", *DEEP))
    config.study.baseline = (("variant", "none"),)


PARTS = architecture_ablation.PARTS | {"optimizer": optimizers, "further": further}


class Measured(NamedTuple):
    """Of a training step. turns: (seconds, ratio to the baseline's) of each."""

    turns: list[tuple[float, float]]
    bytes: float
    flops: float


def cells(part: str, flags) -> list[Cell]:
    """Those of a part at the size of the flags, the baseline first."""
    config = sized(base(), "cpu")
    config.model.update(dict(dim=flags.width, layers=flags.layers))
    config.run.update(dict(implementation="reference", scan=False))
    config.model.mixer.head_dim = flags.width // config.model.mixer.heads
    config.model.feedforward.width = 8 * round(flags.width / 3)
    config.data.update(dict(text_length=flags.length, rows=flags.rows))
    config.study.name, config.study.labels = part, (("name", "variant"),)
    PARTS[part](config)
    first = dict(config.study.baseline)["variant"]
    found = sorted(resolve(config), key=lambda cell: cell.labels["variant"] != first)
    layers = max(flags.layers, *(len(cell.config.model.pattern) for cell in found))  # whole patterns, for all alike
    for cell in found:
        cell.config.model.layers = layers
    return found


def program_of(config, texts):
    """(a function that makes one step and waits for it, its executable)"""
    axes, types = lab_mesh.AXES, (jax.sharding.AxisType.Auto,) * len(lab_mesh.AXES)
    mesh = jax.make_mesh((1,) * len(axes), axes, types, devices=jax.devices()[:1])  # however many there are
    program, workload = step.Program.of(config), Workload([Member(config, texts)])
    with jax.set_mesh(mesh):  # eagerly: a program that draws weights would be compiled for each option
        state = step.initial_state(lab_model.build(config.model, jax.random.key(0), config.run), program)
    numbers, batch = workload.numbers(0), lab_mesh.place(next(workload.batches(0))[0], mesh)
    run = compiled.train_step(state, numbers, batch, program, mesh)
    return stepping.stepper(run, state, numbers, batch), run


def measure(part: str, flags) -> Iterator[tuple[str, Measured]]:
    """(name, what it costs) of every cell of a part, the baseline first."""
    found, plain = cells(part, flags), None
    texts = lab_data.open(found[0].config).train
    for place, cell in enumerate(found, 1):
        begun = time.perf_counter()
        one, run = program_of(cell.config, texts)
        plain = plain or one
        turns = stepping.turns(one, plain, flags.rounds) if flags.rounds else []
        cost, seconds = run.cost_analysis(), time.perf_counter() - begun
        print(
            f"{part}, {place} of {len(found)}: {cell.labels['variant']}, {seconds:.0f} s", file=sys.stderr, flush=True
        )
        yield cell.labels["variant"], Measured(turns, cost["bytes accessed"], cost["flops"])


def row(part: str, name: str, one: Measured, plain: Measured) -> str:
    seconds, ratios = zip(*one.turns, strict=True) if one.turns else ([], [])
    spread = "1" if one is plain else "—"
    if len(ratios) > 1 and one is not plain:
        low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75))
        spread = f"{middle:.3f} [{low:.3f}, {high:.3f}]"
    shown = (
        number(1e3 * statistics.median(seconds) if seconds else None, 1), spread,
        short(one.bytes), f"{one.bytes / plain.bytes:.3f}", short(one.flops), f"{one.flops / plain.flops:.3f}",
    )  # fmt: skip
    return f"| {part} | {name} | {' | '.join(shown)} |"


def page(flags, rows: list[str]) -> str:
    columns = "part", "option", *COLUMNS
    head = [f"| {' | '.join(columns)} |", f"| --- | --- |{' --: |' * len(COLUMNS)}"]
    command = " ".join(["python benchmarks/options.py", *sys.argv[1:]])
    told = [
        f"`{command}`: training steps of {flags.layers} layers (of whole patterns, where a part has "
        f"longer ones) of width {flags.width}, {flags.rows} rows of "
        f"{flags.length} bytes, float32, on one device ({jax.devices()[0].device_kind}, {runtime.cores()} cores), jax "
        f"{jax.__version__}. Every option stands beside the first of its part; both took turns in one process: the "
        f"median step, and the median and quartiles of ratios of {flags.rounds} single turns. Where the quartiles "
        "hold 1, nothing is told.",
        "Bytes that memory moves and FLOPs are XLA's analysis of the compiled step, with attention in plain XLA, where "
        "a mask saves nothing: what it saves by tiles is in [attention.md](attention.md). The parts gated and named, "
        "and the key heads, have equal parameters.",
    ]
    if not flags.rounds:
        told += [
            "**No time was measured**: the command without `--rounds 0` does, on a machine that does nothing else."
        ]
    text = "\n\n".join(["# What every option costs", *(textwrap.fill(each, 120) for each in told)])
    return "\n".join([text, "", *head, *rows, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of: {', '.join(PARTS)} (default: all)")
    parser.add_argument("--width", type=int, default=128, help="of the model, which has 4 heads")
    parser.add_argument("--layers", type=int, default=2, help="4 where a part has a pattern of 4")
    parser.add_argument("--length", type=int, default=256, help="bytes of a row")
    parser.add_argument("--rows", type=int, default=4, help="of a step")
    parser.add_argument("--rounds", type=int, default=11, help="turns of each; 0: bytes and FLOPs alone")
    parser.add_argument("--out", type=pathlib.Path, help="a file for the page (default: stdout)")
    parser.add_argument("--quick", action="store_true", help="small, and two rounds: does everything run?")
    flags = parser.parse_args()
    if flags.quick:
        flags.width, flags.length, flags.rows, flags.rounds = 32, 64, 2, 2
    for part in flags.parts:
        choose("a part", part, PARTS)
    runtime.keep_programs()
    rows = []
    for part in flags.parts or PARTS:
        plain = None
        for name, one in measure(part, flags):
            plain = plain or one
            rows.append(row(part, name, one, plain))
        if flags.out:  # part by part: what is killed leaves what it has
            flags.out.write_text(page(flags, rows))
    if not flags.out:
        print(page(flags, rows))


if __name__ == "__main__":
    main()
