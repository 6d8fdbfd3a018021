"""What kernels for Hopper GPUs are made of in Mosaic: roles, turns, products, layouts of their sums, copies.

As many programs run as there are processors, and each takes tiles in turn; or one for each tile. It has one
warpgroup that copies, ahead of those that compute: up to CONSUMERS, each its own ROWS rows of the tile, on the same
copies. What is named .._s lies in shared memory. The structure of FlashAttention-3 (arXiv 2407.08608).
"""

import contextlib
import functools
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

ROWS = 64  # that a warpgroup multiplies at once
CONSUMERS = 2
TILE = CONSUMERS * ROWS  # tokens of a tile of the lists
CHUNKS = (64, 32, 16)  # numbers of a swizzled row
LOG2E = math.log2(math.e)
PROGRAM, ROLE = "program", "warpgroup"
REGISTERS = {1: (240, 24), 2: (232, 40)}  # by consumers: of a thread that computes, and of one that copies
SHARED = 224 * 1024  # bytes of shared memory that a program plans with; 227 KiB are there
STAGES = 4  # buffers of a pipeline at most
PROCESSORS = 132  # of an H100 or H200, where the device does not say


class Crew(NamedTuple):
    """How many programs there are, and how many warpgroups compute in each."""

    programs: int
    consumers: int


class Pipeline(NamedTuple):
    """What is copied again and again: several buffers of each array; for each buffer a barrier at which its copies
    arrive, and one at which those that read it are done."""

    buffers: tuple
    arrived: object
    free: object

    def at(self, step):
        """(arrays, arrived, free) of the buffer that a step has."""
        slot = lax.rem(step, jnp.int32(self.count))
        return [x_s.at[slot] for x_s in self.buffers], self.arrived.at[slot], self.free.at[slot]

    @property
    def count(self) -> int:
        return self.buffers[0].shape[0]


class Turn(NamedTuple):
    """One tile of the lists, of row `b` of the batch and of a head or group, that a program computes.

    part: the first of its parts of ROWS tokens that this program has. full, total: steps that hide nothing, and all.
    done: steps of the turns before this one. first: whether this is the first turn.
    """

    b: jax.Array
    head: jax.Array
    tile: jax.Array
    part: jax.Array
    full: jax.Array
    total: jax.Array
    done: jax.Array
    first: jax.Array

    def rows(self, consumer):
        return pl.ds((self.tile * CONSUMERS + self.part + consumer) * ROWS, ROWS)


def over_turns(order, tiles, heads: int, steps: int, crew: Crew, body) -> None:
    """body(turn) for all turns of this program. The tiles of all rows of the batch are taken in `order`, of each all
    heads side by side, so that lists never get longer; each entry of them takes so many steps. Every other round begins
    with the last program, so that none has the longer list each time."""
    _, full, total = tiles
    parts, of_row = CONSUMERS // crew.consumers, total.shape[1]
    programs, me = crew.programs, lax.axis_index(PROGRAM)
    rounds, rest = divmod(order.shape[0] * parts * heads, programs)
    place = lambda round_: jnp.where(lax.rem(round_, 2) == 0, me, programs - 1 - me)  # noqa: E731

    def turn(round_, done):
        n = round_ * programs + place(round_)
        part, tile = lax.rem(lax.div(n, heads), parts), order[lax.div(n, heads * parts)]
        b, own = lax.div(tile, of_row), lax.rem(tile, of_row)
        here = Turn(b, lax.rem(n, heads), own, part, full[b, own] * steps, total[b, own] * steps, done, round_ == 0)
        body(here)
        return done + here.total

    lax.fori_loop(0, rounds + (place(jnp.int32(rounds)) < rest).astype(jnp.int32), turn, jnp.int32(0))


def roles(consumers: int, copies, products) -> None:
    """copies() in the warpgroup that copies, products(consumer) in those that compute."""
    role, (many, few) = lax.axis_index(ROLE), REGISTERS[consumers]

    @pl.when(role < consumers)
    def _():
        plgpu.set_max_registers(many, action="increase")
        products(role)
        plgpu.wait_smem_to_gmem(0)

    @pl.when(role == consumers)
    def _():
        plgpu.set_max_registers(few, action="decrease")
        copies()


def bring(turn: Turn, own: Pipeline, sources) -> None:
    """Copies what each consumer has of its own, sources(rows), once it is done with that of the turn before."""
    for consumer in range(own.count):
        targets_s, arrived, free = own.at(jnp.int32(consumer))
        pl.when(~turn.first)(functools.partial(_wait_to_overwrite, free))
        copy(sources(turn.rows(consumer)), targets_s, arrived)


def feed(turn: Turn, pipelines, sources) -> None:
    """Copies what each step reads, sources(step) for each pipeline, as soon as there is a free buffer."""

    def step(i, _):
        for pipeline, source in zip(pipelines, sources(i), strict=True):
            targets_s, arrived, free = pipeline.at(turn.done + i)
            pl.when(turn.done + i >= pipeline.count)(functools.partial(_wait_to_overwrite, free))
            copy(source, targets_s, arrived)

    lax.fori_loop(0, turn.total, step, None)


def _wait_to_overwrite(free) -> None:
    plgpu.barrier_wait(free)
    plgpu.commit_smem()  # what was read otherwise than by products comes before what copies write


def dots(pairs, meanwhile=lambda: None) -> list:
    """a @ b^T in float32 for each pair of operands, which come in parts of their columns: all at once."""

    def multiply(*sums):
        for sum_, (a_s, b_s) in zip(sums, pairs, strict=True):
            for x_s, y_s in zip(a_s, b_s, strict=True):
                plgpu.wgmma(sum_, x_s, y_s.transpose((1, 0)))
        meanwhile()
        return tuple(sum_[...] for sum_ in sums)

    return list(pl.run_scoped(multiply, *(plgpu.ACC((a[0].shape[0], b[0].shape[0]), jnp.float32) for a, b in pairs)))


def add_dots(triples, meanwhile=lambda: None) -> list:
    """sums + a @ b for each (sums, a, b), where a is a value: all at once."""

    def multiply(sums):
        for sum_, (_, a, b_s) in zip(sums, triples, strict=True):
            plgpu.wgmma(sum_, a, b_s)
        meanwhile()

    return list(pl.run_state(multiply)(tuple(plgpu.ACC.init(sum_) for sum_, _, _ in triples)))


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
    """Starts to copy results (from, to) out of shared memory."""
    plgpu.commit_smem()
    for source_s, target in pairs:
        plgpu.copy_smem_to_gmem(source_s, target)


@contextlib.contextmanager
def released(free, in_place: bool):
    """Says that this consumer has read what it had of its own: before it writes results, or after, if they are written
    there."""
    if not in_place:
        plgpu.barrier_arrive(free)
    yield
    if in_place:
        plgpu.wait_smem_to_gmem(0)
        plgpu.barrier_arrive(free)


def over_list(turn: Turn, take, sums):
    """sums after take(step, sums, masked) for each step, of which the first `full` hide nothing."""
    sums = lax.fori_loop(0, turn.full, functools.partial(take, masked=False), sums)
    return lax.fori_loop(turn.full, turn.total, functools.partial(take, masked=True), sums)


def tokens_of(keys, turn: Turn, size: int, heads: int = 1):
    """(step) -> (the `size` tokens, and which of the heads) that it reads: of each tile on a list all heads in turn,
    and of each head all parts of the tile."""
    parts = TILE // size

    def of(step):
        tile = keys[turn.b, turn.tile, lax.div(step, parts * heads)]
        part = lax.rem(step, parts) if parts > 1 else 0
        return pl.ds(tile * TILE + part * size, size), lax.rem(lax.div(step, parts), heads)

    return of


def _shared(x, *buffers: int):
    """Shared memory for arrays like x; bfloat16 is tiled and swizzled as products want it."""
    transforms = ()
    if x.dtype == jnp.bfloat16:
        chunk = next(chunk for chunk in CHUNKS if x.shape[-1] % chunk == 0)
        transforms = plgpu.TilingTransform((8, chunk)), plgpu.SwizzleTransform(2 * chunk)
    return plgpu.SMEM((*buffers, *x.shape), x.dtype, transforms=transforms)


def _bytes(arrays) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays)


def call(kernel, name: str, turns: int, inputs, outputs, own, pipelines, results, consumers: int, stay: bool = True):
    """Runs a kernel of so many turns of two consumers. inputs: arrays; outputs: like what.

    In shared memory, each like what: own: copied for each consumer at each turn; pipelines: copied for each step, for
    all consumers, with as many buffers as fit; results: of each consumer, to be copied out.

    stay: a program for each processor takes many turns, and copies for the next while it computes one. Else there is a
    program for each turn, which the processor takes that is free first: for few turns of unlike lengths.
    """
    turns = turns * CONSUMERS // consumers
    there = getattr(jax.devices()[0], "core_count", PROCESSORS)
    crew = Crew(min(turns, there) if stay else turns, consumers)
    taken = consumers * _bytes((*own, *results))
    stages = min(STAGES, (SHARED - taken) // _bytes(x for pipeline in pipelines for x in pipeline))
    assert stages > 1, f"{name}: no room for two buffers beside {taken} bytes"
    pipeline_s = lambda like, count, readers: (  # noqa: E731
        tuple(_shared(x, count) for x in like),
        plgpu.Barrier(num_arrivals=len(like), num_barriers=count),
        plgpu.Barrier(num_arrivals=readers, num_barriers=count),
    )
    run = plgpu.kernel(
        functools.partial(kernel, crew=crew),
        kernel_name=name,
        out_type=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs),
        grid=(crew.programs,),
        grid_names=(PROGRAM,),
        num_threads=consumers + 1,
        thread_name=ROLE,
        scratch_types=(
            pipeline_s(own, consumers, 1),
            tuple(pipeline_s(like, stages, consumers) for like in pipelines),
            tuple(_shared(x, consumers) for x in results),
            plgpu.Barrier(num_arrivals=consumers),
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
    )
    return run(*inputs)
