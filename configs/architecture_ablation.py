"""Which parts of a Transformer earn their place: norms, activations, blocks, positions, stabilisers, heads, masks?

    python -m lab.main --config=configs/architecture_ablation.py                # :cpu, the part "norm", 6 minutes
    python -m lab.main --config=configs/architecture_ablation.py:cpu-activation # and gated, block, position,
    python -m lab.main --config=configs/architecture_ablation.py:cpu-masks      #     stability, heads, masks, named
    python -m lab.plan --config=configs/architecture_ablation.py:paper-gated    # :gpu and :paper have the same parts

A part changes one thing of one baseline: RMSNorm before each sublayer, SwiGLU of 8/3 the width, RoPE, as many key heads
as query heads, no biases. Gated units have 2/3 of the width of others, so that parameters are equal. What changes
parameters otherwise is left as it is (at :cpu by 2 to 8% for an untied head, learned or relative positions, by 1% or so
for norms and biases); key heads and named models are matched by the feed-forward. On a GPU the part "position" runs on
the implementation tiled, slowly: no kernel adds biases to scores yet.

Published: what each part expects below, with its sources; the report sets it beside our differences. Of activations and
gates also configs/published/architecture_effects.csv (log-perplexity, one run each, seed noise about 0.005): gates win
by 0.01 to 0.05, and SwiGLU and GeGLU cannot be told apart. `python benchmarks/options.py` measures what every variant
costs in time, bytes and FLOPs.
"""

import math

from lab.config import SIZES, add_ask, base, sized
from lab.errors import choose
from lab.model import presets
from lab.model.feedforward import gated_width
from lab.study.define.cells import chain, matched, named

SWIGLU = "SwiGLU"
SHAZEER, NARANG = "(arXiv 2002.05202)", "(arXiv 2102.11972)"
GATED = {SWIGLU: "swiglu", "GeGLU": "geglu", "ReGLU": "reglu", "GLU": "glu", "bilinear": "bilinear"}
UNGATED = {
    "ReLU": "relu", "GELU": "gelu", "Swish": "swish", "ELU": "elu", "SELU": "selu", "ReLU squared": "squared-relu",
    "sigmoid": "sigmoid", "softplus": "softplus",
}  # fmt: skip


def cells(variants: dict):
    return chain(*(named(name, *pairs) for name, pairs in variants.items()))


def less(plus: str, minus: str):
    """The contrast of two variants."""
    return f"{plus} - {minus}", (("variant", plus),), (("variant", minus),)


def expect(study, *claims: tuple[str, str, str] | tuple[str, str, str, str]) -> None:
    """Hypotheses (claim, better, worse), each a contrast of two variants of which the first has the lower loss; a last
    word says what was published of it, and where."""
    study.contrasts = tuple(dict.fromkeys(less(better, worse) for _, better, worse, *_ in claims))
    study.hypotheses = tuple(
        (claim, (("single", f"{better} - {worse}", -1),), *published) for claim, better, worse, *published in claims
    )


def part_norm(config) -> None:
    study = config.study
    study.question = "Which norm, and where around a sublayer?"
    layer, bias = ("model.norm.name", "layer"), ("model.norm.bias", True)
    study.cells = cells(
        {
            "RMSNorm, pre": (),
            "LayerNorm": (layer,),
            "LayerNorm, bias": (layer, bias),
            "RMSNorm, decayed": (("train.decay", "all"),),
            "zero-centred, decayed": (("train.decay", "all"), ("model.norm.name", "rms-zero")),
            "none": (("model.norm.name", "none"),),
            "post": (("model.placement.name", "post"),),
            "sandwich": (("model.placement.name", "sandwich"),),
            "output only": (("model.placement.name", "output"),),
        }
    )
    study.baseline = (("variant", "RMSNorm, pre"),)
    expect(
        study,
        ("RMSNorm beats LayerNorm", "RMSNorm, pre", "LayerNorm", f"1.821 against 1.838 {NARANG}"),
        (
            "Norms before sublayers beat norms after the sum",
            "RMSNorm, pre",
            "post",
            "without a warm-up, which is here (arXiv 2002.04745)",
        ),
        ("A Transformer needs norms", "RMSNorm, pre", "none"),
    )


def part_activation(config) -> None:
    study, wide = config.study, 3 * config.model.feedforward.width // 2
    study.question = "Which activation, without a gate?"
    rows = {name: (("model.feedforward.name", row), ("model.feedforward.width", wide)) for name, row in UNGATED.items()}
    study.cells = cells(rows)
    study.baseline = (("variant", "ReLU"),)
    study.published = "configs/published/architecture_effects.csv"
    study.sections = ("series", "curves")
    expect(
        study,
        ("Swish is worse than ReLU", "ReLU", "Swish", f"1.677 against 1.683 {SHAZEER}, 1.838 against 1.847 {NARANG}"),
        ("ReLU squared beats ReLU", "ReLU squared", "ReLU", "at equal compute (arXiv 2109.08668)"),
    )


def part_gated(config) -> None:
    """Gated units have 2/3 of the width."""
    study, wide = config.study, 3 * config.model.feedforward.width // 2
    study.question = "Does a gate earn its third matrix, at equal parameters?"
    alone = {name: UNGATED[name] for name in ("ReLU", "GELU", "Swish")}
    study.cells = cells(
        {name: (("model.feedforward.name", row), ("model.feedforward.width", wide)) for name, row in alone.items()}
        | {
            name: (("model.feedforward.name", row), ("model.feedforward.width", gated_width(wide)))
            for name, row in GATED.items()
        }
    )
    study.baseline = (("variant", "ReLU"),)
    study.published = "configs/published/architecture_effects.csv"
    study.sections = ("series", "curves")
    expect(
        study,
        ("A gate helps ReLU", "ReGLU", "ReLU", f"1.645 against 1.677 {SHAZEER}, 1.803 against 1.838 {NARANG}"),
        ("A gate helps GELU", "GeGLU", "GELU", f"1.633 against 1.679 {SHAZEER}, 1.792 against 1.838 {NARANG}"),
        ("A gate helps Swish", SWIGLU, "Swish", f"1.636 against 1.683 {SHAZEER}, 1.789 against 1.847 {NARANG}"),
        (f"{SWIGLU} beats ReLU", SWIGLU, "ReLU", f"1.636 against 1.677 {SHAZEER}, 1.789 against 1.838 {NARANG}"),
    )


def part_block(config) -> None:
    study = config.study
    study.question = "Serial or parallel, with or without biases, a scaled branch, a tied head?"
    biases = ("model.mixer.bias", "all"), ("model.feedforward.bias", True)
    study.cells = cells(
        {
            "serial": (),
            "parallel, one norm": (("model.stream.name", "parallel"),),
            "parallel, two norms": (("model.stream.name", "parallel-two"),),
            "biases": biases,
            "layer scale": (("model.branch.name", "layer-scale"),),
            "ReZero": (("model.branch.name", "rezero"),),
            "untied head": (("model.tied", False),),
            "scaled embedding": (("model.embedding_scale", math.sqrt(config.model.dim)),),
        }
    )
    study.baseline = (("variant", "serial"),)
    expect(
        study,
        (
            "Serial blocks beat parallel ones when small",
            "serial",
            "parallel, one norm",
            "a little at 8B, not at 62B; parallel ones are 15% faster (arXiv 2204.02311)",
        ),
        ("Layers need no biases", "serial", "biases"),
        ("ReZero is worse", "serial", "ReZero", f"early in training 2.182 against 2.262 {NARANG}"),
    )


def part_position(config) -> None:
    study, position = config.study, "model.position.name"
    study.question = "How should the position of a token enter?"
    longest = config.data.text_length
    none = (("position.name", "none"),)
    study.cells = cells(
        {
            "RoPE": (),
            "none": ((position, "none"),),
            "sinusoidal": ((position, "sinusoidal"),),
            "learned": ((position, "learned"), ("model.position.length", longest)),
            "T5 bias": ((position, "t5"),),
            "Shaw": ((position, "shaw"),),
            "ALiBi": ((position, "alibi"),),
            "partial RoPE": (("model.position.dim", config.model.mixer.head_dim // 4),),
            "p-RoPE 3/4": (("model.position.share", 0.75),),
            "NoPE every second": (("model.pattern", ((), none)),),
        }
    )
    study.baseline = (("variant", "RoPE"),)
    expect(
        study,
        ("RoPE beats sinusoidal positions", "RoPE", "sinusoidal", "it learns faster (arXiv 2104.09864)"),
        ("RoPE beats learned positions", "RoPE", "learned"),
        ("RoPE beats biases of buckets", "RoPE", "T5 bias"),
        ("RoPE beats ALiBi", "RoPE", "ALiBi"),
        ("ALiBi beats sinusoidal positions", "ALiBi", "sinusoidal", "arXiv 2108.12409, 2203.16634"),
        ("Positions are worth having", "RoPE", "none"),
        ("Positions are worth having, learned ones too", "learned", "none", "a little (arXiv 2203.16634)"),
    )


def part_stability(config) -> None:
    """At the usual rate: what stabilisers cost. configs/stability_ablation.py has the rates that they are for."""
    study = config.study
    study.question = "What do stabilisers cost where training is stable without them?"
    study.cells = cells(
        {
            "none": (),
            "z-loss": (("train.z_loss", 1e-4),),
            "QK-norm": (("model.mixer.qk_norm", True),),
            "scores capped at 50": (("model.mixer.softcap", 50.0),),
            "logits capped at 30": (("model.logit_softcap", 30.0),),
            "no clipping": (("train.clip", math.inf),),
        }
    )
    study.baseline = (("variant", "none"),)
    published = "perplexity 10.84 against 11.19 (arXiv 2410.16682)"
    expect(study, ("QK-norm lowers the loss", "QK-norm", "none", published))


def part_heads(config) -> None:
    """Key heads are matched on parameters by the feed-forward; how many heads share one width needs no match. Texts are
    read one token at a time too, 64 at once, as decoding does: the report has how fast that is, under Runs."""
    study, mixer = config.study, config.model.mixer
    study.question = "How many key heads, and how wide a head?"
    shape = lambda heads, width, groups: (  # noqa: E731
        ("model.mixer.heads", heads), ("model.mixer.kv_heads", groups), ("model.mixer.head_dim", width)
    )  # fmt: skip
    heads, width = mixer.heads, mixer.head_dim
    first = named("MHA", *shape(heads, width, heads))
    groups = {f"GQA-{g}": shape(heads, width, g) for g in (heads // 2, heads // 4) if g > 1}
    groups["MQA"] = shape(heads, width, 1)
    cut = {
        f"{n} heads of {heads * width // n}": shape(n, heads * width // n, n)
        for n in (1, 2, 4, 8, 16, 32) if n != heads and heads * width % n == 0 and 4 <= heads * width // n <= 256
    }  # fmt: skip
    by = dict(to="MHA", on="parameters", by="model.feedforward.width")
    study.cells = chain(first, matched(cells(groups), **by), cells(cut))
    study.baseline = (("variant", "MHA"),)
    texts = min(512, config.evaluate.loss.texts)  # 0, all there are, where the embedded corpus has fewer
    text = dict(lengths=(config.data.text_length,), stride=0, documents=128, texts=texts)
    add_ask(config, "decode", "length", chunk=1, rows=64, **text)
    quality = "quality of T5-XXL 47.2, 47.1 with 8 groups, 46.6 with one (arXiv 2305.13245)"
    expect(
        study,
        ("One key head costs loss", "MHA", "MQA", quality),
        ("Some key heads cost less than one does", next(iter(groups)), "MQA", quality),
        ("Many narrow heads cost loss", "MHA", [*cut][-1], "narrower than the context is long (arXiv 2002.07028)"),
    )


def part_masks(config) -> None:
    study, length = config.study, config.data.text_length
    study.question = "What does a token lose that sees less?"
    near = max(2, round(math.sqrt(length)))
    rule = lambda text: ("rule", text)  # noqa: E731
    window, strided, fixed = f"causal & window({near})", f"causal & strided({near})", f"causal & fixed({near}, 2)"
    local = rule(window), ("position.theta", 100.0)
    study.cells = cells(
        {
            "full": (),
            window: (("model.rule", window),),
            strided: (("model.rule", strided),),
            fixed: (("model.rule", fixed),),
            "local : global 3 : 1": (("model.pattern", (local, local, local, ())),),
            "the same, global without RoPE": (
                ("model.pattern", (local, local, local, (("position.name", "none"),))),
            ),
        }
    )  # fmt: skip
    study.baseline = (("variant", "full"),)
    expect(
        study,
        ("A strided mask loses less than a window", strided, window),
        ("A fixed mask is better for text than a strided one", fixed, strided, "enwik8 (arXiv 1904.10509)"),
        ("Global layers help", "local : global 3 : 1", window),
    )


def part_named(config) -> None:
    """All with LLaMA's parameters, by the width of the feed-forward."""
    study, first = config.study, "llama"
    study.question = "Which named model's parts are best at one size?"
    length = ("model.position.length", config.data.text_length)
    others = {
        name: (*presets.overrides(config.model, name), *[length] * (name == "gpt2"))
        for name in presets.PRESETS
        if name != first
    }
    study.cells = chain(
        named(first, *presets.overrides(config.model, first)),
        matched(cells(others), to=first, on="parameters", by="model.feedforward.width"),
    )
    study.baseline = (("variant", first),)


PARTS = {
    "norm": part_norm, "activation": part_activation, "gated": part_gated, "block": part_block,
    "position": part_position, "stability": part_stability, "heads": part_heads, "masks": part_masks,
    "named": part_named,
}  # fmt: skip


SCALES = {f"{size}-{part}" if part != "norm" else size: (size, part) for size in SIZES for part in PARTS}


def get_config(scale: str = "cpu"):
    size, part = SCALES[choose("the scale of configs/architecture_ablation.py", scale, SCALES)]
    config = sized(base(), size)
    config.study.name = f"architecture_ablation_{part}"
    config.study.labels = (("name", "variant"),)
    config.study.sections = ("curves",)
    PARTS[part](config)
    return config
