"""Softmax attention over coordinates: project -> attend -> output."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from lab import kernels
from lab.coordinates import Coordinates
from lab.errors import UserError
from lab.kernels.rules import Rule
from lab.model import mesh, parameter
from lab.model.position import rotate


class View(NamedTuple):
    """What every layer of one spec shares in a call: who sees whom, and the rotation of the new tokens."""

    rotation: tuple[jax.Array, jax.Array]
    queries: Coordinates
    keys: Coordinates
    tiles: kernels.Tiles | None
    start: jax.Array | None  # the cache slot of the first new token; None without a cache


class Keys(NamedTuple):
    """One layer's cache: rotated keys [B, S, G, K] and values [B, S, G, V]."""

    k_BSGK: jax.Array
    v_BSGV: jax.Array


class Attention(nnx.Module):
    """Multi-head attention with H query heads over G key-value heads (GQA, arXiv 2305.13245), no biases."""

    def __init__(self, model, rule: Rule, key: jax.Array):
        D, H, G, K = model.dim, model.heads, model.kv_heads, model.head_dim
        q, k, v, o = jax.random.split(key, 4)
        self.q = parameter.matrix(q, (D, H, K), ("embed", "heads", "head_dim"))
        self.k = parameter.matrix(k, (D, G, K), ("embed", "kv_heads", "head_dim"))
        self.v = parameter.matrix(v, (D, G, K), ("embed", "kv_heads", "head_dim"))
        gain = (2 * model.layers) ** -0.5
        self.o = parameter.matrix(o, (H, K, D), ("heads", "head_dim", "embed"), inputs=2, gain=gain)
        self.rule = rule
        self.softcap = model.softcap
        self.implementation = kernels.resolve(model.implementation)

    @staticmethod
    def check(model) -> None:
        if model.heads % model.kv_heads:
            valid = [g for g in range(1, model.heads + 1) if model.heads % g == 0]
            raise UserError(
                f"model.heads = {model.heads} is not divisible by model.kv_heads = {model.kv_heads}; "
                f"choose model.kv_heads among: {', '.join(map(str, valid))}"
            )

    @property
    def cached(self) -> tuple[tuple[int, int], ...]:
        """(groups, width) of what is cached for each token: keys and values."""
        return tuple(tuple(w.shape[-2:]) for w in (self.k, self.v))

    @property
    def work_per_key(self) -> int:
        """Numbers multiplied for a query and a key it sees: the score, and the part of the output, of every head."""
        return int(np.prod(self.q.shape[-2:])) + int(np.prod(self.o.shape[-3:-1]))

    @property
    def state_numbers(self) -> int:
        """Numbers kept for a row however long it is: none."""
        return 0

    def init_cache(self, batch: int, length: int, dtype) -> Keys:
        """Empty slots; a stacked mixer gives a stacked cache."""
        *stack, _, G, K = self.k.shape
        V = self.v.shape[-1]
        return Keys(jnp.zeros((*stack, batch, length, G, K), dtype), jnp.zeros((*stack, batch, length, G, V), dtype))

    def project(self, x_BTD, rotation):
        """Rotated queries [B, T, H, K] and keys [B, T, G, K], and values [B, T, G, V]."""
        q_BTHK, k_BTGK, v_BTGV = (
            jnp.einsum("btd,dhk->bthk", x_BTD, w[...].astype(x_BTD.dtype)) for w in (self.q, self.k, self.v)
        )
        return rotate(q_BTHK, rotation), rotate(k_BTGK, rotation), v_BTGV

    def output(self, o_BTHV):
        return jnp.einsum("bthk,hkd->btd", o_BTHV, self.o[...].astype(o_BTHV.dtype))

    def __call__(self, x_BTD: jax.Array, view: View, cache: Keys | None = None) -> tuple[jax.Array, Keys | None]:
        q_BTHK, k_BSGK, v_BSGV = self.project(x_BTD, view.rotation)
        if cache is not None:
            append = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), view.start, 1)  # noqa: E731
            cache = Keys(append(cache.k_BSGK, k_BSGK), append(cache.v_BSGV, v_BSGV))
            k_BSGK, v_BSGV = (x.astype(x_BTD.dtype) for x in cache)
        o_BTHV = attend_over_mesh(q_BTHK, k_BSGK, v_BSGV, view, self.rule, self.softcap, self.implementation)
        return self.output(o_BTHV), cache


def attend_over_mesh(q_BTHK, k_BSGK, v_BSGV, view: View, rule: Rule, softcap: float, implementation: str):
    """`kernels.attend` with rows, heads and queries over the mesh; every device gathers the keys of its rows."""
    tensor = mesh.current().get("tensor", 1)
    H, G = q_BTHK.shape[2], k_BSGK.shape[2]
    if H % tensor or (G % tensor and tensor % G):
        raise UserError(
            f"mesh.tensor = {tensor} does not divide {H} query heads over {G} key heads; choose a divisor of both"
        )
    if G % tensor:  # fewer groups than devices: each device holds the group of its heads
        k_BSGK, v_BSGV = (jnp.repeat(x, tensor // G, axis=2) for x in (k_BSGK, v_BSGV))

    def attend(q_BTHK, k_BSGK, v_BSGV, queries, keys, tiles):
        return kernels.attend(
            q_BTHK, k_BSGK, v_BSGV, queries, keys, rule, softcap=softcap, implementation=implementation, tiles=tiles
        )

    heads, shared, tokens = P(mesh.BATCH, "context", "tensor"), P(mesh.BATCH, None, "tensor"), P(mesh.BATCH, "context")
    specs = (heads, shared, shared, tokens, P(mesh.BATCH), tokens)
    return mesh.per_device(attend, specs, heads)(q_BTHK, k_BSGK, v_BSGV, view.queries, view.keys, view.tiles)


def plan_tiles_over_mesh(queries: Coordinates, keys: Coordinates, rule: Rule, implementation: str):
    """`kernels.plan_tiles` where `attend_over_mesh` will use it: each device plans for the queries it holds."""

    def plan(queries, keys):
        return kernels.plan_tiles(queries, keys, rule, implementation)

    tokens = P(mesh.BATCH, "context")
    return mesh.per_device(plan, (tokens, P(mesh.BATCH)), tokens)(queries, keys)


MIXERS = {"attention": Attention}
