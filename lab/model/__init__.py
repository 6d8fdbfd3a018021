"""Models: functional Flax NNX pytrees, made from a config and a key."""

import jax
from flax import nnx

from lab.model import parameter, spec
from lab.model.execution import Execution
from lab.model.transformer import Transformer


def build(model, key: jax.Array, run=None) -> Transformer:
    """The model that `config.model` describes, with weights drawn from `key`, to run as `config.run` says (None: the
    defaults). Raises UserError for a bad config."""
    spec.check(model)
    return Transformer(model, key, Execution.of(run))


def abstract(model, run=None) -> Transformer:
    """The same without weights: shapes only, at no cost."""
    spec.check(model)
    return jax.eval_shape(lambda: Transformer(model, jax.random.key(0), Execution.of(run)))


def undrawn(model, device: jax.Device) -> Transformer:
    """The same with its tables, on a device: weights of which shapes and types are known are still to be read."""
    structure, weights, _ = parameter.split(abstract(model))
    place = jax.sharding.SingleDeviceSharding(device)
    known = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=place), weights)
    tables = jax.jit(lambda: parameter.split(build(model, jax.random.key(0)))[2], out_shardings=place)()
    return nnx.merge(structure, known, tables)
