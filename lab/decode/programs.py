"""What an engine runs on the device: a chunk of prompts, a step of every branch, and what frees slots and forks states.

B rows of the cache, S slots of a row, N lanes of a row, T tokens of a call, M nodes, C vocabulary.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lab.coordinates import Coordinates
from lab.decode import sampling
from lab.decode.sampling import Found, Sampling
from lab.kernels import rules
from lab.model import slots

OWN = rules.forked((rules.k.branch == 0) | (rules.k.branch == rules.q.branch))  # what a penalty looks at


@functools.partial(jax.tree_util.register_dataclass, data_fields=["weights"], meta_fields=["structure"])
@dataclasses.dataclass(frozen=True)
class Flat:
    """A model by its arrays: to flatten modules anew for each step takes longer than what is done with small ones."""

    weights: tuple[jax.Array, ...]
    structure: jax.tree_util.PyTreeDef

    @classmethod
    def of(cls, model) -> "Flat":
        weights, structure = jax.tree.flatten(model)
        return cls(tuple(weights), structure)

    @property
    def model(self):
        return jax.tree.unflatten(self.structure, self.weights)


class Held(NamedTuple):
    """What an engine keeps on the device."""

    cache: NamedTuple  # of the model
    tokens_BS: jax.Array  # in the slots of the cache


class Packed:
    """Numbers of one call in one int32 array [fields, B, N], of which each field is a view of its type: to hand many
    small arrays to a program takes longer than what it does with them."""

    types: dict[str, type]

    def __init__(self, rows: int, columns: int):
        self.packed = np.zeros((len(self.types), rows, columns), np.int32)
        self.fields = self.unpacked(self.packed)

    @classmethod
    def unpacked(cls, packed) -> dict[str, jax.Array]:
        """The fields, by name: views of a numpy array, in a program arrays."""
        return {name: x.view(kind) for x, (name, kind) in zip(packed, cls.types.items(), strict=True)}

    def put(self, row: int, places, **values) -> None:
        """These in places of a row."""
        for name, value in values.items():
            self.fields[name][row, places] = value


class Given(Packed):
    """Tokens [B, T], padding where nothing is put."""

    types = dict.fromkeys(("tokens", "slots", "segment", "branch", "time", "index", "node"), np.int32)

    def __init__(self, rows: int, T: int):
        super().__init__(rows, T)
        self.fields["segment"][:] = -1

    @classmethod
    def read(cls, packed) -> tuple[jax.Array, Coordinates, jax.Array]:
        """(tokens_BT, their coordinates, slots_BT)."""
        fields = cls.unpacked(packed)
        tokens_BT, slots_BT = fields.pop("tokens"), fields.pop("slots")
        return tokens_BT, Coordinates(**fields), slots_BT

    @property
    def count(self) -> int:
        """How many were put."""
        return int((self.fields["segment"] >= 0).sum())


class Draws(Packed):
    """What is drawn in one step, of lanes [B, N]: of each, settings of `Sampling` too."""

    types = dict.fromkeys(("wanted", "segment", "node", "branch", "step", "told"), np.int32)
    types |= {name: {float: np.float32, int: np.int32}[type(x)] for name, x in Sampling()._asdict().items()}
    types |= dict.fromkeys(("stream", "seed"), np.uint32)

    def __init__(self, rows: int, lanes: int):
        super().__init__(rows, lanes)
        self.put(slice(None), slice(None), node=np.arange(lanes), **Sampling()._asdict())


def beginning(model, rows: int, length: int, branches: int) -> Held:
    """An empty state, where the weights are: in any other place, its first call would be compiled for it alone."""
    place = model.embedding[...].sharding
    place = NamedSharding(place.mesh, PartitionSpec()) if isinstance(place, NamedSharding) else place
    return jax.device_put(empty(model, rows, length, branches), place)


@functools.partial(jax.jit, static_argnames=("rows", "length", "branches"))
def empty(model, rows: int, length: int, branches: int) -> Held:
    """A cache in which no two arrays share memory, so that it can be given away."""
    cache, shape = model.init_cache(rows, length, branches=branches), (rows, length)
    at = dataclasses.replace(cache.coordinates, node=jnp.zeros(shape, jnp.int32))
    return Held(cache._replace(coordinates=at), jnp.zeros(shape, jnp.int32))


@functools.partial(jax.jit, donate_argnames="state")
def prefill(flat: Flat, state: Held, given, limits_BMM) -> Held:
    """With the tokens of `Given`; no logits are made."""
    tokens_BT, at, slots_BT = Given.read(given)
    cache = flat.model.extend(tokens_BT, at, state.cache, slots_BT=slots_BT, limits=limits_BMM)[1]
    return Held(cache, kept(state, tokens_BT, at, slots_BT))


@functools.partial(jax.jit, donate_argnames="state", static_argnames="alternatives")
def decode(flat: Flat, state: Held, given, limits_BMM, draws, alternatives: int) -> tuple[jax.Array, Held]:
    """What each lane draws from the logits of its place in `wanted`, as `found` reads it, and the state with the tokens
    of `Given`. draws: of `Draws`."""
    tokens_BT, at, slots_BT = Given.read(given)
    lane = Draws.unpacked(draws)
    branch_BN = lane["branch"]
    z_BNC, cache = flat.model.extend(
        tokens_BT, at, state.cache, slots_BT=slots_BT, wanted=lane["wanted"], limits=limits_BMM
    )
    state = Held(cache, kept(state, tokens_BT, at, slots_BT))
    of_each = lambda x: x.reshape(-1, 1, *x.shape[2:])  # noqa: E731  each lane as a row, with settings of its own
    z_R1C = of_each(z_BNC)

    def seen_R1C():
        """Which tokens each lane has in its prompt and in its text."""
        lanes = Coordinates(lane["segment"], branch_BN, 0 * branch_BN, 0 * branch_BN, lane["node"])
        own_BNS = rules.visible(OWN, lanes, cache.coordinates, limits_BMM)
        ids_BNS = jnp.where(own_BNS, state.tokens_BS[:, None], z_BNC.shape[-1])
        mark = lambda ids_S: jnp.zeros(z_BNC.shape[-1], bool).at[ids_S].set(True, mode="drop")  # noqa: E731
        return of_each(jax.vmap(jax.vmap(mark))(ids_BNS))

    lane_R = {name: x.reshape(-1) for name, x in lane.items()}
    settings = Sampling(*(lane_R[name] for name in Sampling._fields))
    step_R1, told_R = lane_R["step"][:, None], lane_R["told"] > 0
    next_R1 = sampling.next_tokens(z_R1C, seen_R1C, settings, lane_R["stream"], of_each(branch_BN), step_R1)
    drawn = sampling.likelihoods(z_R1C, next_R1, alternatives, told_R)
    bits = lambda x: jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)  # noqa: E731
    drawn = drawn._replace(log_p=bits(drawn.log_p), log_p_of_likeliest=bits(drawn.log_p_of_likeliest))
    return jnp.concatenate([x.reshape(*branch_BN.shape, -1) for x in drawn], axis=-1), state


def found(packed_X) -> Found:
    """What was found for one lane."""
    n = (len(packed_X) - 2) // 2
    log_p = packed_X.view(np.float32)
    return Found(packed_X[0], log_p[1], packed_X[2 : 2 + n], log_p[2 + n :])


def kept(state: Held, tokens_BT, at: Coordinates, slots_BT):
    """The tokens of the cache [B, S], with new ones in their slots."""
    S = state.tokens_BS.shape[1]
    return slots.put(state.tokens_BS, tokens_BT, slots.choose(at, state.cache.used, S, slots_BT)[0])


@jax.jit
def released(segment_BS, freed_BP):
    """Segments of the cache in which these pages are free."""
    return jnp.where(jnp.repeat(freed_BP, segment_BS.shape[1] // freed_BP.shape[1], axis=1), -1, segment_BS)


@functools.partial(jax.jit, donate_argnames="cache")
def forked(model, cache, source_B, target_B):
    """The cache in which states of branches are those of others."""
    return model.fork(cache, source_B, target_B)
