"""Every variant of the model, read from the tables themselves, so that a new entry must keep the contracts."""

import pytest
import tiny
from ml_collections import ConfigDict

from lab.kernels import IMPLEMENTATIONS
from lab.kernels.rules import RULES
from lab.model.attention import OPTIONS
from lab.model.mixers import MIXERS
from lab.model.position import FREQUENCIES
from lab.model.transformer import REMAT, layer_specs

LOCAL_GLOBAL = ((("rule", "own_branch & window(3)"), ("rotary.theta", 10.0)), (("rule", "all_branches"),))

HYBRID = ((("mixer", "delta"), ("rule", "causal")), (("rule", "causal"),))


def mixer(name: str, **overrides) -> dict:
    """Overrides for a mixer whose heads rotate in part, on a rule that it supports."""
    rule = dict(model__rule=MIXERS[name].rules[0]) if MIXERS[name].rules else {}
    return dict(model__mixer=name, model__rotary__dim=4) | rule | overrides


def allowed(name: str, option: str) -> bool:
    return option not in MIXERS[name].refuses


VARIANTS = {
    "default": {},
    **{f"mixer {name}": mixer(name) for name in MIXERS},
    **{
        f"mixer {name}, every option": mixer(name, **{f"model__{o}": True for o in OPTIONS if allowed(name, o)})
        for name in MIXERS
        if any(allowed(name, o) for o in OPTIONS)
    },
    "mla with a query latent": mixer("mla", model__q_rank=10, model__kv_heads=1),
    "low rank, everything rotates": dict(model__q_rank=10, model__o_rank=9, model__rotate="qkvo"),
    "values of another width": dict(model__v_head_dim=12, model__rotary__dim=4, model__rotary__table="head"),
    "delta : attention": dict(model__pattern=HYBRID, model__layers=3),
    **{f"position {name}": dict(model__position=name) for name in FREQUENCIES},
    **{f"rule {name}": dict(model__rule=name) for name in RULES},
    "unselected time": dict(model__rotary__unselected="time"),
    "untied, capped, one group": dict(model__tied=False, model__softcap=3.0, model__kv_heads=1),
    "window": dict(model__rule="own_branch & window(3)"),
    "local : global": dict(model__pattern=LOCAL_GLOBAL, model__layers=3),
}
FAST = ("default", "local : global")
ON_RULES = {  # every mixer on every rule that it supports, beside the one that VARIANTS have
    f"{name} on {rule}": mixer(name, model__rule=rule)
    for name in MIXERS
    for rule in RULES
    if rule in (MIXERS[name].rules or RULES)
}


def marked(names=VARIANTS, fast=FAST) -> list:
    """Parameters of a test: a few variants run always, the others among the slow tests."""
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


def config(name: str, **overrides) -> ConfigDict:
    return tiny.config(**(VARIANTS | ON_RULES)[name] | overrides)


def in_order(name: str) -> bool:
    """Whether some layer needs its row whole."""
    model = config(name).model
    return any(MIXERS[spec.mixer].in_order for spec in layer_specs(model))


__all__ = ["FAST", "IMPLEMENTATIONS", "LOCAL_GLOBAL", "ON_RULES", "REMAT", "VARIANTS", "config", "in_order", "marked"]
