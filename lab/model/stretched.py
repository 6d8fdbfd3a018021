"""Layers whose pairs turn otherwise than by their own coordinates: what methods for longer texts make of a rotation.

Pairs that turn by one map of time rotate as those of plain RoPE do: queries and keys as they are made, so that a cache
holds keys that have rotated. Where there are several maps, each is a band of its own (lab.kernels.bands), a cache holds
keys that have not rotated, and they rotate as they are read.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lab.coordinates import Coordinates
from lab.errors import UserError
from lab.kernels import rules
from lab.kernels.bands import Band, Growth, check_bands
from lab.kernels.expressions import Term, q
from lab.kernels.rules import Rule
from lab.model import extrapolation, position, position_maps
from lab.model.parameter import FixedTable
from lab.model.position import Rotary, Turning
from lab.model.position_maps import POSITION_MAPS, Turns
from lab.options import leaves, nested


def pieces(model) -> list[Turns]:
    """The sets of pairs of a layer that turn alike; none where nothing rotates."""
    return POSITION_MAPS[model.position.map.name].pieces(model.position) if position.of(model).frequencies else []


def banded(model) -> bool:
    """Whether a layer's pairs turn by several maps of time."""
    return len(pieces(model)) > 1


def grows(model) -> bool:
    """Whether a layer's queries are multiplied by something of their position."""
    return "log_n" in position.of(model).options and bool(model.position.log_n or model.position.temperature)


def growth(chosen) -> tuple[Term, float, float]:
    """(n, start, rate) of what queries grow by, of config.model.position."""
    if chosen.log_n:
        return q.time + 1, 0.0, 1 / math.log(chosen.trained)
    return (q.time + 1) // chosen.temperature_step + 1, 1.0, chosen.temperature


def amplitude(model) -> float:
    """The attention factor of a layer."""
    if not position.of(model).frequencies:
        return 1.0
    return float(extrapolation.frequencies(position.rotary_dim(model), position.base(model))[1])


def rule(model) -> Rule:
    """Who sees whom in a layer: its rule, less what its position map hides."""
    parsed, seen = rules.parse(model.rule), POSITION_MAPS[model.position.map.name].seen
    return parsed if seen is None or not position.of(model).frequencies else parsed & seen(model.position)


def rotary(model) -> nnx.Module | None:
    """How pairs of a layer turn; None where nothing rotates and nothing grows."""
    mapped = model.position.map.name != "none" or extrapolation.by_call(model.position)
    if grows(model) or (position.of(model).frequencies and (mapped or amplitude(model) != 1)):
        return Stretched(model)
    return Rotary(model) if position.of(model).frequencies else None


class Stretched(nnx.Module):
    """The rotation of a layer under an attention factor, a position map, or frequencies that depend on the length of a
    call; and what its queries are multiplied by. Numbers are leaves of the model, maps of time are not."""

    def __init__(self, model):
        chosen, table = model.position, lambda x: FixedTable(jnp.asarray(x, jnp.float32))
        rotates, factor = bool(position.of(model).frequencies), amplitude(model)
        self.frequencies = table(position.stacked(position.frequencies(model))) if rotates else None
        self.amplitude = table(factor) if factor != 1 else None
        self.pieces = tuple((each.inside, each.q_time.tree, each.k_time.tree, each.over) for each in pieces(model))
        self.of_call, self.rotary_dim = None, position.rotary_dim(model)
        if rotates and extrapolation.by_call(chosen):
            self.of_call = tuple(sorted(leaves(position.base(model)).items()))  # constants of the program
        n, *numbers = growth(chosen) if grows(model) else (None,)
        self.n, self.growth = None if n is None else n.tree, table(numbers) if numbers else None

    def bands(self, rule: Rule, frequencies_3F) -> tuple[Band, ...]:
        """Of the pairs that a rule shows."""
        factor = None if self.amplitude is None else self.amplitude[...]
        return tuple(
            Band(rule if inside is None else rule & inside, frequencies_3F, Term(q), Term(k), factor, over=over)
            for inside, q, k, over in self.pieces
        )

    def turning(self, queries: Coordinates, rule: Rule) -> Turning:
        """In a call with these new tokens."""
        growth = None if self.growth is None else Growth(Term(self.n), *self.growth[...])
        if self.frequencies is None:
            return Turning(growth=growth)
        bands = self.bands(rule, self.frequencies[...])
        if len(bands) > 1:
            return Turning(growth=growth, bands=bands)
        if self.of_call is not None:
            bands = self.bands(rule, self.frequencies_of(queries, bands[0]))
        return Turning(bands[0].turns(queries, bands[0].q_time), self.frequencies[...], growth, plain=False)

    def frequencies_of(self, queries: Coordinates, band: Band) -> jax.Array:
        """For rows of the lengths that these tokens make, [3, B, 1, 1, F]."""
        chosen = nested(dict(self.of_call))
        tokens_B1 = 1 + jnp.max(jnp.where(jnp.asarray(queries.segment) >= 0, queries.time, 0), axis=1, keepdims=True)
        ends = dataclasses.replace(queries.map(lambda x: x[:, :1]), time=tokens_B1)
        length_B = jnp.asarray(band.mapped(ends, band.q_time).time[:, 0], jnp.float32)
        inverse_BF, _ = extrapolation.frequencies(self.rotary_dim, chosen, length_B)
        found = position.POSITIONS[chosen.name].frequencies(self.rotary_dim, chosen, inverse_BF)
        rows = [
            jnp.broadcast_to(jnp.asarray(found[n], jnp.float32), inverse_BF.shape) for n in ("index", "branch", "time")
        ]
        return jnp.stack(rows)[:, :, None, None]


def check_cached(turns: Sequence[nnx.Module | None]) -> None:
    """Refuses a cache where frequencies depend on the length of a text that is not whole yet."""
    for each in turns:
        if isinstance(each, Stretched) and each.of_call is not None:
            name = dict(each.of_call)["scaling.name"]
            raise UserError(
                f"model.position.scaling.name = {name!r} depends on the length of the text, and a cache does not know "
                "it while it grows; choose model.position.length, the length of the whole text"
            )


def check(model, mixers: dict) -> None:
    """Refuses methods that a layer cannot have. mixers: the table of them."""
    if grows(model) and model.position.log_n and model.position.temperature:
        raise UserError(
            f"model.position.log_n = True and temperature = {model.position.temperature} are two growths of queries; "
            "choose one"
        )
    if grows(model) and model.position.log_n and model.position.trained < 2:
        raise position_maps.untrained(model.position, "log_n = True")
    asked = _asked(model)
    if asked and not mixers[model.mixer.name].stretches:
        able = ", ".join(repr(name) for name, mixer in mixers.items() if mixer.stretches)
        raise UserError(f"model.mixer.name = {model.mixer.name!r} does not take {asked}; choose among: {able}")
    if mixers[model.mixer.name].attends and (banded(model) or amplitude(model) != 1):
        _check_rotated(model, mixers[model.mixer.name].rotated(model))
    if banded(model) and extrapolation.by_call(model.position):
        raise UserError(
            f"model.position.scaling.name = {model.position.scaling.name!r} depends on the length of the text, and "
            f"beside {asked} it is to be known; choose model.position.length"
        )
    if banded(model):
        _check_bands(model)


def _asked(model) -> str | None:
    """What of a layer not every mixer and stream takes, as the config says it."""
    if banded(model):
        return f"model.position.map.name = {model.position.map.name!r}"
    if grows(model):
        named = "log_n = True" if model.position.log_n else f"temperature = {model.position.temperature}"
        return f"model.position.{named}"
    return None


def check_stream(model, named: str) -> None:
    """Refuses what a stream that looks into mixers would not see."""
    if asked := _asked(model):
        raise UserError(f"{named} looks into scores, and does not take {asked}; choose model.stream.name = 'plain'")


def _check_rotated(model, letters: str) -> None:
    """An attention factor is of scores alone, and bands rotate queries and keys."""
    of_map = f"model.position.map.name = {model.position.map.name!r}"
    if banded(model) and {*letters} != {*"qk"}:
        raise UserError(f"model.mixer.rotate = {model.mixer.rotate!r}: {of_map} rotates queries and keys; choose 'qk'")
    if {*letters} & {*"vo"}:
        raise UserError(
            f"model.mixer.rotate = {model.mixer.rotate!r} of model.mixer.name = {model.mixer.name!r} rotates values or "
            f"outputs, which the attention factor {amplitude(model):.6g} of model.position.scaling.name = "
            f"{model.position.scaling.name!r} would scale; choose 'qk', or model.position.scaling.attention_factor = 1"
        )


def _check_bands(model) -> None:
    """Looks at sample rows: pairs of tokens at both sides of every number that the map has, and far beyond."""
    chosen = model.position
    numbers = {n for n in (chosen.trained, *leaves(chosen.map).values()) if type(n) is int}
    edges = {m * n + d for n in numbers for m in (1, 2, 3) for d in (-1, 0, 1)}
    spread = np.random.default_rng(0).integers(0, 4 * max(numbers) + 8, 48)
    time = np.array(sorted({t for t in (*edges, *spread.tolist()) if 0 <= t < extrapolation.LONGEST}), np.int32)[None]
    zeros = np.zeros_like(time)
    hides = rule(model)
    bands = [Band(hides & each.inside, None) for each in pieces(model)]
    for branch in (zeros + 1, 1 + np.arange(time.shape[1], dtype=np.int32)[None] % 3):
        at = Coordinates(zeros, branch, time, zeros + np.arange(time.shape[1], dtype=np.int32))
        check_bands(bands, at, at, hides)
