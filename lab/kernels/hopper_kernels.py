"""The kernels of attention for Hopper GPUs: forward, dq, and dk with dv, over tile lists. See lab.kernels.pallas_gpu.

b: row of the batch; h, g: head and group; q, k: tokens of a tile. What is named .._s lies in shared memory.
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lab.coordinates import Coordinates
from lab.kernels import hopper
from lab.kernels.pallas_common import MASKED
from lab.kernels.rules import Rule, pairs_visible


class HopperStatic(NamedTuple):
    """What the program is compiled for."""

    rule: Rule
    scale: float
    softcap: float
    parts: tuple[int, ...]  # of the dimensions of a query: (those that stay,) F, F; or all of them


def _seen(rule: Rule, q_at_s, k_at_s, of_queries, of_keys, shape):
    """Who sees whom, as a matrix; coordinates [4, n] of queries and keys, and which of them are rows."""
    spread = lambda at_s, over: Coordinates(*(over(at_s[i], shape) for i in range(4)))  # noqa: E731
    return pairs_visible(rule, spread(q_at_s, of_queries), spread(k_at_s, of_keys))


def _scores(dot, static: HopperStatic):
    """(s, c): capped scores are s * c, in base 2, and the greatest s is that of the greatest."""
    if static.softcap:
        return static.softcap * hopper.tanh(static.scale / static.softcap * dot), hopper.LOG2E
    c = hopper.LOG2E * static.scale
    return (dot, c) if c > 0 else (dot * c, 1.0)


def _score_gradients(p, dp, delta, s, static: HopperStatic):
    """Of the scores before they were capped."""
    ds = p * (dp - delta)
    return ds * (1 - jnp.square(s / static.softcap)) if static.softcap else ds


def _turned(a, b, cos_sin_s, sign: float = 1.0):
    """Both sides of every pair, rotated by the angle of each row, or back by it."""
    cos, sin = map(hopper.matrix, cos_sin_s)
    return a * cos - sign * sin * b, b * cos + sign * sin * a


def _turn(q_s, cos_sin_s) -> None:
    """Rotates queries where they lie."""
    turned = _turned(*map(hopper.matrix, q_s[-2:]), cos_sin_s)
    for x_s, x in zip(q_s[-2:], turned, strict=True):
        x_s[...] = x.astype(x_s.dtype)


def forward_kernel(
    q, k, v, q_at, k_at, turning, order, keys, full, total,
    o, lse, own, pipelines, results_s, turns, *, static, crew,
):  # fmt: skip
    own, of_keys, of_values = (hopper.Pipeline(*pipeline) for pipeline in (own, *pipelines))
    tokens = of_values.buffers[0].shape[1]
    shape, heads, lists = (hopper.ROWS, tokens), q.shape[2], (keys, full, total)
    over_turns = functools.partial(hopper.over_turns, order, lists, heads, hopper.TILE // tokens, crew)

    def copies(turn):
        b, g = turn.b, lax.div(turn.head, heads // k.shape[2])
        read = hopper.tokens_of(keys, turn, tokens)

        def mine(rows):
            of_queries = *hopper.columns_of(q.at[b, rows, turn.head], static.parts), q_at.at[b, :, rows]
            return *of_queries, *(x.at[b, rows] for x in turning)

        def sources(step):
            at, _ = read(step)
            return (*hopper.columns_of(k.at[b, at, g], static.parts), k_at.at[b, :, at]), (v.at[b, at, g],)

        hopper.bring(turn, own, mine)
        hopper.feed(turn, (of_keys, of_values), sources)

    def take_turns():
        """The consumers meet twice in a step, and in a turn without steps: one when its first product is under way, the
        other before its second. So one is half a step ahead: it has one more meeting at the end, the other at the
        beginning."""
        if crew.consumers > 1:
            plgpu.barrier_arrive(turns)
            plgpu.barrier_wait(turns)

    def products(me, turn):
        mine, own_arrived, own_free = own.at(me)
        (*q_s, q_at_s), cos_sin_s = mine[: len(static.parts) + 1], mine[len(static.parts) + 1 :]

        def take(step, sums, masked: bool):
            o_qV, top_q, sum_q = sums
            (*k_s, k_at_s), _, k_free = of_keys.at(turn.done + step)
            (v_s,), v_arrived, v_free = of_values.at(turn.done + step)
            (dot_qk,) = hopper.dots([(q_s, k_s)], take_turns)
            s_qk, c = _scores(dot_qk, static)
            if masked:
                seen_qk = _seen(static.rule, q_at_s, k_at_s, hopper.rows, hopper.columns, shape)
                s_qk, c = jnp.where(seen_qk, s_qk * c, MASKED), 1.0  # of a product, MASKED would not be exact below
            plgpu.barrier_arrive(k_free)
            # Now, not at the end of the turn: there the one that is behind waits for the next step of the other, whose
            # queries are copied once both are done with these.
            pl.when(step + 1 == turn.total)(lambda: plgpu.barrier_arrive(own_free))
            new_q = jnp.maximum(top_q, s_qk.max(1) * c)
            shrink_q = jnp.exp2(top_q - new_q)
            p_qk = jnp.exp2(s_qk * c - hopper.rows(new_q, shape))
            sum_q = sum_q * shrink_q + p_qk.sum(1)
            o_qV = o_qV * hopper.rows(shrink_q, o_qV.shape)
            # Exponentials come before the wait: that is when the other one multiplies.
            o_qV, new_q, sum_q, p_qk = lax.optimization_barrier((o_qV, new_q, sum_q, p_qk.astype(v.dtype)))
            if crew.consumers > 1:
                plgpu.barrier_arrive(turns)
            plgpu.barrier_wait(v_arrived)
            if crew.consumers > 1:
                plgpu.barrier_wait(turns)
            next_arrived = of_keys.at(turn.done + step + 1)[1]
            wait = lambda: pl.when(step + 1 < turn.total)(lambda: plgpu.barrier_wait(next_arrived))  # noqa: E731
            (o_qV,) = hopper.add_dots([(o_qV, p_qk, v_s)], wait)
            plgpu.barrier_arrive(v_free)
            return o_qV, new_q, sum_q

        plgpu.barrier_wait(own_arrived)
        if turning:
            _turn(q_s, cos_sin_s)
            plgpu.commit_smem()
        is_token_q = hopper.by_row(q_at_s[0]) >= 0
        nothing = jnp.zeros(hopper.ROWS, jnp.float32)
        start = hopper.zeros(hopper.ROWS, v.shape[3]), hopper.by_row(nothing + MASKED), hopper.by_row(nothing)
        pl.when(turn.total > 0)(lambda: plgpu.barrier_wait(of_keys.at(turn.done)[1]))

        @pl.when(turn.total == 0)
        def _():
            plgpu.barrier_arrive(own_free)
            take_turns()
            take_turns()

        o_qV, top_q, sum_q = hopper.over_list(turn, take, start)
        # A row that saw nothing has kept its first maximum, or has summed exp2(0) over hidden keys.
        saw_q = (top_q > MASKED / 2) & is_token_q
        sum_q = jnp.where(saw_q, sum_q, 1)
        o_s, lse_s = (x_s.at[me] for x_s in results_s)
        plgpu.wait_smem_to_gmem(0)  # of the turn before
        o_s[...] = (o_qV * hopper.rows(jnp.where(saw_q, 1 / sum_q, 0), o_qV.shape)).astype(o.dtype)
        lse_s[...] = jnp.where(saw_q, top_q / hopper.LOG2E + jnp.log(sum_q), -jnp.inf)
        queries = turn.rows(me)
        hopper.write((o_s, o.at[turn.b, queries, turn.head]), (lse_s, lse.at[turn.b, turn.head, queries]))

    def all_products(me):
        pl.when(me == 1)(take_turns)
        over_turns(functools.partial(products, me))
        pl.when(me == 0)(take_turns)

    hopper.roles(crew.consumers, lambda: over_turns(copies), all_products)


def dq_kernel(
    q, k, v, q_at, k_at, do, lse, delta, turning, order, keys, full, total,
    dq, *turned_and_scratch, static, crew,
):  # fmt: skip
    *turned, own, pipelines, dq_s, _ = turned_and_scratch
    own, pipeline = (hopper.Pipeline(*pipeline) for pipeline in (own, *pipelines))
    in_parts = functools.partial(hopper.columns_of, parts=static.parts)
    tokens = pipeline.buffers[0].shape[2]
    shape, heads, lists = (hopper.ROWS, tokens), q.shape[2], (keys, full, total)
    over_turns = functools.partial(hopper.over_turns, order, lists, heads, hopper.TILE // tokens, crew)

    def copies(turn):
        b, h, g = turn.b, turn.head, lax.div(turn.head, heads // k.shape[2])
        read = hopper.tokens_of(keys, turn, tokens)

        def mine(rows):
            numbers = q_at.at[b, :, rows], lse.at[b, h, rows], delta.at[b, h, rows]
            return do.at[b, rows, h], *numbers, *in_parts(q.at[b, rows, h]), *(x.at[b, rows] for x in turning)

        def sources(step):
            at, _ = read(step)
            return ((k_at.at[b, :, at], v.at[b, at, g], *in_parts(k.at[b, at, g])),)

        hopper.bring(turn, own, mine)
        hopper.feed(turn, [pipeline], sources)

    def products(me, turn):
        mine, own_arrived, own_free = own.at(me)
        (do_s, q_at_s, lse_s, delta_s, *q_s), cos_sin_s = mine[: 4 + len(static.parts)], mine[4 + len(static.parts) :]
        queries, mine_s = turn.rows(me), [x_s.at[me] for x_s in dq_s] or q_s

        def take(step, sums, masked: bool):
            (k_at_s, v_s, *k_s), arrived, free = pipeline.at(turn.done + step)
            plgpu.barrier_wait(arrived)
            dot_qk, dp_qk = hopper.dots([(q_s, k_s), ([do_s], [v_s])])
            s_qk, c = _scores(dot_qk, static)
            p_qk = jnp.exp2(s_qk * c - hopper.rows(lse_q, shape))
            if masked:
                p_qk = jnp.where(_seen(static.rule, q_at_s, k_at_s, hopper.rows, hopper.columns, shape), p_qk, 0)
            ds_qk = _score_gradients(p_qk, dp_qk, hopper.rows(delta_q, shape), s_qk, static).astype(k.dtype)
            sums = hopper.add_dots([(part, ds_qk, x_s) for part, x_s in zip(sums, k_s, strict=True)])
            plgpu.barrier_arrive(free)
            return sums

        plgpu.barrier_wait(own_arrived)
        if turning:
            _turn(q_s, cos_sin_s)
            hopper.write(*zip(q_s, in_parts(turned[0].at[turn.b, queries, turn.head]), strict=True))
        lse_q, delta_q = hopper.by_row(lse_s[...]), hopper.by_row(delta_s[...])
        sums = hopper.over_list(turn, take, [hopper.zeros(hopper.ROWS, part) for part in static.parts])
        plgpu.wait_smem_to_gmem(0)  # of the turn before, and of the turned queries
        if turning:
            sums[-2:] = _turned(*sums[-2:], cos_sin_s, -1.0)
        with hopper.released(own_free, in_place=not dq_s):
            for part_s, part in zip(mine_s, sums, strict=True):
                part_s[...] = (static.scale * part).astype(dq.dtype)
            hopper.write(*zip(mine_s, in_parts(dq.at[turn.b, queries, turn.head]), strict=True))

    hopper.roles(crew.consumers, lambda: over_turns(copies), lambda me: over_turns(functools.partial(products, me)))


def dkv_kernel(
    q, k, v, q_at, k_at, do, lse, delta, order, queries, full, total,
    *wanted_and_scratch, static, wanted, crew,
):  # fmt: skip
    *found, own, pipelines, found_s, _ = wanted_and_scratch
    own, pipeline = (hopper.Pipeline(*pipeline) for pipeline in (own, *pipelines))
    tokens, heads = pipeline.buffers[0].shape[2], q.shape[2] // k.shape[2]
    shape, lists, steps = (hopper.ROWS, tokens), (queries, full, total), hopper.TILE // tokens * heads
    over_turns = functools.partial(hopper.over_turns, order, lists, k.shape[2], steps, crew)

    def copies(turn):
        b, g = turn.b, turn.head
        read = hopper.tokens_of(queries, turn, tokens, heads)

        def sources(step):
            at, head = read(step)
            h = g * heads + head
            return ((q_at.at[b, :, at], q.at[b, at, h], do.at[b, at, h], lse.at[b, h, at], delta.at[b, h, at]),)

        hopper.bring(turn, own, lambda rows: (k.at[b, rows, g], v.at[b, rows, g], k_at.at[b, :, rows]))
        hopper.feed(turn, [pipeline], sources)

    def products(me, turn):
        (k_s, v_s, k_at_s), own_arrived, own_free = own.at(me)

        def take(step, sums, masked: bool):
            (q_at_s, q_s, do_s, lse_s, delta_s), arrived, free = pipeline.at(turn.done + step)
            plgpu.barrier_wait(arrived)
            dot_kq, *dp_kq = hopper.dots([([k_s], [q_s]), *([([v_s], [do_s])] if "dk" in wanted else [])])
            s_kq, c = _scores(dot_kq, static)
            p_kq = jnp.exp2(s_kq * c - hopper.columns(lse_s[...], shape))
            if masked:
                p_kq = jnp.where(_seen(static.rule, q_at_s, k_at_s, hopper.columns, hopper.rows, shape), p_kq, 0)
            terms = {"dv": (p_kq, do_s)}
            if "dk" in wanted:
                terms["dk"] = _score_gradients(p_kq, *dp_kq, hopper.columns(delta_s[...], shape), s_kq, static), q_s
            terms = [terms[name] for name in wanted]
            sums = hopper.add_dots([(sum_, x.astype(q.dtype), y_s) for sum_, (x, y_s) in zip(sums, terms, strict=True)])
            plgpu.barrier_arrive(free)
            return sums

        plgpu.barrier_wait(own_arrived)
        widths, scales = {"dk": k.shape[3], "dv": v.shape[3]}, {"dk": static.scale, "dv": 1.0}
        sums = hopper.over_list(turn, take, [hopper.zeros(hopper.ROWS, widths[name]) for name in wanted])
        own_s = {"dk": k_s, "dv": v_s}
        mine_s = [x_s.at[me] for x_s in found_s] or [own_s[name] for name in wanted]
        plgpu.wait_smem_to_gmem(0)  # of the turn before
        with hopper.released(own_free, in_place=not found_s):
            for name, sum_, x_s in zip(wanted, sums, mine_s, strict=True):
                x_s[...] = (scales[name] * sum_).astype(k.dtype)
            here = (x.at[turn.b, turn.rows(me), turn.head] for x in found)
            hopper.write(*zip(mine_s, here, strict=True))

    hopper.roles(crew.consumers, lambda: over_turns(copies), lambda me: over_turns(functools.partial(products, me)))
