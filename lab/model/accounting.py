"""What a model costs, by closed formulas over its declared shapes."""

import jax
import numpy as np

from lab.model import parameter
from lab.model.transformer import Transformer


def parameters(model: Transformer) -> dict[str, int]:
    """Trained numbers, in all and without the embedding and the output head."""
    total = parameter.count(model)
    outer = sum(int(np.prod(w.shape)) for w in (model.embedding, model.head) if w is not None)
    return {"parameters": total, "parameters_non_embedding": total - outer}


def train_flops_per_token(model: Transformer, visible_keys: list[float]) -> float:
    """FLOPs of one token in a training step: forward and twice that backward; recomputation is not counted.

    Each weight matrix does one multiply and one add per number; attention, per visible key (`visible_keys`: the mean
    for each entry of the layer pattern); the stream, what it says. Norms, activations, the softmax and weighted sums
    of vectors are left out.
    """
    head, blocks = model.embedding if model.head is None else model.head, layers(model)
    visible = [visible_keys[layer % len(visible_keys)] for layer in range(model.layers)]
    forward = np.prod(head.shape) + model.stream.work_per_token(blocks, visible)
    for block, keys in zip(blocks, visible, strict=True):
        forward += parameter.in_matrices(block) + keys * block.mixer.work_per_key + block.mixer.work_per_token
    return 3 * 2 * float(forward)


def cache_per_token_per_layer(model: Transformer) -> int | float:
    """Numbers that decoding keeps per token: the mean over layers, an int where they are alike."""
    mixers = [block.mixer for block in layers(model)]
    kept = sum(groups * width for mixer in mixers for groups, width in mixer.cached) + model.stream.cached(mixers)
    mean = kept / model.layers
    return int(mean) if mean.is_integer() else mean


def layers(model: Transformer) -> list:
    """The blocks as layers have them, one after another; shapes only."""
    one = [jax.eval_shape(lambda b: jax.tree.map(lambda w: w[0], b), block) for block in model.blocks]
    return [one[layer % len(one)] for layer in range(model.layers)]
