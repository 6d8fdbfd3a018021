"""What a few steps change inside models of several widths, under each parametrization: the coordinate check.

    python benchmarks/coordinate_check.py [--widths 64 128 256] [--steps 4] [--rate 0.01] [--optimizer adamw]

2 layers, heads of 16, untied, float32, on random tokens. The first width is the base. Printed are root mean squares of
the change of the stream below the head and of the logits, and the exponent of their growth with the width: about zero
under maximal update, well above it under the standard parametrization.
"""

import argparse
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np

from lab import config as lab_config
from lab import model as lab_model
from lab.coordinates import Coordinates
from lab.data import Batch
from lab.train import optimizer, step

HEAD_DIM, VOCABULARY, ROWS, LENGTH = 16, 64, 4, 32
PARAMETRIZATIONS = ("standard", "mup")
INSIDE = ("stream", "logits")


def config_of(name: str, width: int, base: int, rate: float, chosen: str = "adamw", layers: int = 2):
    """A model of a width, under a parametrization with that base."""
    config = lab_config.base()
    config.model.update(dict(dim=width, layers=layers, vocabulary=VOCABULARY, tied=False))
    heads = width // HEAD_DIM
    config.model.mixer.update(dict(heads=heads, kv_heads=heads, head_dim=HEAD_DIM))
    config.model.feedforward.width = 2 * width
    config.model.parametrization.name = name
    if name != "standard":
        config.model.parametrization.base_dim = base
    config.train.update(dict(optimizer=chosen, schedule="constant", warmup=0, learning_rate=rate, weight_decay=0.0))
    config.run.implementation = "reference"
    return config


def inside(model, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """The stream that the head reads [B, T, D], and the logits [B, T, C]."""
    coordinates = batch.coordinates
    x_BTD, _ = model.run_layers(model.embed(batch.tokens, coordinates), model.views(coordinates, coordinates))
    return x_BTD, model.logits(x_BTD)


def change(config, steps: int, seed: int = 0) -> dict[str, float]:
    """Root mean squares of what so many steps on one batch change."""
    tokens = np.random.default_rng(seed).integers(0, VOCABULARY, (ROWS, LENGTH)).astype(np.int32)
    batch = Batch(tokens, np.roll(tokens, -1, axis=1), Coordinates.single(ROWS, LENGTH))
    program, numbers = step.Program.of(config), optimizer.numbers_by_step(config.train)(0)

    @jax.jit
    def measured(key):
        state = step.initial_state(lab_model.build(config.model, key, config.run), program)
        one = lambda _, state: step.train_step(state, numbers, batch, program)[0]  # noqa: E731
        trained = jax.lax.fori_loop(0, steps, one, state)
        pairs = zip(inside(state.model, batch), inside(trained.model, batch), strict=True)
        return [jnp.sqrt(jnp.mean(jnp.square(after - before))) for before, after in pairs]

    return dict(zip(INSIDE, map(float, measured(jax.random.key(seed))), strict=True))


def exponent(widths, changes) -> float:
    """Of the power of the width that fits them best."""
    return float(np.polyfit(np.log(widths), np.log(changes), 1)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rate", type=float, default=0.01)
    parser.add_argument("--optimizer", default="adamw")
    given = parser.parse_args()
    print(f"| parametrization | of | {' | '.join(map(str, given.widths))} | exponent |")
    print(f"|:--|:--|{'--:|' * (len(given.widths) + 1)}")
    for name in PARAMETRIZATIONS:
        configs = [config_of(name, width, given.widths[0], given.rate, given.optimizer) for width in given.widths]
        found = [change(config, given.steps) for config in configs]
        for of in INSIDE:
            changes = [one[of] for one in found]
            told = " | ".join(f"{one:.4f}" for one in changes)
            print(f"| {name} | {of} | {told} | {exponent(given.widths, changes):+.2f} |", flush=True)


if __name__ == "__main__":
    main()
