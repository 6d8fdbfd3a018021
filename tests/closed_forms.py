"""What a model costs, by the formulas of the papers, made without the code under test."""

import functools
import math

ROTATING = ("rope2d", "sequential", "fourier", "learned-branch")
NORMS_OF_SUBLAYER = {"pre": 1, "output": 1, "sandwich": 2, "post": 1, "deepnorm": 1}
NORM_THE_STREAM = ("post", "deepnorm")  # placements after which the head needs no norm
GATED = ("swiglu", "geglu", "geglu-tanh", "reglu", "glu", "bilinear")  # feed-forwards of three matrices


def widths(model) -> tuple[int, int, int]:
    """(K, R, V): a head of queries and keys, its rotated part, a head of values."""
    K = model.mixer.head_dim
    R = (model.position.dim or K) if model.position.name in ROTATING else 0
    return K, R, K - R if model.mixer.name == "s3" else model.mixer.v_head_dim or K


def of_norm(model) -> int:
    """Numbers of a norm for each channel."""
    return (model.norm.name != "none") * (1 + model.norm.bias)


def feedforward_parameters(model) -> tuple[int, int]:
    """(numbers in matrices, numbers in biases) of one feed-forward sublayer."""
    D, F, into = model.dim, model.feedforward.width, 2 if model.feedforward.name in GATED else 1
    return (into + 1) * D * F, model.feedforward.bias * (into * F + D)


def branch_parameters(model) -> int:
    """What the outputs of a layer's two sublayers are multiplied with."""
    return 2 * {"plain": 0, "rezero": 1, "layer-scale": model.dim}[model.branch.name]


def mixer_parameters(model) -> tuple[int, int]:
    """(numbers in matrices, numbers in scales and biases) of one mixer."""
    D, H, G, C = model.dim, model.mixer.heads, model.mixer.kv_heads, model.mixer.latent
    K, R, V = widths(model)
    maps, N = H * (2 if model.mixer.name == "differential" else 1), K - R
    if model.mixer.name == "delta":
        return D * H * (2 * K + 2 * V) + 2 * D * H + H * V * D, 2 * H + V * of_norm(model)
    own = {
        "attention": D * G * (K + V),
        "differential": D * G * (K + V) + D * H,
        "forgetting": D * G * (K + V) + D * H,
        "mla": D * (G * C + R) + C * H * (N + V),
        "s1": D * G * (N + R + V - N),
        "gta": D * (G * N + R + G * (V - N)),
        "s2": D * G * K,
        "s3": D * G * K,
    }[model.mixer.name]
    full = lambda rank, inner: rank * (D + inner) if rank else D * inner  # noqa: E731
    m = model.mixer
    matrices = own + full(m.q_rank, maps * K) + full(m.o_rank, H * V) + m.output_gate * D * H * V
    latents = {"mla": C + m.q_rank, "s3": N}.get(m.name, 0) * m.latent_norm
    biases = {"none": 0, "qkv": H * K + G * (K + V), "all": H * K + G * (K + V) + D}[m.bias]
    of_qk = (maps + G if m.qk_norm_over == "heads" else 2) * K
    normed = (latents + m.qk_norm * of_qk) * of_norm(model)
    return matrices, normed + (H if m.name == "forgetting" else 0) + m.sink * maps + biases


def cache(model) -> int:
    """Numbers of a token in one layer."""
    H, G = model.mixer.heads, model.mixer.kv_heads
    K, R, V = widths(model)
    return {
        "attention": G * (K + V),
        "differential": G * (K + V),
        "forgetting": G * (K + V) + 2 * H,
        "mla": G * model.mixer.latent + R,
        "s1": G * (K + V - (K - R)),
        "gta": G * V + R,
        "s2": G * K,
        "s3": G * K,
        "delta": 0,
    }[model.mixer.name]


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
    """(numbers in matrices, in scales, biases and the stream) of a whole model, embeddings among the matrices."""
    specs = layers(model)
    sublayers = [of(spec) for spec in specs for of in (mixer_parameters, feedforward_parameters)]
    shared = model.stream.name == "parallel"  # the norm before both sublayers
    norms = sum((2 * NORMS_OF_SUBLAYER[spec.placement.name] - shared) * of_norm(spec) for spec in specs)
    norms += (specs[-1].placement.name not in NORM_THE_STREAM) * of_norm(model)
    vectors = sum(v for _, v in sublayers) + norms * model.dim + sum(map(branch_parameters, specs))
    vectors += biases_of_scores(model)
    return sum(m for m, _ in sublayers) + embeddings(model), vectors + stream_parameters(model)


def embeddings(model) -> int:
    """Of tokens, the output head where it is another, and of times or branches, 0 among these."""
    learned = [spec.position.length for spec in layers(model) if spec.position.name == "learned"]
    learned += [spec.position.branches + 1 for spec in layers(model) if spec.position.name == "learned-branch"]
    return ((1 if model.tied else 2) * model.vocabulary + max(learned, default=0)) * model.dim


def maps(spec) -> int:
    """Of attention, in a layer."""
    return spec.mixer.heads * (2 if spec.mixer.name == "differential" else 1)


def biases_of_scores(model) -> int:
    """What positions learn for scores: a number for each map and bucket, of a layer or of all; and of each layer two
    vectors for every distance."""
    shared, own = set(), 0
    for spec in layers(model):
        K, _, V = widths(spec)
        if spec.position.name == "t5" and spec.position.shared:
            shared.add(maps(spec) * spec.position.buckets)
        elif spec.position.name == "t5":
            own += maps(spec) * spec.position.buckets
        elif spec.position.name == "shaw":
            own += (2 * spec.position.clip + 1) * (K + V)
    return own + sum(shared)


def distance_work(model) -> int:
    """Multiplications for a token with the vectors of distances, in all layers."""
    specs = [spec for spec in layers(model) if spec.position.name == "shaw"]
    return sum(maps(spec) * (2 * spec.position.clip + 1) * sum(widths(spec)[::2]) for spec in specs)


def stream_parameters(model) -> int:
    """What a stream learns beside the plain model: L layers, width D, rows of T; pairs of a layer and one so far."""
    L, D, T = model.layers, model.dim, model.stream.length
    pairs = L * (L + 1) // 2
    inferred = L * D + (D + 1) * pairs + L * (L + 1) * (2 * L + 1) // 6
    own = {
        **dict.fromkeys(("plain", "parallel", "parallel-two"), 0),
        **dict.fromkeys(("v2m1", "v2m2", "v3m1", "v3m2", "v3m3.1", "v3m4.1", "v4m1", "v4m2", "v4m3"), 0),
        **{f"v1m{number}": 0 for number in range(1, 8)},
        **dict.fromkeys(("v2m3", "v3m3.2", "v3m4.2"), pairs - 1),
        "v4m4": 2 * L,
        "v4m5": pairs,
        "v4m6": 2 * pairs,
        "v4m7": pairs,
        "v4m1A": T * T * pairs,
        "v4m1B": T * pairs,
        "v4m1C": T * pairs,
        "v4m1D": inferred,
        "v4m1E": inferred,
        "v4mC": L * T,
        "v4mD": L * (2 * D + 2),
        "temperature": L,
    }
    return own[model.stream.name] if model.stream.name in own else beside(model)[0]


def beside(model) -> tuple[int, int]:
    """(parameters, multiplications for a token) of the streams that other papers propose: N copies, rank R."""
    L, D, N, R = model.layers, model.dim, model.stream.copies, model.stream.rank
    ways = [4] * (L - 1) + [1]
    dynamic = [w * (m + 2) for m, w in enumerate(ways)]
    sources = {"attnres": 1, "attnres-block": 2 * L // max(model.stream.blocks, 1)}.get(model.stream.name, 1)
    read = sum(1 + math.ceil(s / sources) for s in range(1, 2 * L + 1))
    return {
        "denseformer": (L * (L + 3) // 2, 0),
        "muddformer": (sum(n * (D + n + 1) for n in dynamic), sum(n * (D + n) for n in dynamic)),
        "hyper": (2 * L * (D + N * (N + 1) + N + D * (N + 1) + D + 2), 2 * L * N * D * (N + 2)),
        "mhc": (2 * L * (N * D + N * D * N * (N + 2) + 3 + N * (N + 2)), 2 * L * N * D * N * (N + 2)),
        "resformer": (2 * (L - 1), 0),
        "laurel": (2 * L * (2 + 2 * D * R), 2 * L * 2 * D * R),
        "attnres": (2 * L * D, read * D),
        "attnres-block": (2 * L * D, read * D),
        "lime": (model.mixer.kv_heads * (L * (L + 1) // 2 - 1), 0),
        "unet": (L // 2, 0),
    }[model.stream.name]


def stream_work(model, keys: int) -> int:
    """Multiplications of a stream for a token that sees so many keys, beside those of the layers."""
    L, D, name = model.layers, model.dim, model.stream.name
    earlier = L * (L - 1) // 2
    K, _, V = widths(model)
    if name.startswith("v3"):
        replayed = D * model.mixer.kv_heads * V + model.mixer.heads * V * D + keys * model.mixer.heads * (K + V)
        return earlier * (replayed + feedforward_parameters(model)[0] * (name in ("v3m1", "v3m3.1", "v3m3.2")))
    if name == "v4mD":
        return L * (D + 1)
    if name.startswith("v4") and name != "v4mC":
        inferred = sum(D * M + M * M for M in range(1, L + 1)) if name in ("v4m1D", "v4m1E") else 0
        return earlier * keys * model.mixer.heads * K + inferred
    free = name in ("plain", "parallel", "parallel-two", "temperature", "v4mC") or name[:2] in ("v1", "v2")
    return 0 if free else beside(model)[1]


def stream_cache(model) -> int:
    """Numbers of a token that a stream keeps beside the caches of the layers."""
    L, name = model.layers, model.stream.name
    if name.startswith("v3"):
        return L * (L - 1) // 2 * model.mixer.kv_heads * widths(model)[2]
    return L * (L + 1) // 2 if name == "v4m1E" else 0
