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

Published (configs/published/architecture_effects.csv: log-perplexity, one run each, seed noise about 0.005): gated
beats ungated by 0.01 to 0.05, SwiGLU 1.636 against GELU 1.679 and ReLU 1.677, SwiGLU and GeGLU cannot be told apart
(arXiv 2002.05202); RMSNorm 1.821 against LayerNorm 1.838, ReZero worse (arXiv 2102.11972); parallel blocks slightly
worse when small (PaLM, arXiv 2204.02311); post-norm needs its warm-up (arXiv 2002.04745); MQA and GQA lose little to
MHA (arXiv 2305.13245).
"""

import math

from lab.config import SIZES, base, sized
from lab.errors import choose
from lab.model import presets
from lab.model.feedforward import gated_width
from lab.study.define.cells import chain, matched, named

SWIGLU = "SwiGLU"
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


def expect(study, *claims: tuple[str, str, str]) -> None:
    """Hypotheses (claim, better, worse), each a contrast of two variants of which the first has the lower loss."""
    study.contrasts = tuple(dict.fromkeys(less(better, worse) for _, better, worse in claims))
    texts = dict.fromkeys(claim for claim, _, _ in claims)
    study.hypotheses = tuple(
        (text, tuple(("single", f"{better} - {worse}", -1) for claim, better, worse in claims if claim == text))
        for text in texts
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
        ("RMSNorm is at least as good as LayerNorm", "RMSNorm, pre", "LayerNorm"),
        ("Norms before sublayers beat norms after the sum", "RMSNorm, pre", "post"),
        ("A Transformer needs norms", "RMSNorm, pre", "none"),
    )


def part_activation(config) -> None:
    study, wide = config.study, 3 * config.model.feedforward.width // 2
    study.question = "Which activation, without a gate?"
    rows = {name: (("model.feedforward.name", row), ("model.feedforward.width", wide)) for name, row in UNGATED.items()}
    study.cells = cells(rows)
    study.baseline = (("variant", "ReLU"),)
    study.published = "configs/published/architecture_effects.csv"
    expect(study, ("Smooth activations beat ReLU", "GELU", "ReLU"), ("Smooth activations beat ReLU", "Swish", "ReLU"))


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
    expect(
        study,
        ("Gated units beat ungated ones", "ReGLU", "ReLU"),
        ("Gated units beat ungated ones", "GeGLU", "GELU"),
        ("Gated units beat ungated ones", SWIGLU, "Swish"),
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
        ("Serial blocks beat parallel ones when small", "serial", "parallel, one norm"),
        ("Layers need no biases", "serial", "biases"),
        ("ReZero is worse", "serial", "ReZero"),
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
        ("RoPE beats positions that are added", "RoPE", "sinusoidal"),
        ("RoPE beats positions that are added", "RoPE", "learned"),
        ("RoPE beats biases", "RoPE", "T5 bias"),
        ("RoPE beats biases", "RoPE", "ALiBi"),
        ("Positions are worth having", "RoPE", "none"),
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
    expect(study, ("QK-norm lowers the loss", "QK-norm", "none"))


def part_heads(config) -> None:
    """Key heads are matched on parameters by the feed-forward; how many heads share one width needs no match."""
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
    expect(study, ("Fewer key heads cost loss", "MHA", "MQA"))


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
