"""What a model costs, by the formulas of the papers, made without the code under test."""

import functools


def widths(model) -> tuple[int, int, int]:
    """(K, R, V): a head of queries and keys, its rotated part, a head of values."""
    K = model.head_dim
    R = model.rotary.dim or K
    return K, R, K - R if model.mixer == "s3" else model.v_head_dim or K


def mixer_parameters(model) -> tuple[int, int]:
    """(numbers in matrices, numbers in scales and biases) of one mixer."""
    D, H, G, C = model.dim, model.heads, model.kv_heads, model.latent
    K, R, V = widths(model)
    maps, N = H * (2 if model.mixer == "differential" else 1), K - R
    if model.mixer == "delta":
        return D * H * (2 * K + 2 * V) + 2 * D * H + H * V * D, 2 * H + V
    own = {
        "attention": D * G * (K + V),
        "differential": D * G * (K + V) + D * H,
        "forgetting": D * G * (K + V) + D * H,
        "mla": D * (G * C + R) + C * H * (N + V),
        "s1": D * G * (N + R + V - N),
        "gta": D * (G * N + R + G * (V - N)),
        "s2": D * G * K,
        "s3": D * G * K,
    }[model.mixer]
    full = lambda rank, inner: rank * (D + inner) if rank else D * inner  # noqa: E731
    matrices = own + full(model.q_rank, maps * K) + full(model.o_rank, H * V) + model.output_gate * D * H * V
    latents = {"mla": C + model.q_rank, "s3": N}.get(model.mixer, 0) * model.latent_norm
    return matrices, latents + (H if model.mixer == "forgetting" else 0) + model.sink * maps + model.qk_norm * 2 * K


def cache(model) -> int:
    """Numbers of a token in one layer."""
    H, G = model.heads, model.kv_heads
    K, R, V = widths(model)
    return {
        "attention": G * (K + V),
        "differential": G * (K + V),
        "forgetting": G * (K + V) + 2 * H,
        "mla": G * model.latent + R,
        "s1": G * (K + V - (K - R)),
        "gta": G * V + R,
        "s2": G * K,
        "s3": G * K,
        "delta": 0,
    }[model.mixer]


def layers(model) -> list:
    """The model config as each layer has it."""
    specs = []
    for layer in range(model.layers):
        specs.append(model.copy_and_resolve_references())
        for field, value in model.pattern[layer % len(model.pattern)]:
            *path, name = field.split(".")
            functools.reduce(lambda node, part: node[part], path, specs[-1])[name] = value
    return specs


def parameters(model) -> tuple[int, int]:
    """(numbers in matrices, numbers in scales and biases) of a whole model, embeddings among the matrices."""
    mixers = [mixer_parameters(spec) for spec in layers(model)]
    matrices = sum(m for m, _ in mixers) + model.layers * 3 * model.dim * model.ffn
    vectors = sum(v for _, v in mixers) + (2 * model.layers + 1) * model.dim
    return matrices + (1 if model.tied else 2) * model.vocabulary * model.dim, vectors
