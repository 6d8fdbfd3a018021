"""Attention over coordinates: one door, `attend`, and behind it one implementation per file."""

from lab.coordinates import Coordinates
from lab.errors import UserError, choose
from lab.kernels import reference, rules, tiled
from lab.kernels.rules import Rule
from lab.kernels.tiles import Tiles

__all__ = ["IMPLEMENTATIONS", "attend", "plan_tiles", "resolve", "rules"]

IMPLEMENTATIONS = ("reference", "tiled")


def resolve(implementation: str | None) -> str:
    """The implementation that a name means; None and "auto" pick the best one here."""
    if implementation in (None, "auto"):
        return "tiled"
    return choose("attention implementation", implementation, ("auto", *IMPLEMENTATIONS))


def plan_tiles(
    q_coordinates: Coordinates, k_coordinates: Coordinates, rule: Rule, implementation: str | None = None
) -> Tiles | None:
    """What `attend` may be handed as `tiles`, so that layers of one rule share it; None where none is used."""
    return tiled.plan(rule, q_coordinates, k_coordinates) if resolve(implementation) == "tiled" else None


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
    tiles: Tiles | None = None,
    return_lse: bool = False,
):
    """Softmax attention in which a query sees the keys of its own segment that `rule` lets it see.

    q [B, T, H, K], k [B, S, G, K], v [B, S, G, V] with H a multiple of G; query head h reads group h // (H / G).
    Coordinates are int32 [B, T] and [B, S]; segment -1 is padding. scale defaults to K^-1/2; softcap c turns scores s
    into c tanh(s / c). Returns [B, T, H, V]; a query that sees no key gets zeros. With return_lse also the log of the
    softmax denominator, float32 [B, T, H] (-inf where no key is seen), differentiable like the output.
    """
    H, K, G = q_BTHK.shape[2], q_BTHK.shape[3], k_BSGK.shape[2]
    if H % G:
        raise UserError(f"{H} query heads cannot share {G} key heads; choose a divisor of {H}")
    arguments = (
        q_BTHK,
        k_BSGK,
        v_BSGV,
        q_coordinates,
        k_coordinates,
        rule,
        K**-0.5 if scale is None else scale,
        softcap,
    )
    if resolve(implementation) == "reference":
        o_BTHV, lse_BTH = reference.attend(*arguments)
    else:
        o_BTHV, lse_BTH = tiled.attend(*arguments, tiles=tiles)
    return (o_BTHV, lse_BTH) if return_lse else o_BTHV
