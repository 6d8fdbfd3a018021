"""What kernels for TPUs are made of in Mosaic: blocks of the tiles that a list names, coordinates, rotation, calls."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lab.coordinates import Coordinates
from lab.kernels import tiles as tile_lists
from lab.kernels.pallas_common import Static, dot
from lab.kernels.rotary import angles
from lab.kernels.tiles import Steps

LANES = 128
VMEM = 32 * 2**20  # of the 64 MiB or more that a core has
QUERIES, KEYS = "queries", "keys"


def turns(frequencies_3F, K: int):
    """(frequencies, partners) of the K dimensions of a head, or None if it does not rotate.

    Frequencies [3, K]: the same for both of a pair, 0 for those that stay. Partners [K, K] put -b in the place of a,
    and a in that of b, of every pair: lanes cannot be cut anywhere.
    """
    if frequencies_3F is None:
        return None
    F = frequencies_3F.shape[1]
    a, b = K - 2 * F + jnp.arange(F), K - F + jnp.arange(F)
    wide_3K = jnp.concatenate([jnp.zeros((3, K - 2 * F)), frequencies_3F, frequencies_3F], axis=1)
    return wide_3K, jnp.zeros((K, K)).at[b, a].set(-1).at[a, b].set(1)


def rows(ref) -> Coordinates:
    """Coordinates [1, n] of a block [4, n]."""
    return Coordinates(*(ref[i : i + 1, :] for i in range(4)))


def columns(ref) -> Coordinates:
    """Coordinates [n, 1] of a block [n, 4]."""
    return Coordinates(*(ref[:, i : i + 1] for i in range(4)))


def across(row_1R):
    """[1, R] as a column [R, 1]."""
    return jnp.broadcast_to(row_1R, (LANES, row_1R.shape[1])).T[:, :1]


def along(column_R1):
    """[R, 1] as a row [1, R]."""
    return jnp.broadcast_to(column_R1, (column_R1.shape[0], LANES)).T[:1]


def each_kind(flag, add) -> None:
    """add(masked) for the tile of this step, if it has one."""
    pl.when(flag & tile_lists.ADD_FULL != 0)(lambda: add(False))
    pl.when(flag & tile_lists.ADD_PARTIAL != 0)(lambda: add(True))


def turned(x_RK, q_at, turning, sign: float = 1.0):
    """Rotated by the angle of each row, or back by it; turning: what `turns` gave."""
    if turning is None:
        return x_RK
    frequencies, partners = turning
    angle_RK = angles(columns(q_at), [frequencies[i : i + 1, :] for i in range(3)])
    return x_RK * jnp.cos(angle_RK) + sign * jnp.sin(angle_RK) * dot(x_RK, partners[...], (1, 0))


def blocks(bundle, group, own: str):
    """(of_queries, of_keys): each gives the blocks of its side, of the bundle or group that a place of the grid means.

    The place is (.., step, ..), the step second; own: the side whose tile the step adds to.
    """

    def of(side: str, head):
        def block(*shape: int, heads: bool = True) -> pl.BlockSpec:
            def index(*arguments):
                *place, own_tiles, other_tiles, _ = arguments
                tile = (own_tiles if side == own else other_tiles)[place[1]]
                return (tile, head(*place), 0, 0) if heads else (tile, 0, 0)

            return pl.BlockSpec((None, None, *shape) if heads else (None, *shape), index)

        return block

    return of(QUERIES, bundle), of(KEYS, group)


def sums(*shape: int):
    return pltpu.VMEM(shape, jnp.float32)


def call(
    name: str, kernel, static: Static, grid: tuple, steps: Steps, inputs, turning, outputs, scratch, vmem: int = VMEM
):
    """Runs a kernel. inputs: (array, block); turning: whole arrays, or None; outputs: (like what, block)."""
    whole = [(x, pl.BlockSpec(x.shape, lambda *_: (0, 0))) for x in turning or ()]
    arrays, in_specs = zip(*inputs, *whole, strict=True)
    made, out_specs = zip(*outputs, strict=True)

    def with_refs(*refs):
        refs, held = refs[: -len(scratch)], refs[-len(scratch) :]
        refs, written = refs[: -len(made)], refs[-len(made) :]
        read = 3 + len(inputs)  # after the steps
        kernel(*refs[:read], refs[read:] or None, written, held)

    run = pl.pallas_call(
        with_refs,
        name=name,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=grid,
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=scratch,
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in made],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", *["arbitrary"] * (len(grid) - 1)), vmem_limit_bytes=vmem
        ),
        interpret=static.interpret,
    )
    return run(steps.own, steps.other, steps.flags, *arrays)
