"""Where the position of a token enters: rotary angles of queries and keys, the embedding (codes.py), scores (scores.py,
relative.py), or nowhere.

F = R / 2 rotary pairs, where R of the K dimensions of a head rotate, its last; pair p = 0 is the fastest. Of these R,
p and p + F form pair p (the rotate-half convention, lab.kernels.rotary).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lab.coordinates import Coordinates
from lab.errors import UserError, choose
from lab.kernels.bands import Band, Growth
from lab.kernels.rotary import rotation
from lab.kernels.rules import Rule
from lab.model import extrapolation, position_maps
from lab.model.codes import FourierCode, LearnedBranchCode, LearnedCode, SinusoidalCode
from lab.model.extrapolation import FREQUENCY_MAPS, GROWTH, LENGTHS
from lab.model.parameter import FixedTable
from lab.model.position_maps import POSITION_MAPS
from lab.model.relative import Relative
from lab.model.scores import Added, Buckets, Slopes
from lab.options import Option


class Encoding(NamedTuple):
    """How the position of tokens enters.

    frequencies: radians per unit of index, branch and time for each of the rotary pairs of R dimensions, of
    (R, config.model.position, inverse frequencies of index and time, if a frequency map changes them); None: nothing
    rotates. code: what is added to the embedding. added: what scores are given besides. idle: see lab.options.
    """

    frequencies: Callable[..., dict[str, np.ndarray]] | None
    options: Mapping[str, Option]
    code: Callable | None = None
    added: type[Added] | None = None
    idle: Callable[[Mapping[str, Any]], dict[str, str]] = lambda values: {}

    @property
    def replaces(self) -> tuple[str, ...]:
        """Where nothing rotates, no method changes how."""
        return () if self.frequencies else METHODS


def rope2d_frequencies(R: int, position, inverse=None) -> dict[str, Any]:
    """Radians per unit of index, branch and time for each pair, [F] each: interleaved 2D RoPE.

    Of F pairs, the n = round(F * ratio) slowest are selected; among them even ones rotate by stride * branch, odd ones
    by time. The others rotate by the flat index, or by time (position.unselected). inv_p = theta^(-2 p / R), and 0
    beyond the floor(F * share) fastest (p-RoPE, arXiv 2410.06205). A frequency map leaves branches as they are: longer
    texts have no more of them.
    """
    F = R // 2
    pair = np.arange(F)
    plain = extrapolation.default(R, position, 0)[0]
    rotates = pair < int(F * position.share)
    n = round(F * position.ratio)
    selected = pair >= F - n
    even = (pair - (F - n)) % 2 == 0
    inverse = plain if inverse is None else inverse
    return {
        "index": (~selected & rotates & (position.unselected == "index")) * inverse,
        "branch": (selected & rotates & even) * (position.stride * plain),
        "time": (rotates & ((selected & ~even) | (~selected & (position.unselected == "time")))) * inverse,
    }


def time_frequencies(R: int, position, inverse=None) -> dict[str, Any]:
    """One-dimensional RoPE over time: what codes of the branch leave to the rotation."""
    inverse = extrapolation.default(R, position, 0)[0] if inverse is None else inverse
    return {"index": 0 * inverse, "branch": 0 * inverse, "time": inverse}


def sequential_frequencies(R: int, position, inverse=None) -> dict[str, Any]:
    """One-dimensional RoPE over stride * branch + time: branches as if they lay one after another.

    The stride stands for their lengths, which are unknown while they are decoded: branches overlap where it is shorter
    than they are, and lie apart where it is longer. A token's own past is at its true distances.
    """
    inverse = extrapolation.default(R, position, 0)[0] if inverse is None else inverse
    return {"index": 0 * inverse, "branch": position.stride * inverse, "time": inverse}


def _names(field: str, table: Mapping[str, Any]) -> tuple[str, ...]:
    """What a table of methods has in the config, at position.<field>."""
    options = dict.fromkeys(name for row in table.values() for name in row.options)
    return tuple(f"position.{field}.{name}" for name in ("name", *options))


METHODS = (*_names("scaling", FREQUENCY_MAPS), *_names("map", POSITION_MAPS))


ROTARY = {
    "theta": Option(1e4, "base of the rotary frequencies", above=0),
    "dim": Option(0, "dimensions at the end of a head that rotate; 0: all", least=0),
    "table": Option("own", "own: frequencies of a head of that many; head: the fastest of the whole head's",
                    choices=("own", "head")),
} | LENGTHS | GROWTH  # fmt: skip
BRANCHED = {
    "ratio": Option(0.0, "share of the rotary pairs that carry branch and time", least=0, most=1),
    "stride": Option(128, "time steps that a branch is worth", least=1),
    "unselected": Option("index", "what rotates the other pairs", choices=("index", "time")),
    "share": Option(1.0, "of the rotary pairs, the fastest, that rotate; the others stand still", least=0, most=1),
}

POSITIONS = {
    "rope2d": Encoding(rope2d_frequencies, ROTARY | BRANCHED, idle=extrapolation.idle_of_rotations),
    "sequential": Encoding(
        sequential_frequencies, ROTARY | {"stride": BRANCHED["stride"]}, idle=extrapolation.idle_of_rotations
    ),
    "fourier": Encoding(time_frequencies, ROTARY, code=FourierCode, idle=extrapolation.idle_of_rotations),
    "learned-branch": Encoding(
        time_frequencies, ROTARY | LearnedBranchCode.options, LearnedBranchCode, idle=extrapolation.idle_of_rotations
    ),
    "none": Encoding(None, {"trained": LENGTHS["trained"]} | GROWTH, idle=extrapolation.idle_growth),
    "sinusoidal": Encoding(None, {}, code=SinusoidalCode),
    "learned": Encoding(None, LearnedCode.options, code=LearnedCode),
    "t5": Encoding(None, Buckets.options, added=Buckets),
    "alibi": Encoding(None, Slopes.options, added=Slopes),
    "shaw": Encoding(None, Relative.options, added=Relative),
}


def of(model) -> Encoding:
    """That of a layer."""
    return POSITIONS[model.position.name]


def rotary_dim(model) -> int:
    """Dimensions of a head that rotate, R; 0 where nothing does."""
    return (model.position.dim or model.mixer.head_dim) if of(model).frequencies else 0


def base(model):
    """Its config.model.position, with the base of the whole head's table where R dimensions have that."""
    R, chosen = rotary_dim(model), model.position.copy_and_resolve_references()
    if chosen.table == "head":  # theta'^(-2p/R) = theta^(-2p/K): the fastest R / 2 pairs of the whole head's table
        chosen.theta **= R / model.mixer.head_dim
    return chosen


def frequencies(model) -> dict[str, np.ndarray]:
    """Radians per unit of index, branch and time for each rotated pair, [R / 2] each."""
    R, chosen = rotary_dim(model), base(model)
    return of(model).frequencies(R, chosen, extrapolation.frequencies(R, chosen)[0])


def check(model) -> None:
    """Refuses what a layer cannot have: rotary dimensions without a place in a head, biases that mean nothing."""
    if of(model).added:
        of(model).added.check(model)
    if of(model).code is LearnedCode and not model.position.length:
        raise UserError(f"model.position.length = 0 must be at least 1: {LENGTHS['length'].meaning}")
    if not of(model).frequencies:
        return
    R, field = rotary_dim(model), "model.position.dim" if model.position.dim else "model.mixer.head_dim"
    if R < 2 or R % 2:
        raise UserError(f"{field} = {R} must be even and at least 2: rotary dimensions come in pairs")
    if model.mixer.head_dim < R:
        raise UserError(
            f"model.position.dim = {R} is above model.mixer.head_dim = {model.mixer.head_dim}; choose an even number "
            "up to it, or 0 for all"
        )
    extrapolation.check(base(model), R)
    with np.errstate(all="ignore"):
        turns = frequencies(model)
    if not all(np.isfinite(x).all() for x in turns.values()):
        raise UserError(
            f"model.position.scaling.name = {model.position.scaling.name!r} makes frequencies that are no finite "
            "numbers; choose a factor or model.position.theta nearer to 1"
        )
    if model.position.map.name != "none" and turns["index"].any():
        raise UserError(
            f"model.position.map.name = {model.position.map.name!r} maps times, and {np.count_nonzero(turns['index'])} "
            "rotary pairs turn by the index; choose model.position.unselected = 'time'"
        )
    if model.position.map.name != "none" and (turns["branch"] * turns["time"]).any():
        raise UserError(
            f"model.position.map.name = {model.position.map.name!r} maps times, and pairs turn by time and branch at "
            f"once under model.position.name = {model.position.name!r}; choose 'none'"
        )


def check_mixer(model, adds: tuple[type, ...]) -> None:
    """Refuses a position that adds to scores what a mixer does not take, and rotations where nothing rotates."""
    fitting = [name for name, row in POSITIONS.items() if row.added is None or row.added.makes in adds]
    choose(f"model.position.name of model.mixer.name = {model.mixer.name!r}", model.position.name, fitting)
    if not of(model).frequencies and model.mixer.rotate != "auto":
        raise UserError(
            f"model.mixer.rotate = {model.mixer.rotate!r} means nothing beside model.position.name = "
            f"{model.position.name!r}, under which nothing rotates; choose 'auto'"
        )


def check_layers(specs: Sequence, maps: Sequence[int]) -> None:
    """Refuses entries of a pattern that have one embedding or one table of biases in common, and would each have it
    otherwise. maps: of attention, in a layer of each entry."""
    coded = [spec for spec in specs if of(spec).code]
    codes = {(spec.position.name, *(spec.position[option] for option in of(spec).code.options)) for spec in coded}
    if len(codes) > 1:
        raise UserError(
            f"model.pattern has the codes {', '.join(map(str, sorted(codes)))} of model.position, and all layers read "
            "one embedding; choose one, alike wherever it is named"
        )
    tables = {
        (heads, *(spec.position[option] for option in of(spec).options))
        for spec, heads in zip(specs, maps, strict=True)
        if shares(spec)
    }
    if len(tables) > 1:
        raise UserError(
            "model.position.shared = True: entries of model.pattern that share a table of biases differ in heads, or "
            "in options of model.position; choose the same for all of them, or False"
        )


def check_times(specs: Sequence, made: str, times: int) -> None:
    """Refuses so many time steps where fewer have a learned vector, or mapped times that are no exact numbers. made:
    the fields that make them as many."""
    for spec in specs:
        if spec.position.name == "learned":
            LearnedCode.check(f"{made}: a token may be", times - 1, spec.position.length)
        position_maps.check_times(spec.position, made, times)


def check_branches(specs: Sequence, made: str, number: int) -> None:
    """Refuses a branch of so high a number where lower ones alone have a learned vector. made: the field that makes
    it."""
    for spec in specs:
        if spec.position.name == "learned-branch":
            LearnedBranchCode.check(f"{made}: a token may be", number, LearnedBranchCode.rows_of(spec.position))


def check_reach(specs: Sequence, made: str, tokens: int) -> None:
    """Refuses rows of so many tokens where a method of a layer is made for fewer. made: the field that asks them."""
    for spec in specs:
        length = spec.position.length if spec.position.name != "learned" else 0
        if length and tokens > length:
            raise UserError(
                f"{made}: model.position.length = {length} makes frequencies for no longer texts; choose at least "
                f"{tokens} for it, or ask of at most {length}"
            )
        position_maps.check_reach(spec.position, made, tokens)


def shares(model) -> bool:
    """Whether what is added to a layer's scores is common to layers."""
    return bool(of(model).added) and of(model).added.shares(model)


def code(specs: Sequence, key: jax.Array) -> nnx.Module | None:
    """What is added to the embedding: the code of the first entry of a pattern that has one."""
    return next((of(spec).code(spec, key) for spec in specs if of(spec).code), None)


def added(model, heads: int, widths: tuple[int, int], key: jax.Array) -> Added | None:
    """What is added to the scores of a layer alone, of so many attention maps of widths (K, V)."""
    if not of(model).added or shares(model):
        return None
    return of(model).added(model, heads, widths, jax.random.fold_in(key, 24))  # apart from those of mixers


def added_to_all(specs: Sequence, maps: Sequence[int], key: jax.Array) -> Added | None:
    """The same, of layers that have it in common; None where none has."""
    for spec, heads in zip(specs, maps, strict=True):
        if shares(spec):
            return of(spec).added(spec, heads, (0, 0), jax.random.fold_in(key, 4 + spec.layers))
    return None


def pair_counts(model) -> dict[str, int]:
    """How many rotary pairs carry the branch, the time and the index."""
    found = frequencies(model) if of(model).frequencies else {}
    return {name: int(np.count_nonzero(found.get(name, 0))) for name in ("branch", "time", "index")}


class Turning(NamedTuple):
    """How the pairs of a layer turn in a call: the fields of `View` of the same names."""

    rotation: tuple[jax.Array, jax.Array] | None = None
    frequencies: jax.Array | None = None
    growth: Growth | None = None
    bands: tuple[Band, ...] | None = None
    plain: bool = True

    def rules(self, rule: Rule) -> list[Rule]:
        """Those of its bands, or that of the layer."""
        return [rule] if self.bands is None else [band.rule for band in self.bands]


class Rotary(nnx.Module):
    """angle(token, p) = index w_index[p] + branch w_branch[p] + time w_time[p]: one table, and a leaf of the model."""

    def __init__(self, model):
        self.frequencies = FixedTable(jnp.asarray(stacked(frequencies(model)), jnp.float32))

    def __call__(self, coordinates: Coordinates) -> tuple[jax.Array, jax.Array]:
        """cos and sin of the angles, float32 [B, T, 1, R / 2]."""
        return rotation(coordinates, self.frequencies[...])

    def turning(self, queries: Coordinates, rule: Rule) -> Turning:
        """In a call with these new tokens."""
        return Turning(self(queries), self.frequencies[...])


def stacked(found: Mapping[str, np.ndarray]) -> np.ndarray:
    """What `frequencies` gave as one table [3, F]."""
    return np.stack([found[name] for name in ("index", "branch", "time")])
