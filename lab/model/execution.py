"""How a model runs, which changes nothing of what it computes but rounding: some fields of config.run."""

from typing import NamedTuple

import jax

from lab import kernels
from lab.kernels import residuals
from lab.options import Option

REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, residuals.policy
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}
OPTIONS = {
    "implementation": Option("auto", "of attention", choices=("auto", *kernels.IMPLEMENTATIONS)),
    "scan": Option(False, "lax.scan over layers: fast to compile; unrolled: fast on a CPU"),
    "remat": Option("none", "what the backward pass computes again", choices=tuple(REMAT)),
}


class Execution(NamedTuple):
    """Hashable, since a model is compiled for it."""

    implementation: str
    scan: bool
    remat: str

    @classmethod
    def of(cls, run=None) -> "Execution":
        """That of config.run; None: the defaults. Raises UserError for unknown names. Asks for no device."""
        chosen = cls(*(OPTIONS[name].default if run is None else run[name] for name in cls._fields))
        for name, value in chosen._asdict().items():
            OPTIONS[name].check(f"run.{name}", value)
        return chosen


def rematerialised(function, policy: str):
    """`function`, keeping for the backward pass everything (none), matrix products and what attention
    made (dots), or its inputs (full)."""
    return function if policy == "none" else jax.checkpoint(function, policy=REMAT[policy])
