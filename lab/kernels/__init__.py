"""Attention over coordinates: one door, `attend`, and behind it one implementation per file."""

import contextlib
import functools
import logging
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import jax
import numpy as np

from lab.coordinates import Coordinates
from lab.errors import UserError, choose
from lab.kernels import order, pallas_tpu, pallas_triton, reference, rules, split, tiled
from lab.kernels.order import Arranged
from lab.kernels.rotary import rotate, rotation
from lab.kernels.rules import Rule
from lab.kernels.tiles import is_step

__all__ = ["IMPLEMENTATIONS", "arrange", "attend", "interpreted", "plan_tiles", "resolve", "rules"]

# name -> (module, the platform it is written for; None: any). A module has `attend`, `plan` if it uses tiles, and
# OBSTACLE if something that is installed may keep it from running: why, or None.
IMPLEMENTATIONS: dict[str, tuple[ModuleType, str | None]] = {
    "reference": (reference, None),
    "tiled": (tiled, None),
    "pallas_tpu": (pallas_tpu, "tpu"),
    "pallas_triton": (pallas_triton, "gpu"),
}
# platform -> what "auto" takes from how many queries of a row on; "tiled" below, and everywhere else.
AUTO = {"tpu": ("pallas_tpu", 128)}

ROTATE = (pallas_tpu,)  # those that rotate queries as they read them

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
    if obstacle and not _interpreting:
        able = [name for name in IMPLEMENTATIONS if not _obstacle(name, platform)]
        raise UserError(
            f"attention implementation {implementation!r} {obstacle}; choose among: {', '.join(['auto', *able])}"
        )
    return implementation


def _obstacle(name: str, platform: str) -> str | None:
    """What keeps an implementation from running on a platform, if anything does."""
    module, needed = IMPLEMENTATIONS[name]
    if needed not in (None, platform):
        return f"needs a {needed.upper()}, and this is a {platform.upper()}"
    return getattr(module, "OBSTACLE", None)


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


def arrange(
    coordinates: Coordinates, needed: Sequence[Rule], implementation: str | None = None, free: bool = True
) -> Arranged:
    """The order of each row's tokens that suits the rules of a pattern's layers, and the share of tiles computed then.

    NumPy coordinates [B, T]. The order is kept where it is not free, and where nothing is computed by tiles.
    """
    T = coordinates.shape[1]
    module, _ = IMPLEMENTATIONS[resolve(implementation, T)]
    if not hasattr(module, "plan"):
        return Arranged(np.tile(np.arange(T), (coordinates.shape[0], 1)), 1.0)
    return order.arrange(coordinates, needed, *module.tile_sizes(T, T), free)


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
    frequencies_3F=None,
):
    """Softmax attention in which a query sees the keys of its own segment that `rule` lets it see.

    q [B, T, H, K], k [B, S, G, K], v [B, S, G, V] with H a multiple of G; query head h reads group h // (H / G).
    Coordinates are int32 [B, T] and [B, S]; segment -1 is padding. scale defaults to K^-1/2; softcap c turns scores s
    into c tanh(s / c). tiles: what `plan_tiles` gave for the same coordinates, rule and implementation.
    frequencies: radians per unit of index, branch and time; with them queries come unrotated, and the last 2F of their
    dimensions rotate here (lab.kernels.rotary), in the kernel where it can. Keys have rotated already.
    Returns [B, T, H, V]; a query that sees no key gets zeros. With return_lse also the log of the softmax denominator,
    float32 [B, T, H] (-inf where no key is seen), differentiable like the output.
    """
    T, H, K, G = *q_BTHK.shape[1:], k_BSGK.shape[2]
    if H % G:
        raise UserError(f"{H} query heads cannot share {G} key heads; choose a divisor of {H}")
    S, (module, needed) = k_BSGK.shape[1], IMPLEMENTATIONS[resolve(implementation, T)]
    scale = K**-0.5 if scale is None else scale
    options = {} if tiles is None else {"tiles": tiles}
    if frequencies_3F is not None and module in ROTATE:
        options["frequencies_3F"] = frequencies_3F
    elif frequencies_3F is not None:
        q_BTHK = rotate(q_BTHK, rotation(q_coordinates, frequencies_3F))
    if needed:
        options["interpret"] = needed != jax.default_backend()
    whole, arguments = module.attend, (q_BTHK, k_BSGK, v_BSGV, q_coordinates, k_coordinates, rule, scale, softcap)
    parts = split.parts(q_BTHK.shape[0] * H * T, S) if needed == "gpu" and is_step(T, S) else 1
    if parts > 1:
        options.pop("tiles", None)  # of keys that are not split
        o_BTHV, lse_BTH = split.attend(functools.partial(whole, **options), parts, *arguments)
    else:
        o_BTHV, lse_BTH = whole(*arguments, **options)
    return (o_BTHV, lse_BTH) if return_lse else o_BTHV
