"""How long a step waits for its batch: texts in memory, mapped from the cache, and in shards of ArrayRecord.

    python benchmarks/input.py [--rate 100000] [--seconds 20] [--rounds 3] [--tokens 8000000]

A consumer takes batches as a training loop does, and computes for as long as a step takes at so many tokens a second:
without a sleep, on every core, and without the interpreter's lock, as a compiled program does. Wait: of the whole time,
the share in which it has no batch. Make: milliseconds of one core for a batch, and of it what reading its texts takes,
alone and from the page cache. Medians over rounds in which the sources take turns.
"""

import argparse
import concurrent.futures
import hashlib
import itertools
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from lab import runtime

runtime.tune_allocator()

import numpy as np  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

WARM = 8  # batches
BLOCK = bytes(2**18)


def configs():
    """{what is packed: its config}, of batches of 8,192 tokens."""
    from lab.config import base, branches

    packs = branches(base())
    packs.data.update(rows=16)
    short, long = base(), base()
    short.data.update(text_length=128, rows=64)
    long.data.update(text_length=1024, rows=8)
    return {"branches of 32": packs, "texts of 128": short, "texts of 1024": long}


def sources(config, folder: pathlib.Path):
    """{where its texts lie: the texts}."""
    from lab import data as lab_data
    from lab.data import preparation

    config.evaluate.loss.texts = 0
    config.evaluate.loss.update(branches=(1,), texts_per_row=1, rows=1)
    config.data.update(corpus="jsonl", path=str(folder / "documents.jsonl"))
    mapped = lab_data.open(config).train
    out = folder / f"shards-{config.data.text_length}"
    preparation.prepare(config, out, 1, "benchmark", lambda told, kept: None, characters=2**21)
    config.data.update(corpus="prepared", path=str(out))
    return {"in memory": [*mapped], "mapped": mapped, "ArrayRecord": lab_data.open(config).train}


def write_documents(path: pathlib.Path, tokens: int) -> None:
    """So many bytes of random letters, in documents of about 2,000."""
    rng = np.random.default_rng(0)
    with path.open("w") as file:
        for _ in range(tokens // 2000):
            letters = rng.integers(97, 123, rng.integers(1000, 3000), np.uint8)
            file.write(json.dumps({"text": letters.tobytes().decode()}) + "\n")


def batches(config, texts):
    """Those of a training loop, arranged for the model."""
    from lab.train.workload import Member, Workload

    return Workload([Member(config, texts)]).batches(0)


def compute(until: float) -> None:
    """Keeps a core busy."""
    while time.perf_counter() < until:
        hashlib.blake2b(BLOCK)  # lets go of the interpreter's lock


def waited(config, texts, rate: float, seconds: float, pool, cores: int) -> float:
    """The share of time in which a consumer of so many tokens a second has no batch."""
    tokens = config.data.rows * config.data.texts_per_row * config.data.text_length
    steps = max(1, round(seconds * rate / tokens))
    config.train.steps = WARM + steps
    made, waits, begun = batches(config, texts), 0.0, 0.0
    for step in range(WARM + steps):
        before = time.perf_counter()
        next(made)
        now = time.perf_counter()
        if step == WARM:
            begun = before
        if step >= WARM:
            waits += now - before
        done = [pool.submit(compute, now + tokens / rate) for _ in range(cores - 1)]
        compute(now + tokens / rate)
        concurrent.futures.wait(done)
    total = time.perf_counter() - begun
    made.close()
    return waits / total


def cost(config, texts, count: int = 40) -> tuple[float, float]:
    """(seconds of one core for a batch, those of reading its texts)."""
    from lab.data import pipeline

    config.train.steps = count
    pack = pipeline._TextSteps(config, texts, 0, 1)
    ids = [pack._order[step] for step in range(count)]
    read = time.thread_time()
    for i in itertools.chain.from_iterable(ids):
        texts[i]
    read = (time.thread_time() - read) / count
    whole = time.thread_time()
    for step in range(count):
        pack(step)
    return (time.thread_time() - whole) / count, read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=100_000, help="tokens a second")
    parser.add_argument("--seconds", type=float, default=20, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=8_000_000, help="of the corpus")
    parser.add_argument("--cores", type=int, default=os.cpu_count(), help="that a step computes on")
    flags = parser.parse_args()
    console, rows = Console(width=110, highlight=False), []
    with tempfile.TemporaryDirectory() as name, concurrent.futures.ThreadPoolExecutor(flags.cores) as pool:
        os.environ["LAB_CACHE"] = str(pathlib.Path(name) / "cache")
        write_documents(pathlib.Path(name) / "documents.jsonl", flags.tokens)
        for what, config in configs().items():
            places = sources(config, pathlib.Path(name))
            costs = {where: cost(config, texts) for where, texts in places.items()}
            waits = {where: [] for where in places}
            for _, where in itertools.product(range(flags.rounds), places):
                share = waited(config, places[where], flags.rate, flags.seconds, pool, flags.cores)
                waits[where].append(share)
                console.print(f"{what}, {where}: waits {share:.2%}")
            rows += [(what, where, waits[where], *costs[where]) for where in places]
    table = Table(title=f"{flags.rate:,.0f} tokens/s, steps of 8,192 tokens on {flags.cores} cores")
    for column in ("packs", "texts", "wait, median", "wait, most", "make a batch, ms", "of it reading, ms"):
        table.add_column(column, justify="left" if column in ("packs", "texts") else "right")
    for what, where, shares, whole, read in rows:
        numbers = (
            *(f"{share:.2%}" for share in (statistics.median(shares), max(shares))),
            *(f"{seconds * 1e3:.2f}" for seconds in (whole, read)),
        )
        table.add_row(what, where, *numbers)
    console.print(table)


if __name__ == "__main__":
    main()
