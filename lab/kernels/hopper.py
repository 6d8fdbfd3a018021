"""What kernels for Hopper GPUs are made of in Mosaic: products, layouts of their sums, copies, and the walk of a list.

One warpgroup runs a program. What is named .._s lies in shared memory.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

BUFFERS = 2  # one tile is computed while the next is copied
CHUNKS = (64, 32, 16)  # numbers of a swizzled row
GRID = ("row", "head", "tile")


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


def over_list(full, total, sources, buffers, arrived, add, sums):
    """sums after add(masked, sums, *copies) for each of `total` steps, the first `full` of them without a mask.

    copies: of what sources(step) names. buffers: BUFFERS of each of them; arrived: a barrier for each buffer.
    """

    def start(step):
        turn = lax.rem(step, BUFFERS)
        copy(sources(step), [x_s.at[turn] for x_s in buffers], arrived.at[turn])

    def take(step, sums, masked: bool):
        # The step before this one has read its buffer: it has waited for its products, and commits what else it read.
        plgpu.commit_smem()
        pl.when(step + 1 < total)(lambda: start(step + 1))
        turn = lax.rem(step, BUFFERS)
        plgpu.barrier_wait(arrived.at[turn])
        return add(masked, sums, *(x_s.at[turn] for x_s in buffers))

    pl.when(total > 0)(lambda: start(jnp.int32(0)))
    sums = lax.fori_loop(0, full, functools.partial(take, masked=False), sums)
    return lax.fori_loop(full, total, functools.partial(take, masked=True), sums)


def place():
    """What this program computes: (row of the batch, head or group, tile)."""
    return tuple(lax.axis_index(name) for name in GRID)


def _shared(x, *buffers: int):
    """Shared memory for arrays like x; bfloat16 is tiled and swizzled as products want it."""
    transforms = ()
    if x.dtype == jnp.bfloat16:
        chunk = next(chunk for chunk in CHUNKS if x.shape[-1] % chunk == 0)
        transforms = plgpu.TilingTransform((8, chunk)), plgpu.SwizzleTransform(2 * chunk)
    return plgpu.SMEM((*buffers, *x.shape), x.dtype, transforms=transforms)


def call(kernel, name: str, grid: tuple, inputs, outputs, own, streamed, results=()):
    """Runs a kernel. inputs: arrays; outputs: like what. In shared memory, each like what:

    own: copied once; streamed: copied for each step; results: copied out.
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
            tuple(_shared(x, BUFFERS) for x in streamed),
            plgpu.Barrier(num_arrivals=len(streamed), num_barriers=BUFFERS),
            *map(_shared, results),
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
    )
    return run(*inputs)
