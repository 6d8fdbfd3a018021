"""What layers of one spec share in a call, and attention under it over the mesh. Letters as in lab.model.attention."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from lab import kernels
from lab.coordinates import Coordinates
from lab.errors import UserError
from lab.kernels import Bias
from lab.kernels.bands import Band, Growth, attend_bands
from lab.kernels.dropout import Dropped
from lab.kernels.rotary import rotate
from lab.kernels.rules import Rule
from lab.model import mesh, relative, slots
from lab.model.dropout import Masks


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class View:
    """What every layer of one spec shares in a call: who sees whom, and the rotation of the new tokens."""

    rotation: tuple[jax.Array, jax.Array] | None  # None: nothing rotates
    frequencies: jax.Array | None  # that it is made of [3, R / 2]; None: queries have rotated already
    queries: Coordinates
    keys: Coordinates
    tiles: Any  # what kernels.plan_tiles gave
    slots_BT: jax.Array | None  # of the new tokens in the cache, beyond it if they have none; None without a cache
    implementation: str = dataclasses.field(metadata=dict(static=True))  # of attention
    masks: Masks | None = None  # of dropout, in training; of one layer where it is that layer's
    added: Any = None  # to the scores of layers that have it in common, such as a Bias
    growth: Growth | None = None  # of queries
    bands: tuple[Band, ...] | None = None  # of a layer whose pairs turn by several maps: nothing has rotated yet
    limits: jax.Array | None = None  # int32 [B, M, M], how far nodes of texts that fork see each other
    plain: bool = dataclasses.field(default=True, metadata=dict(static=True))  # whether a kernel may rotate queries

    def of_rotated(self) -> "View":
        """The same for queries that have rotated already."""
        return dataclasses.replace(self, frequencies=None)

    def whole(self) -> "View":
        """The same with nothing dropped, for queries that have rotated already."""
        return dataclasses.replace(self, frequencies=None, masks=None)

    def of_layers(self, others: list["View"]) -> "View":
        """The same for a call whose heads are those of several layers in turn."""
        masks = None if self.masks is None else self.masks.of_layers([other.masks for other in others])
        return dataclasses.replace(self, masks=masks)

    def put(self, old_BS, new_BT):
        """An array of the cache [B, S, ...] that holds what the new tokens have [B, T, ...] too."""
        return slots.put(old_BS, new_BT, self.slots_BT)

    def take(self, x_BS):
        """Of an array over all that may be seen [B, S, ...], the part of the new tokens [B, T, ...]."""
        return x_BS if self.slots_BT is None else slots.take(x_BS, self.slots_BT)


def attend_over_mesh(q_BTHK, k_BSGK, v_BSGV, view: View, mixer, scale: float | None = None):
    """`kernels.attend`, or `attend_bands`, with rows, heads and queries over the mesh.

    Every device gathers the keys of its rows; a single head is every device's own. mixer: a `Softmax`. scale: None for
    the mixer's. Queries grow and rotate here, or rotate as a kernel that can reads them. What a position adds to scores
    is added here, that of heads where they are. Returns (o_BTHV, lse_BTH).
    """
    added = view.added if mixer.added is None else mixer.added()
    frequencies = view.frequencies if "q" in mixer.rotate else None
    in_kernel = view.plain and view.slots_BT is None and kernels.rotates(view.implementation, k_BSGK.shape[1])
    if view.growth is not None:
        q_BTHK = (q_BTHK * view.growth(view.queries)[..., None, None]).astype(q_BTHK.dtype)
    if frequencies is not None and not in_kernel:
        q_BTHK, frequencies = rotate(q_BTHK, view.rotation), None
    tensor = mesh.current().get("tensor", 1)
    H, G = q_BTHK.shape[2], k_BSGK.shape[2]
    over_heads = "tensor" if H > 1 else None
    if over_heads and (H % tensor or (G % tensor and tensor % G)):
        raise UserError(
            f"run.mesh.tensor = {tensor} does not divide {H} query heads over {G} key heads; choose a divisor of both"
        )
    if over_heads and G % tensor:  # fewer groups than devices: each device holds the group of its heads
        k_BSGK, v_BSGV = (jnp.repeat(x, tensor // G, axis=2) for x in (k_BSGK, v_BSGV))

    scale = mixer.scale if scale is None else scale

    def attend(q_BTHK, k_BSGK, v_BSGV, queries, keys, tiles, frequencies_3F, bands, added, dropout, limits):
        arguments = q_BTHK, k_BSGK, v_BSGV, queries, keys
        if isinstance(added, relative.Tables):
            return relative.attend(*arguments, mixer.rule, scale, mixer.softcap, added, dropout, limits)
        options = dict(
            scale=scale,
            softcap=mixer.softcap,
            implementation=view.implementation,
            tiles=tiles,
            return_lse=True,
            bias=added,
            dropout=dropout,
            limits=limits,
        )
        if bands is not None:
            return attend_bands(*arguments, bands, **options)
        return kernels.attend(*arguments, mixer.rule, frequencies_3F=frequencies_3F, **options)

    queries, shared, tokens = (
        P(mesh.BATCH, "context", over_heads), P(mesh.BATCH, None, over_heads), P(mesh.BATCH, "context")
    )  # fmt: skip
    dropout = None if view.masks is None else view.masks.of_attention(H)
    of_dropout = None if dropout is None else Dropped(P(), P(over_heads), tokens, P(mesh.BATCH))
    of_added = P(over_heads) if isinstance(added, Bias) else P()
    specs = (queries, shared, shared, tokens, P(mesh.BATCH), tokens, P(), P(), of_added, of_dropout, P(mesh.BATCH))
    shown = view.queries, view.keys, view.tiles
    return mesh.per_device(attend, specs, (queries, queries))(
        q_BTHK, k_BSGK, v_BSGV, *shown, frequencies, view.bands, added, dropout, view.limits
    )


def plan_tiles_over_mesh(
    queries: Coordinates, keys: Coordinates, rule: Rule, biased: bool, implementation: str, limits=None, lanes=False
):
    """`kernels.plan_tiles` where `attend_over_mesh` will use it: each device plans for the queries it holds.

    biased: whether a position adds to scores. lanes: whether each query goes on with a text of its own. Raises
    UserError for an implementation that does not.
    """

    def plan(queries, keys, limits):
        return kernels.plan_tiles(queries, keys, rule, implementation, biased, limits, lanes)

    tokens = P(mesh.BATCH, "context")
    return mesh.per_device(plan, (tokens, P(mesh.BATCH), P(mesh.BATCH)), tokens)(queries, keys, limits)
