"""What kernels for Hopper GPUs are made of in Mosaic: products, layouts of their sums, copies, and the walk of a list.

One warpgroup runs a program. What is named .._s lies in shared memory.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

CHUNKS = (64, 32, 16)  # numbers of a swizzled row
LOG2E = math.log2(math.e)
GRID = ("turn", "head")  # the last of which the machine counts first


def dot(a_s, b_s):
    """a @ b^T in float32, of operands in parts of their columns."""

    def multiply(sums):
        for x_s, y_s in zip(a_s, b_s, strict=True):
            plgpu.wgmma(sums, x_s, y_s.transpose((1, 0)))
        return sums[...]

    return pl.run_scoped(multiply, plgpu.ACC((a_s[0].shape[0], b_s[0].shape[0]), jnp.float32))


def add_dot(sums, a, b_s):
    """sums + a @ b, where a is a value."""
    return pl.run_state(lambda sums: plgpu.wgmma(sums, a, b_s))(plgpu.ACC.init(sums))


def tanh(x):
    """Through the exponential: the instruction for tanh is off by 2^-11."""
    return 1 - 2 / (jnp.exp2(2 * LOG2E * x) + 1)


def matrix(x_s):
    """In float32, laid out as products are."""
    return plgpu.layout_cast(x_s[...], plgpu.Layout.WGMMA).astype(jnp.float32)


def by_row(x):
    """Laid out as a sum over columns is."""
    return plgpu.layout_cast(x, plgpu.Layout.WGMMA.reduce(1))


def by_column(x):
    return plgpu.layout_cast(x, plgpu.Layout.WGMMA.reduce(0))


def rows(x, shape):
    """A number for each row, as a matrix."""
    return lax.broadcast_in_dim(by_row(x), shape, (0,))


def columns(x, shape):
    """A number for each column, as a matrix."""
    return lax.broadcast_in_dim(by_column(x), shape, (1,))


def zeros(*shape):
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)


def columns_of(x, parts: tuple[int, ...]) -> list:
    """Slices of an operand's columns."""
    ends = list(itertools.accumulate(parts))
    return [x.at[..., pl.ds(end - part, part)] for part, end in zip(parts, ends, strict=True)]


def copy(sources, targets_s, arrived) -> None:
    """Starts copies; each arrives at the barrier."""
    for source, target_s in zip(sources, targets_s, strict=True):
        plgpu.copy_gmem_to_smem(source, target_s, arrived)


def write(*pairs) -> None:
    """Copies results (from, to) out of shared memory."""
    plgpu.commit_smem()
    for source_s, target in pairs:
        plgpu.copy_smem_to_gmem(source_s, target)
    plgpu.wait_smem_to_gmem(0)


def over_list(full, total, listed, sources, coordinates, streamed, add, sums):
    """sums after add(sums, at_s, *copies) for each of `total` steps.

    listed(step): the tile of a step, and of steps beyond the last any. copies: of what sources(step, tile) names. at_s:
    the coordinates of its tokens, copied from coordinates(tile); None in the first `full` steps, which hide nothing.
    streamed: some buffers of each copy and a barrier for each buffer, and the same of coordinates. One tile is computed
    while those for the other buffers are copied.
    """
    buffers, arrived, at_buffers, at_arrived = streamed
    ahead = at_buffers.shape[0] - 1

    def start(step, tile):
        turn = lax.rem(step, ahead + 1)
        copy(sources(step, tile), [x_s.at[turn] for x_s in buffers], arrived.at[turn])
        pl.when(step >= full)(lambda: copy([coordinates(tile)], [at_buffers.at[turn]], at_arrived.at[turn]))

    def take(step, carried, masked: bool):
        following, sums = carried
        # The step before this one has read its buffer: it has waited for its products, and commits what else it read.
        plgpu.commit_smem()
        pl.when(step + ahead < total)(lambda: start(step + ahead, following))
        following = listed(step + ahead + 1)  # on its way while this tile is computed: no copy waits for the list
        turn = lax.rem(step, ahead + 1)
        plgpu.barrier_wait(arrived.at[turn])
        if masked:
            plgpu.barrier_wait(at_arrived.at[turn])
        return following, add(sums, at_buffers.at[turn] if masked else None, *(x_s.at[turn] for x_s in buffers))

    for step in map(jnp.int32, range(ahead)):
        pl.when(step < total)(lambda step=step: start(step, listed(step)))
    carried = lax.fori_loop(0, full, functools.partial(take, masked=False), (listed(jnp.int32(ahead)), sums))
    return lax.fori_loop(full, total, functools.partial(take, masked=True), carried)[1]


def listed(tiles, b, own, heads: int = 1):
    """The tile of each step of a list, that each of so many heads takes in turn."""
    last = tiles.shape[2] - 1
    return lambda step: tiles[b, own, jnp.minimum(lax.div(step, heads), last)]


def tiles_of(at, b, tokens: int):
    """The coordinates of a tile."""
    return lambda tile: at.at[b, :, pl.ds(tile * tokens, tokens)]


def place(order, tiles: int):
    """What this program computes: (row of the batch, head or group, tile), the tiles of all rows in `order`."""
    turn, head = (lax.axis_index(name) for name in GRID)
    tile = order[turn]
    return lax.div(tile, tiles), head, lax.rem(tile, tiles)


def _shared(x, *buffers: int):
    """Shared memory for arrays like x; bfloat16 is tiled and swizzled as products want it."""
    transforms = ()
    if x.dtype == jnp.bfloat16:
        chunk = next(chunk for chunk in CHUNKS if x.shape[-1] % chunk == 0)
        transforms = plgpu.TilingTransform((8, chunk)), plgpu.SwizzleTransform(2 * chunk)
    return plgpu.SMEM((*buffers, *x.shape), x.dtype, transforms=transforms)


def call(kernel, name: str, grid: tuple, inputs, outputs, own, streamed, coordinates, results=(), buffers: int = 2):
    """Runs a kernel. inputs: arrays; outputs: like what. In shared memory, each like what:

    own: copied once; streamed: copied for each step; coordinates: for each that masks; results: copied out. buffers:
    of what is copied for a step.
    """
    run = plgpu.kernel(
        kernel,
        kernel_name=name,
        out_type=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs),
        grid=grid,
        grid_names=GRID,
        scratch_types=(
            tuple(_shared(x) for x in own),
            plgpu.Barrier(num_arrivals=len(own)),
            (
                tuple(_shared(x, buffers) for x in streamed),
                plgpu.Barrier(num_arrivals=len(streamed), num_barriers=buffers),
                _shared(coordinates, buffers),
                plgpu.Barrier(num_arrivals=1, num_barriers=buffers),
            ),
            *map(_shared, results),
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
    )
    return run(*inputs)
