"""One step of a tiny model on any mesh of eight devices, and how far it is from that of one device.

PYTHONPATH=. python tests/meshes.py    # the table of docs/scale.md; --keep FILE goes on where it was stopped
"""

import argparse
import functools
import itertools
import json
import pathlib
import sys

import jax
import numpy as np
import tiny
import variants
from flax import nnx

from lab.data import Batch
from lab.model import mesh as lab_mesh
from lab.model import parameter
from lab.train import compiled, optimizer, step
from lab.train.step import Program, State

ADAMW = Program("adamw", "declared", 1)
WITHIN = 1e-5  # of loss and gradient norm, relative, in float32

MODELS = {  # of tests/variants.py, by what each stands for
    "GQA": "default",
    "MLA": "mixer mla",
    "S2": "mixer s2",
    "hyper-connections": "stream hyper",
    "attention over layers (v3m1)": "stream v3m1, output",
    "keys of earlier layers (v4m4)": "stream v4m4",
    "bias (shaw, t5)": "shaw : t5",
    "two bands (self-extend)": "self-extend : hybrid",
}
_PAIRS = {("data", "fsdp"): (4, 2), ("fsdp", "tensor"): (2, 4), ("tensor", "context"): (4, 2)}
MESHES = {axis: {axis: 8} for axis in lab_mesh.AXES} | {
    " x ".join(pair): dict(zip(pair, _PAIRS.get(pair, (2, 4)), strict=True))
    for pair in itertools.combinations(lab_mesh.AXES, 2)
}


def numbers_of(config) -> optimizer.Numbers:
    return optimizer.numbers_by_step(config.train)(0)


def state_of(config, program: Program, mesh: jax.sharding.Mesh, model=None) -> State:
    """Of a model, by default one with generic weights, laid over a mesh."""
    state = step.initial_state(tiny.model(config) if model is None else model, program)
    return jax.device_put(state, parameter.shardings(state, mesh))


def trained(config, mesh, batch: Batch, program: Program = ADAMW, model=None):
    """(loss, gradient norm, weights and tables, moments) after one compiled step."""
    state = state_of(config, program, mesh, model)
    lab_mesh.check_rows(mesh, "rows", *batch.tokens.shape)
    placed = lab_mesh.place(batch, mesh)
    run = compiled.train_step(state, numbers_of(config), placed, program, mesh)
    state, metrics = run(state, numbers_of(config), placed)
    return jax.device_get((*metrics, jax.tree.leaves(state.model), jax.tree.leaves(state.optimizer)))


@functools.cache
def _begun(variant: str):
    """(config, model) of a variant with eight heads, so that every axis can have eight devices. Its weights are near
    those that training begins from, and none is zero. Where generic weights are far from them, rounding is not all that
    is seen: the gradient of hyper-connections moves by 6e-4 if weights move by 1e-7."""
    config, rng = variants.config(variant, model__mixer__heads=8), np.random.default_rng(0)
    model = compiled.initial_state(config, ADAMW, tiny.mesh()).model
    structure, weights, rest = parameter.split(model)
    moved = jax.tree.map(lambda w: w + 0.1 * rng.normal(size=w.shape).astype(np.float32), weights)
    return config, nnx.merge(structure, moved, rest)


@functools.cache
def _measured(variant: str, **sizes: int) -> tuple[float, float]:
    """(loss, gradient norm) of a step."""
    config, model = _begun(variant)
    loss, norm, *_ = trained(config, tiny.mesh(**sizes), tiny.batch(rows=8, length=32), model=jax.device_get(model))
    return float(loss), float(norm)


def difference(variant: str, mesh: str) -> float:
    """The larger relative difference of loss and gradient norm from those of one device."""
    one, many = _measured(variant), _measured(variant, **MESHES[mesh])
    return max(abs(a - b) / abs(a) for a, b in zip(one, many, strict=True))


def main() -> int:
    """Prints the table, a line for each mesh as it is found; 1 if a difference is beyond WITHIN."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=pathlib.Path, help="JSON of what was found, to go on where this was stopped")
    file = parser.parse_args().keep
    found = json.loads(file.read_text()) if file and file.exists() else {}
    print(f"| mesh | {' | '.join(MODELS)} |\n|---|{'--:|' * len(MODELS)}")
    for name, sizes in MESHES.items():
        for title, variant in MODELS.items():
            if (cell := f"{name}, {title}") not in found:
                found[cell] = difference(variant, name)
                if file:
                    file.write_text(json.dumps(found, indent=1))
        row = [f"{found[f'{name}, {title}']:.0e}" for title in MODELS]
        print(f"| {' x '.join(f'{axis} {size}' for axis, size in sizes.items())} | {' | '.join(row)} |", flush=True)
    print(f"largest: {max(found.values()):.0e}, to be within {WITHIN:.0e}")
    return int(max(found.values()) > WITHIN)


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    sys.exit(main())
