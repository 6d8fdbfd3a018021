"""Models: functional Flax NNX pytrees, made from a config and a key."""

import jax

from lab.model import transformer
from lab.model.transformer import Transformer


def build(model, key: jax.Array) -> Transformer:
    """The model that `config.model` describes, with weights drawn from `key`. Raises UserError for a bad config."""
    transformer.check(model)
    return Transformer(model, key)


def abstract(model) -> Transformer:
    """The same without weights: shapes only, at no cost."""
    transformer.check(model)
    return jax.eval_shape(lambda: Transformer(model, jax.random.key(0)))
