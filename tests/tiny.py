"""A model, a config and texts small enough that compiling is all they cost."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import packs
from flax import nnx
from ml_collections import ConfigDict

import lab.config
from lab import model as lab_model
from lab.coordinates import Coordinates
from lab.data import Batch, tokenizers
from lab.model import mesh as lab_mesh
from lab.model import parameter
from lab.model.spec import MODEL, read_by_layers
from lab.options import leaves, set_field
from lab.storage import write_json
from lab.train import step
from lab.train.checkpoint import Checkpoints, Position
from lab.train.optimizer import TRAIN

VOCABULARY = 29


def config(**overrides) -> ConfigDict:
    """Two layers of width 16, 4 heads over 2 groups, short texts; `overrides` by dotted names with __ for dots."""
    made = lab.config.branches(lab.config.base())
    made.model.update(dim=16, layers=2, vocabulary=VOCABULARY)
    made.model.mixer.update(heads=4, kv_heads=2, head_dim=8)
    made.model.feedforward.width = 24
    made.model.position.update(theta=100.0, ratio=0.5, stride=3)  # every kind of pair, at angles that tokens tell apart
    made.data.update(text_length=6, texts_per_row=4, rows=2, draw="1-3")
    made.train.update(steps=6, warmup=2)
    made.train.adamw.eps = 1e-3
    made.evaluate.loss.update(branches=(1, 2), texts=16, texts_per_row=4, rows=2)
    made.run.checkpoint.update(every=2, keep=3)
    given = {name.replace("__", "."): value for name, value in overrides.items()}
    for name, value in given.items():
        set_field(made, name, value)
    read = set().union(*read_by_layers(made.model))
    for name, option in MODEL.declared().items():  # what is set above for all variants, and this one does not read
        if name not in read and f"model.{name}" not in given:
            set_field(made.model, name, option.default)
    if "adamw.eps" not in TRAIN.read(leaves(made.train)):
        made.train.adamw.eps = TRAIN.declared()["adamw.eps"].default
    return made


def model(made: ConfigDict, seed: int = 0):
    """A model with generic weights, drawn without a program."""
    structure, trainable, _ = parameter.split(lab_model.abstract(made.model, made.run))
    tables = jax.jit(lambda: parameter.split(lab_model.build(made.model, jax.random.key(0), made.run))[2])()
    weights = jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), drawn(trainable, seed))
    return nnx.merge(structure, weights, tables)


def saved(cell: pathlib.Path, model, made: ConfigDict) -> pathlib.Path:
    """The directory of a cell with one run of two steps, which has these weights and a tokenizer of bytes."""
    write_json(cell / "config.json", json.loads(made.to_json_best_effort()))
    tokenizers.Bytes().save(cell)
    checkpoints = Checkpoints(cell / "seed-0" / "checkpoints", keep=1)
    checkpoints.save(Position(2, 0), step.initial_state(model, step.Program("adamw", "declared")))
    checkpoints.close()
    return cell


def drawn(trainable, seed: int):
    """Generic weights, float64: even those that start at zero or one in a real model."""
    rng = np.random.default_rng(seed)

    def draw(variable: nnx.Variable) -> nnx.Variable:
        """Scales and what else is one number for each of something around one, matrices and tables around zero."""
        declared, shape = variable.get_metadata(), variable.get_raw_value().shape
        around = not declared["decay"] and len(declared["axes"]) == 1
        return variable.replace(around + 0.3 * rng.normal(size=shape))

    return jax.tree.map(draw, trainable, is_leaf=lambda x: isinstance(x, nnx.Variable))


def texts(count: int = 40, seed: int = 0, longest: int = 6) -> list[np.ndarray]:
    """Random texts of 2 to `longest` tokens: what the tokenised cache gives."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCABULARY, rng.integers(2, longest + 1)).astype(np.int32) for _ in range(count)]


def batch(seed: int = 0, rows: int = 2, length: int = 24, pack: str = "interleaved") -> Batch:
    """Random tokens on packed coordinates; labels at random places, in rows of ever fewer."""
    rng = np.random.default_rng(seed)
    coordinates = packs.PACKS[pack](rng, rows, length)
    tokens, labels = (rng.integers(0, VOCABULARY, (rows, length)).astype(np.int32) for _ in range(2))
    labelled = (coordinates.segment >= 0) & (rng.random((rows, length)) < np.linspace(0.9, 0.1, rows)[:, None])
    return Batch(tokens, np.where(labelled, labels, -1).astype(np.int32), coordinates)


def mesh(data: int = 1, fsdp: int = 1, tensor: int = 1, context: int = 1) -> jax.sharding.Mesh:
    """A mesh over the first devices."""
    sizes = (data, fsdp, tensor, context)
    axis_types = (jax.sharding.AxisType.Auto,) * len(sizes)
    return jax.make_mesh(sizes, lab_mesh.AXES, axis_types=axis_types, devices=jax.devices()[: int(np.prod(sizes))])


def moved(coordinates: Coordinates, **by: int) -> Coordinates:
    """Coordinates with a constant added to some fields of all tokens."""
    return Coordinates(*(getattr(coordinates, field) + by.get(field, 0) for field in packs.FIELDS))
