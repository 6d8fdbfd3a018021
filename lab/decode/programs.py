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


class Given:
    """Tokens of one call: numpy arrays [B, T], padding where nothing is put."""

    def __init__(self, rows: int, T: int):
        self.tokens, self.slots = np.zeros((rows, T), np.int32), np.zeros((rows, T), np.int32)
        self.at = dataclasses.replace(Coordinates.padding(rows, T), node=np.zeros((rows, T), np.int32)).map(np.copy)

    def put(self, row: int, places, tokens, slots, **coordinates) -> None:
        """These in places of a row."""
        self.tokens[row, places], self.slots[row, places] = tokens, slots
        for name, values in coordinates.items():
            getattr(self.at, name)[row, places] = values

    @property
    def arrays(self) -> tuple:
        return self.tokens, self.at, self.slots

    @property
    def count(self) -> int:
        """How many were put."""
        return int((self.at.segment >= 0).sum())


class Draws:
    """What is drawn in one step: numpy arrays [B, N] of lanes."""

    def __init__(self, rows: int, lanes: int):
        shape = rows, lanes
        self.wanted, self.node = np.zeros(shape, np.int32), np.tile(np.arange(lanes, dtype=np.int32), (rows, 1))
        self.segment, self.branch, self.step = (np.zeros(shape, np.int32) for _ in range(3))
        self.stream, self.told = np.zeros(shape, np.uint32), np.zeros(shape, bool)
        types = (np.float32, np.int32, np.float32, np.float32, np.float32, np.uint32)
        self.settings = Sampling(*(np.full(shape, x, t) for x, t in zip(Sampling(), types, strict=True)))

    def put(self, row: int, lane: int, sampling: Sampling, **numbers) -> None:
        """Of one lane."""
        for name, value in numbers.items():
            getattr(self, name)[row, lane] = value
        for array, value in zip(self.settings, sampling, strict=True):
            array[row, lane] = value

    @property
    def arrays(self) -> tuple:
        return self.wanted, self.segment, self.node, self.branch, self.settings, self.stream, self.step, self.told


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
def prefill(flat: Flat, state: Held, tokens_BT, at: Coordinates, slots_BT, limits_BMM) -> Held:
    """With these tokens; no logits are made."""
    cache = flat.model.extend(tokens_BT, at, state.cache, slots_BT=slots_BT, limits=limits_BMM)[1]
    return Held(cache, kept(state, tokens_BT, at, slots_BT))


@functools.partial(jax.jit, donate_argnames="state", static_argnames="alternatives")
def decode(
    flat: Flat, state: Held, tokens_BT, at: Coordinates, slots_BT, limits_BMM, draws: tuple, alternatives: int
) -> tuple[Found, Held]:
    """What each lane draws from the logits of its place in `wanted`, and the state with these tokens."""
    wanted_BN, segment_BN, node_BN, branch_BN, *of_lanes = draws
    z_BNC, cache = flat.model.extend(tokens_BT, at, state.cache, slots_BT=slots_BT, wanted=wanted_BN, limits=limits_BMM)
    state = Held(cache, kept(state, tokens_BT, at, slots_BT))
    of_each = lambda x: x.reshape(-1, 1, *x.shape[2:])  # noqa: E731  each lane as a row, with settings of its own
    z_R1C = of_each(z_BNC)

    def seen_R1C():
        """Which tokens each lane has in its prompt and in its text."""
        lanes = Coordinates(segment_BN, branch_BN, 0 * branch_BN, 0 * branch_BN, node_BN)
        own_BNS = rules.visible(OWN, lanes, cache.coordinates, limits_BMM)
        ids_BNS = jnp.where(own_BNS, state.tokens_BS[:, None], z_BNC.shape[-1])
        mark = lambda ids_S: jnp.zeros(z_BNC.shape[-1], bool).at[ids_S].set(True, mode="drop")  # noqa: E731
        return of_each(jax.vmap(jax.vmap(mark))(ids_BNS))

    settings, stream_R, step_R, told_R = jax.tree.map(lambda x: x.reshape(-1), tuple(of_lanes))
    next_R1 = sampling.next_tokens(z_R1C, seen_R1C, settings, stream_R, of_each(branch_BN), step_R[:, None])
    found = sampling.likelihoods(z_R1C, next_R1, alternatives, told_R)
    return jax.tree.map(lambda x: x.reshape(*branch_BN.shape, *x.shape[2:]), found), state


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
