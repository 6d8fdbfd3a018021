"""What one scored pass over a long text takes: the peak memory of the process, and seconds, by the length of the text.

    python benchmarks/long_pass.py --lengths 32768        # the whole pass: ten minutes or more, alone on the machine
    python benchmarks/long_pass.py [--lengths 4096 8192] [--chunk 128] [--chunks 0]
        [--most-gib 4] [--compute float32]

A model of 0.1 billion parameters (12 layers of width 768, 12 heads, a vocabulary of 32,000) with random weights scores
random tokens on a CPU, in chunks behind a cache, as asks of long documents do (lab/evaluate/passes.py). Each length
and chunk runs in a process of its own, whose peak is the largest resident set that the kernel has seen, compiling
included; its base is what it had before there was a model. The command ends with 1 if a peak is above --most-gib.
"""

import argparse
import itertools
import json
import pathlib
import resource
import subprocess
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))


def config_of(compute: str):
    from lab.config import base

    config = base()  # layers unrolled: a scan reads one cache and writes another
    config.model.update(dict(dim=768, layers=12, vocabulary=32_000, compute=compute))
    config.model.mixer.update(dict(heads=12, kv_heads=12, head_dim=64))
    config.model.feedforward.width = 2048
    config.model.position.unselected = "time"
    return config


def measure(length: int, chunk: int, compute: str, chunks: int) -> dict:
    """Of this process: one pass over one row, or over its first chunks."""
    from lab import runtime

    runtime.tune_allocator()
    import jax
    import numpy as np

    from lab import model as lab_model
    from lab.evaluate import passes
    from lab.evaluate.passes import Pass
    from lab.model import mesh as lab_mesh
    from lab.model import parameter

    base, config = peak(), config_of(compute)
    mesh = lab_mesh.make(config.run.mesh)
    model = jax.jit(lambda key: lab_model.build(config.model, key, config.run))(jax.random.key(0))
    how = Pass(1, chunk, -(-length // chunk) * chunk)
    read = min(chunks * chunk, how.slots) if chunks else how.slots
    tokens = np.random.default_rng(0).integers(0, config.model.vocabulary, (1, read)).astype(np.int32)
    passes.executable(model, how, mesh)
    begun = time.perf_counter()
    done = itertools.count(1)

    def told() -> None:
        n = next(done)
        left = (time.perf_counter() - begun) / n * (read // chunk - n)
        print(f"\r{n * chunk:,} of {read:,} tokens, {left:.0f} s left ", end="", file=sys.stderr, flush=True)

    found = passes.score(model, tokens, np.roll(tokens, -1, axis=1), how, mesh, told)
    seconds = time.perf_counter() - begun
    print(file=sys.stderr)
    assert np.isfinite(found.nats).all()
    count = sum(x.size for x in jax.tree.leaves(parameter.split(model)[1]))
    return dict(read=read, parameters=count, seconds=seconds, base=base, peak=peak())


def peak() -> int:
    """Bytes of this process at most, so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> int:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192])
    flags.add_argument("--chunk", type=int, nargs="+", default=[128])
    flags.add_argument("--chunks", type=int, default=0, help="reads only so many: the cache is whole from the first on")
    flags.add_argument("--compute", default="float32")
    flags.add_argument("--most-gib", type=float, default=4.0)
    flags.add_argument("--one", action="store_true", help="measures the one length and chunk in this process")
    given = flags.parse_args()
    if given.one:
        print(json.dumps(measure(given.lengths[0], given.chunk[0], given.compute, given.chunks)))
        return 0
    columns = ("tokens", "chunk", "read", "parameters", "seconds", "tokens/s", "peak GiB", "over the base GiB")
    print(f"| {' | '.join(columns)} |\n|{'--:|' * len(columns)}", flush=True)
    highest = 0.0
    for length, chunk in itertools.product(given.lengths, given.chunk):
        numbers = "--chunk", str(chunk), "--chunks", str(given.chunks), "--compute", given.compute
        command = [sys.executable, __file__, "--one", "--lengths", str(length), *numbers]
        told = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        one = json.loads(told.splitlines()[-1])
        gib, over = (bytes / 2**30 for bytes in (one["peak"], one["peak"] - one["base"]))
        highest = max(highest, gib)
        shown = f"{length:,}", f"{chunk}", f"{one['read']:,}", f"{one['parameters'] / 1e6:.0f} M"
        shown += f"{one['seconds']:.1f}", f"{one['read'] / one['seconds']:,.0f}", f"{gib:.2f}", f"{over:.2f}"
        print(f"| {' | '.join(shown)} |", flush=True)
    return int(highest > given.most_gib)


if __name__ == "__main__":
    sys.exit(main())
