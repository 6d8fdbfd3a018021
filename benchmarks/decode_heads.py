"""Tokens a second of decoding with many heads, groups of heads and one group, and what their intensities would have it.

    python benchmarks/decode_heads.py [--dim 256] [--heads 8] [--layers 4] [--length 1024] [--batches 1 8 32]
                                      [--rounds 9] [--steps 8] [--quick]

`Transformer.extend` by one token of each row, compiled, into a donated cache of `length` slots that is full to the
middle when a turn begins: float32 on a CPU, bfloat16 elsewhere. MHA has as many groups as heads, GQA a quarter of them,
MQA one. Medians of turns that they take in rotation; x MHA: the median of ratios of single turns. Intensity: of
decoding, as lab.model.intensity has it at half of the length. A table in Markdown.
"""

import argparse
import functools
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

from lab import config as lab_config  # noqa: E402
from lab import model as lab_model  # noqa: E402
from lab.coordinates import Coordinates  # noqa: E402
from lab.model import accounting, intensity  # noqa: E402

DTYPE = "float32" if jax.default_backend() == "cpu" else "bfloat16"


def groups(heads: int) -> dict[str, int]:
    return {"MHA": heads, "GQA": max(1, heads // 4), "MQA": 1}


def config_of(flags, count: int):
    config = lab_config.base()
    config.model.update(dict(dim=flags.dim, layers=flags.layers, compute=DTYPE))
    config.model.mixer.update(dict(heads=flags.heads, kv_heads=count, head_dim=flags.dim // flags.heads))
    config.model.feedforward.width = 2 * flags.dim
    return config


@functools.partial(jax.jit, donate_argnames="cache")
def step(model, tokens_B1, at, cache):
    logits_B1C, cache = model.extend(tokens_B1, at, cache)
    return jnp.argmax(logits_B1C, axis=-1).astype(jnp.int32), cache


def decoder(model, batch: int, length: int, steps: int):
    """A function that decodes so many tokens of each row behind the middle of a cache, and gives its seconds."""
    begin = length // 2
    ends = Coordinates.single(batch, begin)
    free = Coordinates.padding(batch, length - begin)
    filled = jax.tree.map(lambda a, b: jnp.asarray(np.concatenate([a, b], axis=1)), ends, free)
    cache = model.init_cache(batch, length)._replace(coordinates=filled)
    tokens_B1 = jnp.zeros((batch, 1), jnp.int32)
    places = [jax.tree.map(jnp.asarray, Coordinates.single(batch, 1, begin + i)) for i in range(steps)]

    def once() -> float:
        nonlocal cache, tokens_B1
        cache = cache._replace(coordinates=jax.tree.map(jnp.copy, filled), used=jnp.full(batch, begin, jnp.int32))
        start = time.perf_counter()
        for at in places:
            tokens_B1, cache = step(model, tokens_B1, at, cache)
        jax.block_until_ready(tokens_B1)
        return time.perf_counter() - start

    once()
    return once


def take_turns(peers: dict, rounds: int) -> dict[str, list[float]]:
    seconds = {name: [] for name in peers}
    for turn in range(rounds):
        for name in [*peers][turn % len(peers) :] + [*peers][: turn % len(peers)]:
            seconds[name].append(peers[name]())
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=256, help="width; heads are dim / heads wide")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024, help="slots of a row of the cache")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32], help="rows that are decoded at once")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each")
    parser.add_argument("--steps", type=int, default=8, help="tokens of a turn")
    parser.add_argument("--quick", action="store_true", help="small, and two rounds: does everything run?")
    flags = parser.parse_args()
    if flags.quick:
        flags.dim, flags.layers, flags.length, flags.batches, flags.rounds = 64, 2, 128, [1, 2], 2
    models = {}
    for name, count in groups(flags.heads).items():
        config = config_of(flags, count)
        models[name] = lab_model.build(config.model, jax.random.key(0), config.run)
    print(f"{jax.devices()[0].device_kind}, {DTYPE}, width {flags.dim}, {flags.heads} heads, {flags.layers} layers")
    print(f"cache of {flags.length} slots, half of them read\n")
    print("| rows | heads | groups | cache bytes / token | tokens/s | x MHA | intensity | x MHA |")
    print("| --: | --- " + "| --: " * 6 + "|")
    for batch in flags.batches:
        peers = {name: decoder(model, batch, flags.length, flags.steps) for name, model in models.items()}
        seconds = take_turns(peers, flags.rounds)
        expected = {
            name: intensity.decoding(batch, flags.length / 2, flags.dim, flags.heads, count)
            for name, count in groups(flags.heads).items()
        }
        for name, count in groups(flags.heads).items():
            rate = batch * flags.steps / statistics.median(seconds[name])
            faster = statistics.median(a / b for a, b in zip(seconds["MHA"], seconds[name], strict=True))
            print(
                f"| {batch} | {name} | {count} | {accounting.cache_bytes_per_token(models[name]):,} | {rate:,.0f} "
                f"| {faster:.2f} | {expected[name]:.2f} | {expected[name] / expected['MHA']:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
