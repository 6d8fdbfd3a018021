"""Methods that stretch a rotary model beyond the length L that it was trained to.

A frequency map changes how fast pairs turn; then a position map (lab.model.position_maps) changes the times that they
turn by. F = R / 2 rotary pairs, the fastest first; b is the base, position.theta, and s the factor by which texts get
longer. A frequency map is a function of (R, config.model.position, length) to inverse frequencies, float64 [F], and the
attention factor, which multiplies cos and sin. length: one past the largest position that turns, which the position map
has made; 0: unknown. Of rows whose lengths are traced, [B], a map that depends on it gives [B, F].
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lab.errors import UserError
from lab.model import position_maps
from lab.model.position_maps import LONGEST, POSITION_MAPS
from lab.options import Option

LENGTHS = {  # of every position that rotates
    "trained": Option(0, "tokens of the texts that the model was trained to, L; 0: unknown", least=0, most=LONGEST),
    "length": Option(
        0, "time steps that the position is made for: a learned vector each; of a rotation, 0: those of a call",
        least=0, most=LONGEST
    ),
}  # fmt: skip
GROWTH = {
    "log_n": Option(False, "queries grow by max(1, ln(time + 1) / ln position.trained)"),
    "temperature": Option(0.0, "queries grow by 1 + this ln(1 + (time + 1) // temperature_step); 0: not", least=0),
    "temperature_step": Option(8192, "time steps after which a query grows again", least=1, most=LONGEST),
}

FACTOR = {
    "factor": Option(
        0.0, "by which texts get longer, s; 0: 1 or more, from position.length over the original length", least=0
    )
}
ORIGINAL = {
    "original_max_position_embeddings": Option(
        0, "tokens of the texts that the model was trained to before its frequencies changed; 0: position.trained",
        least=0, most=LONGEST
    )
}  # fmt: skip
ATTENTION = {"attention_factor": Option(0.0, "of cos and sin; 0: the method's own", least=0)}
TURNS = {
    "beta_fast": Option(32.0, "turns within position.trained from which a pair keeps its frequency", above=0),
    "beta_slow": Option(1.0, "turns down to which it is not divided by the whole factor", above=0),
}
YARN = {
    "mscale": Option(0.0, "with mscale_all_dim, of the attention factor: 0.1 mscale ln s + 1; 0: absent", least=0),
    "mscale_all_dim": Option(0.0, "of what that is divided by: 0.1 mscale_all_dim ln s + 1; 0: absent", least=0),
    "truncate": Option(True, "the ramp begins and ends at whole pairs"),
}
LONGROPE = {
    f"{name}_factor": Option((), f"by which each pair's frequency is divided {when}", kind=tuple[float, ...], above=0)
    for name, when in (("short", "up to position.trained"), ("long", "beyond it"))
}
LLAMA3 = {
    "low_freq_factor": Option(1.0, "turns within position.trained below which a pair is divided", above=0),
    "high_freq_factor": Option(4.0, "turns above which it keeps its frequency", above=0),
}
PROPORTIONAL = {
    "partial_rotary_factor": Option(1.0, "share of the pairs, the fastest, that rotate", least=0, most=1),
}


AT = "position.scaling."  # where options of frequency maps stand in config.model


class FrequencyMap(NamedTuple):
    """function: see above. trained: whether it needs position.trained. derives: whether a factor of 0 is taken from
    the length. by_length: whether frequencies depend on the length of the text, beyond a factor. idle: see
    lab.options."""

    function: Callable[..., tuple[Any, float]]
    options: Mapping[str, Option] = {}
    trained: bool = False
    derives: bool = False
    by_length: bool = False
    idle: Callable[[Mapping[str, Any]], dict[str, str]] = lambda values: {}


def default(R: int, position, length) -> tuple[np.ndarray, float]:
    """b^(-2i/R) (arXiv 2104.09864)."""
    return position.theta ** (-2.0 * np.arange(R // 2) / R), 1.0


def original(position) -> int:
    """L of a frequency map."""
    return position.scaling.original_max_position_embeddings or position.trained


def stretch(position, length) -> float:
    """The factor s."""
    return position.scaling.factor or max(1.0, length / original(position))


def linear(R: int, position, length) -> tuple[np.ndarray, float]:
    """All divided by s: position interpolation (arXiv 2306.15595)."""
    return default(R, position, length)[0] / stretch(position, length), 1.0


def ntk(R: int, position, length) -> tuple[np.ndarray, float]:
    """The base becomes b s^(R/(R-2)), so that the slowest pair is divided by s and the fastest kept."""
    base = position.theta * stretch(position, length) ** (R / (R - 2))
    return base ** (-2.0 * np.arange(R // 2) / R), 1.0


def dynamic(R: int, position, length) -> tuple[Any, float]:
    """The same with s l/L - (s-1) for s, l = max(length, L): s = 1 where no factor is given, which makes it l/L."""
    s, L = position.scaling.factor or 1.0, position.trained
    longest = jnp.maximum(length, L)[..., None] if isinstance(length, jax.Array) else max(length, L)
    base = position.theta * (s * longest / L - (s - 1)) ** (R / (R - 2))
    return base ** (-2.0 * np.arange(R // 2) / R), 1.0


def ntk_by_parts(R: int, position, length) -> tuple[np.ndarray, float]:
    """Pairs of at most beta_slow turns within L are divided by s, of beta_fast and more kept, between mixed by the
    number of turns (arXiv 2309.00071, section 3.2)."""
    (inverse, _), scaling = default(R, position, length), position.scaling
    turns = original(position) * inverse / (2 * math.pi)
    kept = np.clip((turns - scaling.beta_slow) / (scaling.beta_fast - scaling.beta_slow), 0, 1)
    return (1 - kept) * inverse / stretch(position, length) + kept * inverse, 1.0


def yarn(R: int, position, length) -> tuple[np.ndarray, float]:
    """As `transformers` computes it: mixed linearly in the number of the pair, between the dimensions that beta_fast
    and beta_slow turns fall on (arXiv 2309.00071, sections 3.2 and 3.4).

    The attention factor is 0.1 ln s + 1; with mscale and mscale_all_dim the ratio of two such, each with its own times
    ln s.
    """
    (inverse, _), scaling, s = default(R, position, length), position.scaling, stretch(position, length)
    at = [
        R * math.log(original(position) / (2 * math.pi * turns)) / (2 * math.log(position.theta))
        for turns in (scaling.beta_fast, scaling.beta_slow)
    ]
    low, high = (math.floor(at[0]), math.ceil(at[1])) if scaling.truncate else at
    low, high = max(low, 0), min(high, R - 1)
    high += 0.001 * (low == high)
    divided = np.clip((np.arange(R // 2) - low) / (high - low), 0, 1)
    factor = scaling.attention_factor or mscale(s, 1.0)
    if scaling.mscale and scaling.mscale_all_dim and not scaling.attention_factor:
        factor = mscale(s, scaling.mscale) / mscale(s, scaling.mscale_all_dim)
    return inverse / s * divided + inverse * (1 - divided), factor


def mscale(s: float, m: float) -> float:
    """The attention factor of YaRN."""
    return 0.1 * m * math.log(s) + 1 if s > 1 else 1.0


def longrope(R: int, position, length) -> tuple[Any, float]:
    """Each pair divided by a number of its own: of the long list in texts longer than L, else of the short one.

    One position beyond L switches the whole row (arXiv 2402.13753). The attention factor is sqrt(1 + ln s / ln L).
    """
    (inverse, _), scaling, L = default(R, position, length), position.scaling, original(position)
    s = stretch(position, length)
    factor = scaling.attention_factor or (math.sqrt(1 + math.log(s) / math.log(L)) if s > 1 else 1.0)
    short, long = (inverse / np.asarray(factors) for factors in (scaling.short_factor, scaling.long_factor))
    if isinstance(length, jax.Array):
        return jnp.where((length > L)[..., None], long, short), factor
    return long if length > L else short, factor


def llama3(R: int, position, length) -> tuple[np.ndarray, float]:
    """Pairs of fewer turns within L than low_freq_factor are divided by s, of more than high_freq_factor kept, between
    mixed by the number of turns (Llama 3.1)."""
    (inverse, _), scaling = default(R, position, length), position.scaling
    turns = original(position) * inverse / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return (1 - kept) * inverse / stretch(position, length) + kept * inverse, 1.0


def proportional(R: int, position, length) -> tuple[np.ndarray, float]:
    """p-RoPE (arXiv 2410.06205): the fastest pairs rotate, the others stand still; all divided by s, 1 unless given."""
    rotating = np.arange(R // 2) < int(position.scaling.partial_rotary_factor * R // 2)
    return np.where(rotating, default(R, position, length)[0], 0.0) / (position.scaling.factor or 1.0), 1.0


def idle_original(values: Mapping[str, Any]) -> dict[str, str]:
    """Where a factor is given, nothing else reads the length that it would follow from."""
    return {f"{AT}original_max_position_embeddings": f"{AT}factor"} if values[f"{AT}factor"] else {}


def idle_mscale(values: Mapping[str, Any]) -> dict[str, str]:
    """An attention factor stands above what makes one, which takes two."""
    pair = f"{AT}mscale", f"{AT}mscale_all_dim"
    if values[f"{AT}attention_factor"]:
        return dict.fromkeys(pair, f"{AT}attention_factor")
    return {one: other for one, other in (pair, pair[::-1]) if not values[other]}


def idle_of_rotations(values: Mapping[str, Any]) -> dict[str, str]:
    """The length, where frequencies do not follow from it; and what `idle_growth` says."""
    row = FREQUENCY_MAPS[values[f"{AT}name"]]
    given = row.derives and values[f"{AT}factor"]
    unread = not row.by_length and (given or not row.derives)
    return idle_growth(values) | ({"position.length": f"{AT}{'factor' if given else 'name'}"} if unread else {})


def idle_growth(values: Mapping[str, Any]) -> dict[str, str]:
    """Steps of a temperature that there is not."""
    return {} if values["position.temperature"] else {"position.temperature_step": "position.temperature"}


FREQUENCY_MAPS = {
    "default": FrequencyMap(default),
    "linear": FrequencyMap(linear, FACTOR | ORIGINAL, derives=True, idle=idle_original),
    "ntk": FrequencyMap(ntk, FACTOR | ORIGINAL, derives=True, idle=idle_original),
    "dynamic": FrequencyMap(dynamic, FACTOR, trained=True, by_length=True),
    "ntk-by-parts": FrequencyMap(ntk_by_parts, FACTOR | ORIGINAL | TURNS, trained=True, derives=True),
    "yarn": FrequencyMap(
        yarn, FACTOR | ORIGINAL | ATTENTION | TURNS | YARN, trained=True, derives=True, idle=idle_mscale
    ),
    "longrope": FrequencyMap(
        longrope, FACTOR | ORIGINAL | ATTENTION | LONGROPE, trained=True, derives=True, by_length=True
    ),
    "llama3": FrequencyMap(llama3, FACTOR | ORIGINAL | LLAMA3, trained=True, derives=True),
    "proportional": FrequencyMap(proportional, FACTOR | PROPORTIONAL),
}


def check(position, R: int) -> None:
    """Refuses a method whose options mean nothing, or lack what it needs. R: dimensions that rotate."""
    position_maps.check(position)
    chosen, name = position.scaling, position.scaling.name
    row, told = FREQUENCY_MAPS[name], f"model.position.scaling.name = {position.scaling.name!r}"
    known = original(position) if "original_max_position_embeddings" in row.options else position.trained
    if row.trained and known < 2:
        raise position_maps.untrained(position, f"scaling.name = {name!r}")
    if row.derives and not chosen.factor and not (known and position.length):
        raise UserError(
            f"model.position.scaling.factor = 0 is taken from model.position.length = {position.length} over "
            f"model.position.trained = {position.trained}; choose both for {told}, or a factor"
        )
    if name in ("ntk", "dynamic") and R < 4:
        raise UserError(f"{told} needs at least 4 rotary dimensions and has {R}; choose model.position.dim = 4 or more")
    for upper, lower in (("beta_fast", "beta_slow"), ("high_freq_factor", "low_freq_factor")):
        if upper in row.options and chosen[upper] <= chosen[lower]:
            raise UserError(
                f"model.position.scaling.{upper} = {chosen[upper]} must be above model.position.scaling.{lower} = "
                f"{chosen[lower]}"
            )
    if name == "yarn" and position.theta <= 1:
        raise UserError(f"model.position.theta = {position.theta} must be above 1 for {told}")
    for field in LONGROPE if name == "longrope" else ():
        if len(chosen[field]) != R // 2:
            raise UserError(
                f"model.position.scaling.{field} has {len(chosen[field])} numbers for {R // 2} rotary pairs; choose "
                "one for each"
            )


def by_call(position) -> bool:
    """Whether frequencies are made for the rows of each call, as their lengths are."""
    return FREQUENCY_MAPS[position.scaling.name].by_length and not position.length


def frequencies(R: int, position, length: Any = None) -> tuple[Any, float]:
    """Inverse frequencies [F] and the attention factor. length: of rows in a call [B], one past their largest mapped
    position; None for that of position.length."""
    if length is None:
        length = POSITION_MAPS[position.map.name].reach(position, position.length) if position.length else 0
    return FREQUENCY_MAPS[position.scaling.name].function(R, position, length)
