"""Attention over coordinates: one door, `attend`, and behind it one implementation per file.

All that depends on where tokens stand is said in one language (lab.kernels.expressions): a rule who sees whom
(lab.kernels.rules), a bias what its score is given besides (lab.kernels.bias), a band which pairs rotate by which times
(lab.kernels.bands, whose `attend_bands` calls `attend` for each).
"""

import contextlib
import functools
import importlib
import logging
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lab.coordinates import Coordinates
from lab.errors import UserError, choose
from lab.kernels import bias as biases
from lab.kernels import order, rules, split
from lab.kernels.bias import Bias
from lab.kernels.dropout import Dropped
from lab.kernels.order import Arranged
from lab.kernels.rotary import rotate, rotation
from lab.kernels.rules import Rule
from lab.kernels.tiles import is_step

__all__ = [
    "IMPLEMENTATIONS", "Bias", "arrange", "attend", "compiled_for", "interpreted", "lacks", "plan_tiles", "recorded",
    "resolve", "rotates", "rules",
]  # fmt: skip


class Implementation(NamedTuple):
    """A row of the table. The module has the same name: see `_module`."""

    platform: str | None = None  # that it is written for; None: any
    interpretable: bool = False  # runs elsewhere as plain JAX, for tests
    rotates: bool = False  # rotates queries as it reads them
    biases: bool = False  # adds a Bias to scores
    drops: bool = False  # drops probabilities
    forks: bool = False  # reads the limits of texts that fork and join


IMPLEMENTATIONS = {
    "reference": Implementation(biases=True, drops=True, forks=True),
    "tiled": Implementation(biases=True, drops=True, forks=True),
    "pallas_tpu": Implementation("tpu", interpretable=True, rotates=True),
    "pallas_gpu": Implementation("gpu", rotates=True),
    "pallas_triton": Implementation("gpu", interpretable=True, forks=True),
    "cudnn": Implementation("gpu"),
    "tokamax": Implementation("gpu"),
}
UNABLE = {  # what is said of rows without
    "biases": "adds no bias to scores",
    "drops": "drops no probabilities",
    "forks": "reads no limits of texts that fork and join",
}


# platform -> (what "auto" takes, for rows of how many keys at most). "tiled" beyond, and on every other platform; on a
# GPU a study tries what there is, and names it (lab.kernels.choice).
AUTO = {"tpu": ("pallas_tpu", 2**17)}

_interpreting = False
_platform: str | None = None  # that programs are compiled for; None: this machine's
_calls: list[dict] | None = None  # of `attend`, while they are recorded


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Within it, kernels of other platforms may be named: they run as plain JAX, slowly. For tests."""
    global _interpreting
    before, _interpreting = _interpreting, True
    try:
        yield
    finally:
        _interpreting = before


@contextlib.contextmanager
def compiled_for(platform: str) -> Iterator[None]:
    """Within it, what is traced is compiled for devices of another platform, which are not here."""
    global _platform
    before, _platform = _platform, platform
    try:
        yield
    finally:
        _platform = before


@contextlib.contextmanager
def recorded() -> Iterator[list[dict]]:
    """Within it `attend` computes nothing and notes how it was called, in the list that this gives: for tracing.

    of_lse: whether the gradient of the log normaliser is asked for, once gradients are traced.
    """
    global _calls
    before, _calls = _calls, []
    try:
        yield _calls
    finally:
        _calls = before


def resolve(
    implementation: str | None, keys: int = 1, biased: bool = False, dropping: bool = False, forking: bool = False
) -> str:
    """The implementation that a name means for rows of so many keys; None and "auto" pick the best one.

    biased: whether scores have a `Bias`; dropping: whether there is dropout; forking: whether there are limits. Raises
    UserError for an unknown name, for one that cannot run here, and for one that cannot do what it is to.
    """
    needs = _needs(biased, dropping, forking)
    if implementation in (None, "auto"):
        return _auto(_compiled_for(), keys, needs)
    choose("attention implementation", implementation, ("auto", *IMPLEMENTATIONS))
    obstacle = _obstacle(implementation)
    if obstacle and not (_interpreting and IMPLEMENTATIONS[implementation].interpretable):
        raise _refused(implementation, obstacle)
    if why := _unable(implementation, needs):
        raise _refused(implementation, why, needs)
    return implementation


def _compiled_for() -> str:
    return _platform or jax.default_backend()


def able(name: str, biased: bool = False, dropping: bool = False) -> bool:
    """Whether an implementation can do that, where it runs."""
    return _unable(name, _needs(biased, dropping)) is None


def _needs(biased: bool, dropping: bool, forking: bool = False) -> tuple[str, ...]:
    """Fields of a row that must be true."""
    needed = dict(biases=biased, drops=dropping, forks=forking)
    return tuple(name for name in needed if needed[name])


def _unable(name: str, needs: Sequence[str]) -> str | None:
    """What of the needs, fields of its row, an implementation cannot do."""
    return next((UNABLE[need] for need in needs if not getattr(IMPLEMENTATIONS[name], need)), None)


def rotates(implementation: str | None, keys: int) -> bool:
    """Whether queries are rotated as they are read, given `frequencies_3F`, rather than before."""
    if _calls is not None:
        return True  # so that a call shows it
    return IMPLEMENTATIONS[resolve(implementation, keys)].rotates


def _module(name: str) -> ModuleType:
    """Of an implementation; loaded when it is first needed, since Pallas takes its time.

    It has `attend`, which takes a `bias`, `dropout` and `limits` if its row says so; `tile_sizes` and `plan` if it
    computes by tiles; `OBSTACLE` if what is installed may keep it from running (why, or None); `refusal` if it does not
    take every width and precision.
    """
    return importlib.import_module(f"lab.kernels.{name}")


def _obstacle(name: str) -> str | None:
    """What keeps an implementation from running here, if anything does."""
    wanted = IMPLEMENTATIONS[name].platform
    if wanted is not None and wanted != (platform := _compiled_for()):
        return f"needs a {wanted.upper()}, and this is a {platform.upper()}"
    return lacks(name)


def lacks(name: str) -> str | None:
    """Which of the packages that an implementation needs keep it from running, if any do; asks for no device."""
    return getattr(_module(name), "OBSTACLE", None)


def _refused(implementation: str, why: str, needs: Sequence[str] = ()) -> UserError:
    others = (name for name in IMPLEMENTATIONS if name != implementation and not _unable(name, needs))
    able = ["auto", *(name for name in others if not _obstacle(name))]
    return UserError(f"attention implementation {implementation!r} {why}; choose among: {', '.join(able)}")


def _auto(platform: str, keys: int, needs: Sequence[str]) -> str:
    name, most = AUTO.get(platform, ("tiled", keys))
    if why := _unable(name, needs):
        return _picked("tiled", f"{name} {why}")
    if keys <= most:
        return _picked(name, f"what there is for {platform}")
    return _picked("tiled", f"{name} takes rows of {most} keys at most")


@functools.cache  # says it once
def _picked(name: str, why: str) -> str:
    logging.info("attention: %s (%s)", name, why)
    return name


def plan_tiles(
    q_coordinates: Coordinates,
    k_coordinates: Coordinates,
    rule: Rule,
    implementation: str | None = None,
    biased: bool = False,
    limits: jax.Array | None = None,
    lanes: bool = False,
) -> Any:
    """What `attend` may be handed as `tiles`, so that layers of one rule share it; None where none is used.

    biased: whether it will be handed a bias, too. limits: those that it will be handed. lanes: whether each query of
    a row goes on with a text of its own, under limits.
    """
    module = _module(resolve(implementation, k_coordinates.shape[1], biased, forking=limits is not None))
    if not hasattr(module, "plan"):
        return None
    if limits is None:
        return module.plan(rule, q_coordinates, k_coordinates)
    return module.plan(rules.forked(rule), q_coordinates, k_coordinates, limits, lanes)


def arrange(
    coordinates: Coordinates, needed: Sequence[Rule], implementation: str | None = None, free: bool = True
) -> Arranged:
    """The order of each row's tokens that suits the rules of a pattern's layers, and the share of tiles computed then.

    NumPy coordinates [B, T]. The order is kept where it is not free, and where nothing is computed by tiles.
    """
    return order.arrange(coordinates, needed, tile_sizes(implementation, coordinates.shape[1]), free)


def tile_sizes(
    implementation: str | None, tokens: int, biased: bool = False, dropping: bool = False
) -> tuple[int, int] | None:
    """Of queries and keys, for rows of so many tokens; None where nothing is computed by tiles."""
    module = _module(resolve(implementation, tokens, biased, dropping))
    return module.tile_sizes(tokens, tokens) if hasattr(module, "plan") else None


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
    bias: Bias | None = None,
    dropout: Dropped | None = None,
    limits: jax.Array | None = None,
):
    """Softmax attention in which a query sees the keys of its own segment that `rule` lets it see.

    q [B, T, H, K], k [B, S, G, K], v [B, S, G, V] with H a multiple of G; query head h reads group h // (H / G).
    Coordinates are int32 [B, T] and [B, S]; segment -1 is padding. scale defaults to K^-1/2; softcap c turns scores s
    into c tanh(s / c). tiles: what `plan_tiles` gave for the same coordinates, rule and implementation.
    frequencies: radians per unit of index, branch and time; with them queries come unrotated, and the last 2F of their
    dimensions rotate here (lab.kernels.rotary), in the kernel where it can. Keys have rotated already.
    bias: added to scores after the cap (lab.kernels.bias); gradients flow to its table or slopes. dropout: which
    probabilities are dropped, after the softmax (lab.kernels.dropout). An implementation that does not know them
    refuses by name, and "auto" takes another. limits: int32 [B, M, M], how far a query of one node sees the keys of
    another (`rules.forked`); coordinates have nodes 0..M-1 then.
    Returns [B, T, H, V]; a query that sees no key gets zeros. With return_lse also the log of the softmax denominator,
    float32 [B, T, H] (-inf where no key is seen), differentiable like the output.
    """
    (B, T, H, K), (_, S, G, V) = q_BTHK.shape, v_BSGV.shape
    if H % G:
        raise UserError(f"{H} query heads cannot share {G} key heads; choose a divisor of {H}")
    scale = K**-0.5 if scale is None else scale
    if _calls is not None:
        outputs = _noted(q_BTHK, k_BSGK, v_BSGV, rule, scale, softcap, frequencies_3F, bias)
        return outputs if return_lse else outputs[0]
    implementation = resolve(implementation, S, bias is not None, dropout is not None, limits is not None)
    row, module = IMPLEMENTATIONS[implementation], _module(implementation)
    if hasattr(module, "refusal") and (why := module.refusal(K, V, q_BTHK.dtype)):
        raise _refused(implementation, why)
    options = {} if tiles is None else {"tiles": tiles}
    if bias is not None:
        biases.check(bias, H)
        options["bias"] = bias
    if dropout is not None:
        dropout.check(H)
        options["dropout"] = dropout
    if limits is not None:
        options["limits"], rule = limits, rules.forked(rule)
    if frequencies_3F is not None and row.rotates:
        options["frequencies_3F"] = frequencies_3F
    elif frequencies_3F is not None:
        q_BTHK = rotate(q_BTHK, rotation(q_coordinates, frequencies_3F))
    if row.interpretable:
        options["interpret"] = row.platform != _compiled_for()
    arguments = q_BTHK, k_BSGK, v_BSGV, q_coordinates, k_coordinates, rule, scale, softcap
    splits = row.platform == "gpu" and is_step(T, S) and limits is None  # with limits it splits lists
    parts = split.parts(B * H, T, S) if splits else 1
    if parts > 1:
        options.pop("tiles", None)  # of keys that are not split
        o_BTHV, lse_BTH = split.attend(functools.partial(module.attend, **options), parts, *arguments)
    else:
        o_BTHV, lse_BTH = module.attend(*arguments, **options)
    return (o_BTHV, lse_BTH) if return_lse else o_BTHV


def _noted(q_BTHK, k_BSGK, v_BSGV, rule: Rule, scale, softcap, frequencies_3F, bias):
    """Notes a call that is recorded; outputs of the right shapes, which depend on the inputs."""
    call = {
        "q": q_BTHK.shape, "k": k_BSGK.shape, "v": v_BSGV.shape, "dtype": str(q_BTHK.dtype), "rule": rule,
        "scale": float(scale), "softcap": float(softcap or 0.0), "biased": bias is not None, "of_lse": False,
        "frequencies": 0 if frequencies_3F is None else frequencies_3F.shape[1],
    }  # fmt: skip
    _calls.append(call)

    @jax.custom_vjp
    def watched(x):
        return x

    def backward(_, cotangent):
        if isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
            return (jnp.zeros(cotangent.shape, cotangent.dtype),)
        call["of_lse"] = True
        return (cotangent,)

    watched.defvjp(lambda x: (x.value, None), backward, symbolic_zeros=True)
    seen_BTH = q_BTHK.sum(-1) + (k_BSGK.sum() + v_BSGV.sum()).astype(q_BTHK.dtype)
    o_BTHV = jnp.broadcast_to(seen_BTH[..., None], (*seen_BTH.shape, v_BSGV.shape[3]))
    return o_BTHV, watched(seen_BTH.astype(jnp.float32))
