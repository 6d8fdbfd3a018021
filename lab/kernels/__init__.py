"""Attention over coordinates: one door, `attend`, and behind it one implementation per file."""

import contextlib
import functools
import logging
from types import ModuleType
from typing import Any

import jax

from lab.coordinates import Coordinates
from lab.errors import UserError, choose
from lab.kernels import pallas_gpu, pallas_tpu, reference, rules, tiled
from lab.kernels.rules import Rule

__all__ = ["COMPILED_ONLY", "IMPLEMENTATIONS", "attend", "interpreted", "plan_tiles", "resolve", "rules"]

# name -> (module, the platform it is written for; None: any). A module has `attend`, `plan` if it uses tiles,
# and `refusal` if there are inputs that it does not take.
IMPLEMENTATIONS: dict[str, tuple[ModuleType, str | None]] = {
    "reference": (reference, None),
    "tiled": (tiled, None),
    "pallas_tpu": (pallas_tpu, "tpu"),
    "pallas_gpu": (pallas_gpu, "gpu"),
}
COMPILED_ONLY = {"pallas_gpu"}  # these cannot be interpreted: they run on their platform or not at all
# platform -> what "auto" takes from how many queries of a row on; "tiled" below, and everywhere else.
AUTO = {"tpu": ("pallas_tpu", 128)}

_interpreting = False


@contextlib.contextmanager
def interpreted():
    """Within it, kernels of other platforms may be named: they run as plain JAX, slowly. For tests."""
    global _interpreting
    before, _interpreting = _interpreting, True
    try:
        yield
    finally:
        _interpreting = before


def resolve(implementation: str | None, queries: int | None = None) -> str:
    """The implementation that a name means for rows of so many queries (None: many); None and "auto" pick the best.

    Raises UserError for an unknown name, and for one that cannot run here.
    """
    platform = jax.default_backend()
    if implementation in (None, "auto"):
        return _auto(platform, queries)
    choose("attention implementation", implementation, ("auto", *IMPLEMENTATIONS))
    obstacle = _obstacle(implementation, platform)
    if obstacle and (implementation in COMPILED_ONLY or not _interpreting):
        raise _refused(implementation, obstacle)
    return implementation


def _obstacle(name: str, platform: str) -> str | None:
    """What keeps an implementation from running on a platform, if anything does."""
    needed = IMPLEMENTATIONS[name][1]
    return None if needed in (None, platform) else f"needs a {needed.upper()}, and this is a {platform.upper()}"


def _refused(implementation: str, why: str) -> UserError:
    able = (name for name in IMPLEMENTATIONS if not _obstacle(name, jax.default_backend()))
    others = ", ".join(name for name in ("auto", *able) if name != implementation)
    return UserError(f"attention implementation {implementation!r} {why}; choose among: {others}")


def _auto(platform: str, queries: int | None) -> str:
    best, least = AUTO.get(platform, ("tiled", 0))
    if queries is None or queries >= least:
        return _picked(best, f"what the table has for {platform}")
    return _picked("tiled", f"{best} is for rows of at least {least} queries")


@functools.cache  # says it once
def _picked(name: str, why: str) -> str:
    logging.info("attention: %s (%s)", name, why)
    return name


def plan_tiles(
    q_coordinates: Coordinates, k_coordinates: Coordinates, rule: Rule, implementation: str | None = None
) -> Any:
    """What `attend` may be handed as `tiles`, so that layers of one rule share it; None where none is used."""
    module, _ = IMPLEMENTATIONS[resolve(implementation, q_coordinates.shape[1])]
    return module.plan(rule, q_coordinates, k_coordinates) if hasattr(module, "plan") else None


def attend(
    q_BTHK,
    k_BSGK,
    v_BSGV,
    q_coordinates: Coordinates,
    k_coordinates: Coordinates,
    rule: Rule,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    implementation: str | None = None,
    tiles: Any = None,
    return_lse: bool = False,
):
    """Softmax attention in which a query sees the keys of its own segment that `rule` lets it see.

    q [B, T, H, K], k [B, S, G, K], v [B, S, G, V] with H a multiple of G; query head h reads group h // (H / G).
    Coordinates are int32 [B, T] and [B, S]; segment -1 is padding. scale defaults to K^-1/2; softcap c turns scores s
    into c tanh(s / c). tiles: what `plan_tiles` gave for the same coordinates, rule and implementation.
    Returns [B, T, H, V]; a query that sees no key gets zeros. With return_lse also the log of the softmax denominator,
    float32 [B, T, H] (-inf where no key is seen), differentiable like the output.
    """
    T, H, K, G = *q_BTHK.shape[1:], k_BSGK.shape[2]
    if H % G:
        raise UserError(f"{H} query heads cannot share {G} key heads; choose a divisor of {H}")
    implementation = resolve(implementation, T)
    module, needed = IMPLEMENTATIONS[implementation]
    if hasattr(module, "refusal") and (why := module.refusal(K, v_BSGV.shape[3], q_BTHK.dtype)):
        raise _refused(implementation, why)
    scale = K**-0.5 if scale is None else scale
    options = {} if tiles is None else {"tiles": tiles}
    if needed and implementation not in COMPILED_ONLY:
        options["interpret"] = needed != jax.default_backend()
    o_BTHV, lse_BTH = module.attend(
        q_BTHK, k_BSGK, v_BSGV, q_coordinates, k_coordinates, rule, scale, softcap, **options
    )
    return (o_BTHV, lse_BTH) if return_lse else o_BTHV
