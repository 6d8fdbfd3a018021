"""Every variant of the model, read from the tables themselves, so that a new entry must keep the contracts."""

import pytest
import tiny
from ml_collections import ConfigDict

from lab import kernels
from lab.kernels.rules import RULES
from lab.model.execution import REMAT
from lab.model.mixers import MIXERS
from lab.model.placement import OF_SUBLAYERS
from lab.model.position import POSITIONS
from lab.model.spec import layer_specs
from lab.model.streams import STREAMS

IMPLEMENTATIONS = [
    name for name, row in kernels.IMPLEMENTATIONS.items() if row.platform in (None, "cpu") or row.interpretable
]  # those that run here

LOCAL_GLOBAL = ((("rule", "own_branch & window(3)"), ("position.theta", 10.0)), (("rule", "all_branches"),))

ROW = 32  # tokens that the contracts give a model at most

SIZES = dict(length=ROW, copies=2, rank=3, blocks=3)  # of streams that read them

OPTIONS = ("output_gate", "sink", "qk_norm")  # that add one thing to any softmax mixer that reads them

OWN_AND_LEARNED = (  # biases of each layer; a mixer that splits its heads, without a rotation, and a learned code
    (("position.shared", False),),
    (("position.name", "learned"), ("position.length", ROW), ("mixer.name", "mla"), ("mixer.latent", 12)),
)
DENSE_AND_SHARED = ((), (("position.name", "t5"), ("position.buckets", 8), ("position.distance", 20)))
ROTATING = [name for name, row in POSITIONS.items() if row.frequencies]

STRETCHED = (  # two maps of time, keys that rotate when they are read; and one, in a cache of rotated keys
    (("position.map.name", "self-extend"), ("position.map.window", 4), ("position.map.group", 2),
     ("position.log_n", True)),
    (("position.map.name", "hybrid"), ("position.scaling.name", "yarn"), ("position.scaling.factor", 2.0)),
)  # fmt: skip

HYBRID = ((("mixer.name", "delta"), ("rule", "causal")), (("rule", "causal"), ("mixer.sink", True)))


POST_NORMED = dict(  # as it was at first, and what composes with it
    model__placement__name="post", model__norm__name="layer", model__norm__bias=True, model__mixer__bias="all",
    model__feedforward__name="gelu", model__feedforward__bias=True, model__branch__name="rezero",
    model__init__name="deepnorm", model__embedding_scale=4.0,
)  # fmt: skip
PARALLEL = dict(
    model__stream__name="parallel", model__placement__name="sandwich", model__norm__name="rms-zero",
    model__feedforward__name="geglu-tanh", model__feedforward__bias=True, model__branch__name="layer-scale",
    model__logit_softcap=10.0,
)  # fmt: skip
LIKE_PLAIN = ("parallel", "parallel-two")  # streams without state or weights of their own: test_transformer.py has them


def mixer(name: str, **overrides) -> dict:
    """Overrides for a mixer whose heads rotate in part, on a rule that it supports."""
    rule = dict(model__rule=MIXERS[name].rules[0]) if MIXERS[name].rules else {}
    latent = dict(model__mixer__latent=12) if "latent" in MIXERS[name].options else {}
    return dict(model__mixer__name=name, model__position__dim=4) | rule | latent | overrides


def stream(name: str, **overrides) -> dict:
    """Overrides for a stream over three layers: one is the first, one the last, and one neither."""
    sizes = {f"model__stream__{field}": size for field, size in SIZES.items() if field in STREAMS[name].options}
    return dict(model__stream__name=name, model__layers=3) | sizes | overrides


def config_rule(name: str) -> str:
    """The rule of `mixer(name)`."""
    return tiny.config(**mixer(name)).model.rule


def allowed(name: str, option: str) -> bool:
    return option in MIXERS[name].options


VARIANTS = {
    "default": {},
    **{f"mixer {name}": mixer(name) for name in MIXERS},
    **{
        f"mixer {name}, every option": mixer(name, **{f"model__mixer__{o}": True for o in OPTIONS if allowed(name, o)})
        for name in MIXERS
        if any(allowed(name, o) for o in OPTIONS)
    },
    "mla with a query latent": mixer("mla", model__mixer__q_rank=10, model__mixer__kv_heads=1),
    "low rank, everything rotates": dict(model__mixer__q_rank=10, model__mixer__o_rank=9, model__mixer__rotate="qkvo"),
    "values of another width": dict(model__mixer__v_head_dim=12, model__position__dim=4, model__position__table="head"),
    "self-extend : hybrid": dict(
        model__pattern=STRETCHED, model__position__unselected="time", model__position__trained=5
    ),
    "delta : attention": dict(model__pattern=HYBRID, model__layers=3),
    **{f"position {name}": dict(model__position__name=name) for name in ROTATING},
    "t5 : learned": dict(model__position__name="t5", model__pattern=OWN_AND_LEARNED),
    "shaw : t5": dict(model__position__name="shaw", model__position__clip=3, model__pattern=DENSE_AND_SHARED),
    **{f"placement {name}": dict(model__placement__name=name) for name in OF_SUBLAYERS},
    **{f"rule {name}": dict(model__rule=name) for name in RULES},
    "post-normed": POST_NORMED,
    "parallel": PARALLEL,
    "unselected time": dict(model__position__unselected="time"),
    "untied, capped, one group": dict(model__tied=False, model__mixer__softcap=3.0, model__mixer__kv_heads=1),
    "window": dict(model__rule="own_branch & window(3)"),
    "local : global": dict(model__pattern=LOCAL_GLOBAL, model__layers=3),
    "stream v1m7, sandwich": stream("v1m7", model__placement__name="sandwich"),
    "stream v3m1, output": stream("v3m1", model__placement__name="output"),
    "stream v1m7, local : global": stream("v1m7", model__pattern=LOCAL_GLOBAL),
    "stream v3m3.2, local : global": stream("v3m3.2", model__pattern=LOCAL_GLOBAL),
    **{f"stream {name}": stream(name) for name in ("v2m3", "v4m4", "v4m1A", "v4m1E", "v4mD", "hyper", "muddformer")},
}
FAST = ("default",)
SCANNED = (*FAST, "local : global", "delta : attention", "mixer mla", "stream v1m7, local : global")
ON_RULES = {  # every mixer on every rule that it supports, beside those that VARIANTS have
    f"{name} on {rule}": mixer(name, model__rule=rule)
    for name in MIXERS
    for rule in RULES
    if name != "attention" and rule in (MIXERS[name].rules or RULES) and rule != config_rule(name)
}
LOOK_INSIDE = {"v3m1": STREAMS["v3m1"].mixers, "v4m1": STREAMS["v4m1"].mixers, "v4mD": ("forgetting",)}
ON_STREAMS = {  # every stream, and those that look into mixers on each of these, for the cheaper contracts
    **{
        f"stream {name}": stream(name)
        for name in STREAMS
        if not {name, f"stream {name}"} & {"plain", *LIKE_PLAIN, *VARIANTS}
    },
    **{
        f"stream {name} on {mixer_name}": mixer(mixer_name, **stream(name))
        for name, mixers in LOOK_INSIDE.items()
        for mixer_name in mixers
        if mixer_name != "attention"
    },
}


def marked(names=VARIANTS, fast=FAST) -> list:
    """Parameters of a test: a few variants run always, the others among the slow tests."""
    return [pytest.param(name, marks=[] if name in fast else pytest.mark.slow) for name in names]


def config(name: str, **overrides) -> ConfigDict:
    return tiny.config(**(VARIANTS | ON_RULES | ON_STREAMS)[name] | overrides)


def both_ways(parameters: list) -> list:
    """(variant, scan): unrolled as marked; and a few scanned, since one test compares every variant's two ways."""
    unrolled = [pytest.param(*each.values, False, marks=each.marks) for each in parameters]
    return unrolled + [pytest.param(name, True, marks=pytest.mark.slow) for name in SCANNED]


def scanned(parameters: list) -> list:
    """Those whose layers can be scanned."""
    return [each for each in parameters if not STREAMS[config(each.values[0]).model.stream.name].grows]


def in_order(name: str) -> bool:
    """Whether some layer needs its row whole."""
    model = config(name).model
    return any(MIXERS[spec.mixer.name].in_order for spec in layer_specs(model))


__all__ = [
    "FAST",
    "IMPLEMENTATIONS",
    "LIKE_PLAIN",
    "LOCAL_GLOBAL",
    "ON_RULES",
    "ON_STREAMS",
    "PARALLEL",
    "POST_NORMED",
    "REMAT",
    "SCANNED",
    "VARIANTS",
    "both_ways",
    "config",
    "in_order",
    "marked",
    "scanned",
    "stream",
]
