"""What a model costs, by closed formulas over its declared shapes."""

import functools

import jax
import numpy as np

from lab.model import parameter
from lab.model.transformer import Transformer


def parameters(model: Transformer) -> dict[str, int]:
    """Trained numbers, in all and without the embeddings of tokens and of positions, and the output head."""
    total = parameter.count(model)
    outer = sum(int(np.prod(w.shape)) for w in (model.embedding, model.head) if w is not None)
    outer += 0 if model.code is None else parameter.count(model.code)
    return {"parameters": total, "parameters_non_embedding": total - outer}


def train_flops_per_token(model: Transformer, visible_keys: list[float], without_gradient: int = 0) -> float:
    """FLOPs of one token in a training step: forward and twice that backward; recomputation is not counted.

    without_gradient: numbers of matrices that are not trained, for which the backward pass makes half as much. What
    adapters are multiplied by is done once a step, and not counted; nor is it counted off that nothing needs a
    gradient before the first layer that is trained.

    Each weight matrix does one multiply and one add per number; attention, per visible key (`visible_keys`: the mean
    for each entry of the layer pattern); the stream, what it says. Norms, activations, the softmax and weighted sums
    of vectors are left out.
    """
    head, blocks = model.embedding if model.head is None else model.head, layers(model)
    visible = [visible_keys[layer % len(visible_keys)] for layer in range(model.layers)]
    forward = np.prod(head.shape) + model.stream.work_per_token(blocks, visible)
    for block, keys in zip(blocks, visible, strict=True):
        forward += parameter.in_matrices(block) + keys * block.mixer.work_per_key + block.mixer.work_per_token
    return 3 * 2 * float(forward) - 2 * without_gradient


def attention_work(model: Transformer) -> int | float:
    """Numbers multiplied for a query and one key it sees, h * (d_qk + d_v), and what the stream adds: the mean over
    layers."""
    blocks = layers(model)
    added = [model.stream.work_per_token(blocks, [float(keys)] * model.layers) for keys in (1, 0)]
    return _mean([block.mixer.work_per_key for block in blocks], added[0] - added[1])


def cache_per_token_per_layer(model: Transformer) -> int | float:
    """Numbers that decoding keeps per token: the mean over layers, an int where they are alike."""
    return cache_per_device(model, 1)


def cache_bytes_per_token(model: Transformer) -> int:
    """Bytes that decoding keeps of a token in all layers, counted on the cache: one slot more of one row."""
    caches = [jax.eval_shape(functools.partial(model.init_cache, 1, length)) for length in (1, 2)]
    held = [sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((one.layers, one.stream))) for one in caches]
    return held[1] - held[0]


def cache_per_device(model: Transformer, devices: int) -> int | float | None:
    """Of `cache_per_token_per_layer`, what each of so many tensor-parallel devices holds: its share of the groups, or
    one whole group where there are fewer groups than devices. None where neither divides the other."""
    shapes = [list(mixer.cached) for mixer in mixers(model)] + [list(model.stream.cached(mixers(model)))]
    if any(groups % devices and devices % groups for layer in shapes for groups, _ in layer):
        return None
    held = [sum(max(1, groups // devices) * width for groups, width in layer) for layer in shapes]
    return _as_int(sum(held) / model.layers)


def state_per_layer(model: Transformer) -> int | float:
    """Numbers that decoding keeps per row, however long it is: the mean over layers."""
    return _mean([mixer.state_numbers for mixer in mixers(model)])


def layers(model: Transformer) -> list:
    """The blocks as layers have them, one after another; shapes only. Layer l is entry l % P of the layer pattern."""
    one = [jax.eval_shape(lambda b: jax.tree.map(lambda w: w[0], b), block) for block in model.blocks]
    return [one[layer % len(one)] for layer in range(model.layers)]


def mixers(model: Transformer) -> list:
    """Those of `layers`."""
    return [model.blocks[layer % len(model.blocks)].mixer for layer in range(model.layers)]


def _mean(numbers: list[int], added: float = 0) -> int | float:
    return _as_int((sum(numbers) + added) / len(numbers))


def _as_int(value: float) -> int | float:
    return int(value) if float(value).is_integer() else value
