"""Every variant of the model, read from the tables themselves, so that a new entry must keep the contracts."""

import pytest
import tiny
from ml_collections import ConfigDict

from lab.kernels import IMPLEMENTATIONS
from lab.kernels.rules import RULES
from lab.model.attention import MIXERS
from lab.model.position import FREQUENCIES
from lab.model.transformer import REMAT

LOCAL_GLOBAL = ((("rule", "own_branch & window(3)"), ("rotary.theta", 10.0)), (("rule", "all_branches"),))

VARIANTS = {
    "default": {},
    **{f"mixer {name}": dict(model__mixer=name) for name in MIXERS},
    **{f"position {name}": dict(model__position=name) for name in FREQUENCIES},
    **{f"rule {name}": dict(model__rule=name) for name in RULES},
    "unselected time": dict(model__rotary__unselected="time"),
    "untied, capped, one group": dict(model__tied=False, model__softcap=3.0, model__kv_heads=1),
    "window": dict(model__rule="own_branch & window(3)"),
    "local : global": dict(model__pattern=LOCAL_GLOBAL, model__layers=3),
}
FAST = ("default", "local : global")


def marked(names=VARIANTS, fast=FAST) -> list:
    """Parameters of a test: a few variants run always, the others among the slow tests."""
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


def config(name: str, **overrides) -> ConfigDict:
    return tiny.config(**VARIANTS[name] | overrides)


__all__ = ["FAST", "IMPLEMENTATIONS", "LOCAL_GLOBAL", "REMAT", "VARIANTS", "config", "marked"]
