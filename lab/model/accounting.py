"""What a model costs, by closed formulas over its declared shapes."""

from collections.abc import Callable

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
    for each entry of the layer pattern). Norms, activations and the softmax are left out.
    """
    head = model.embedding if model.head is None else model.head
    forward = 2.0 * np.prod(head.shape)
    for entry, (block, visible) in enumerate(zip(model.blocks, visible_keys, strict=True)):
        repeats = len(range(entry, model.layers, len(model.blocks)))
        forward += sum(2.0 * np.prod(w.shape) for w in jax.tree.leaves(parameter.split(block)[1]) if len(w.shape) > 2)
        forward += 2.0 * repeats * (visible * block.mixer.work_per_key + block.mixer.work_per_token)
    return 3.0 * float(forward)


def attention_work(model: Transformer) -> int | float:
    """Numbers multiplied for a query and one key it sees, h * (d_qk + d_v): the mean over layers."""
    return _mean_over_layers(model, lambda mixer: mixer.work_per_key)


def cache_per_token_per_layer(model: Transformer) -> int | float:
    """Numbers that decoding keeps per token: the mean over layers, an int where they are alike."""
    return _mean_over_layers(model, lambda mixer: sum(groups * width for groups, width in mixer.cached))


def cache_per_device(model: Transformer, devices: int) -> int | float | None:
    """Of `cache_per_token_per_layer`, what each of so many tensor-parallel devices holds: its share of the groups, or
    one whole group where there are fewer groups than devices. None where neither divides the other."""
    shapes = [shape for block in model.blocks for shape in block.mixer.cached]
    if any(groups % devices and devices % groups for groups, _ in shapes):
        return None
    return _mean_over_layers(
        model, lambda mixer: sum(max(1, groups // devices) * width for groups, width in mixer.cached)
    )


def state_per_layer(model: Transformer) -> int | float:
    """Numbers that decoding keeps per row, however long it is: the mean over layers."""
    return _mean_over_layers(model, lambda mixer: mixer.state_numbers)


def _mean_over_layers(model: Transformer, numbers: Callable) -> int | float:
    """Of a mixer's numbers; layer l is entry l % P of the layer pattern."""
    mean = sum(numbers(model.blocks[layer % len(model.blocks)].mixer) for layer in range(model.layers)) / model.layers
    return int(mean) if mean.is_integer() else mean
