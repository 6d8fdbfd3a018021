"""The gated delta rule where every branch is a chain of its own, which goes on from the state that the prompt left.

The tokens of a row are a tree: those of branch 0, and from their end one chain for each other branch. N places hold a
state each, and which chain it is of. What a chunk of tokens writes still solves one triangular system, in which a token
meets those before it on its own path alone. Letters as in lab.model.transformer; N places, C and c tokens of a chunk.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lab.coordinates import Coordinates
from lab.errors import UserError
from lab.model import slots


class Chains(NamedTuple):
    """What the chains of a row have become: states in float32 or wider, and the (segment, branch) that each is of.

    A cache keeps the chain of branch n in place n. A branch of a segment that its place does not hold yet begins at the
    prompt's state, and a prompt of another segment at none.
    """

    s_BHNKV: jax.Array
    segment_BN: jax.Array
    branch_BN: jax.Array

    @classmethod
    def empty(cls, places: int, batch: int, H: int, K: int, V: int, dtype, stack: tuple[int, ...] = ()) -> "Chains":
        """No chain at all; of so many stacked layers."""
        segment = jnp.full((*stack, batch, places), -1, jnp.int32)
        return cls(jnp.zeros((*stack, batch, H, places, K, V), dtype), segment, jnp.zeros_like(segment))

    @property
    def places(self) -> int:
        return self.segment_BN.shape[-1]


def fork(chains: Chains, source, target) -> Chains:
    """Branch `target` [B] now is where branch `source` [B] is; -1: no fork in that row. One number: of every row.

    A number whose branch has ended is given to another by a fork, be it from the prompt, 0. Raises UserError for
    branches that have no place, where they are known.
    """
    B, N = chains.segment_BN.shape[-2:]
    for name, branch in (("source", source), ("target", target)):
        if (found := slots.known(branch)) is not None and ((found < -1) | (found >= N)).any():
            raise UserError(f"fork: {name} = {branch} has no place in a cache of branches 0 to {N - 1}")
    source_B, target_B = (jnp.broadcast_to(jnp.asarray(x), B) for x in (source, target))
    goes_BN = (target_B[:, None] == jnp.arange(N)) & (source_B[:, None] >= 0)

    def copied(x, goes_BN, axis: int):
        index = source_B.reshape(B, *(1,) * (goes_BN.ndim - 1))
        index = jnp.maximum(index, 0)[(None,) * (x.ndim - goes_BN.ndim)]
        return jnp.where(goes_BN, jnp.take_along_axis(x, index, axis=axis), x)

    s = copied(chains.s_BHNKV, goes_BN[:, None, :, None, None], -3)
    branch = jnp.where(goes_BN, jnp.arange(N), chains.branch_BN)
    return Chains(s, copied(chains.segment_BN, goes_BN, -1), branch)


def check(at: Coordinates, places: int) -> None:
    """Refuses branches that have no place, where they are known and not traced."""
    segment, branch = slots.known(at.segment), slots.known(at.branch)
    if segment is None or branch is None or not (segment >= 0).any():
        return
    if (most := branch[segment >= 0].max()) >= places:
        raise UserError(
            f"a token of branch {most} has no place in a cache of branches 0 to {places - 1}; "
            f"choose init_cache(..., branches={most}), or lower numbers"
        )


def delta_rule(q_BTHK, k_BTHK, v_BTHV, decay_BTH, beta_BTH, at: Coordinates, chains: Chains, size: int, whole: bool):
    """(o [B, T, H, V], the chains after the tokens), `size` tokens at a time; `decay` is log alpha.

    whole: rows begin at nothing, and their chains are laid one after another, so that two places are enough; otherwise
    branch n goes on in place n. Raises UserError for branches that have no place, where they are known.
    """
    inputs, size = (q_BTHK, k_BTHK, v_BTHV, decay_BTH, beta_BTH, at.segment, at.branch), min(size, at.shape[1])
    if not whole:
        check(at, chains.places)
        return over_chunks((*inputs, at.branch), size, chains)
    order_BT = jnp.lexsort((at.branch, jnp.where(at.segment < 0, np.iinfo(np.int32).max, at.segment)))
    laid = [in_order(jnp.asarray(x), order_BT) for x in inputs]
    o_BTHV, chains = over_chunks((*laid, jnp.minimum(laid[-1], 1)), size, chains)
    return in_order(o_BTHV, jnp.argsort(order_BT, axis=1)), chains


def in_order(x_BT, order_BT):
    """The tokens [B, T, ...] of each row, rearranged."""
    return jnp.take_along_axis(x_BT, order_BT.reshape(*order_BT.shape, *(1,) * (x_BT.ndim - 2)), axis=1)


def over_chunks(inputs: tuple, size: int, chains: Chains):
    """`one_chunk` on one chunk after another; padding fills the last."""
    B, T = inputs[0].shape[:2]

    def chunked(x, fill: int):
        widths = ((0, 0), (0, -T % size)) + ((0, 0),) * (x.ndim - 2)
        return jnp.moveaxis(jnp.pad(x, widths, constant_values=fill).reshape(B, -1, size, *x.shape[2:]), 1, 0)

    fills = (0, 0, 0, 0, 0, -1, 0, 0)
    chunks = tuple(chunked(jnp.asarray(x), fill) for x, fill in zip(inputs, fills, strict=True))
    chains, o_XBCHV = jax.lax.scan(lambda chains, chunk: one_chunk(*chunk, chains), chains, chunks)
    return jnp.moveaxis(o_XBCHV, 0, 1).reshape(B, -1, *o_XBCHV.shape[3:])[:, :T], chains


def one_chunk(q_BCHK, k_BCHK, v_BCHV, decay_BCH, beta_BCH, segment_BC, branch_BC, place_BC, chains: Chains):
    """(the chains after a chunk of tokens c, its outputs [B, C, H, V]): lab.model.delta.one_chunk on a tree."""
    q_BHCK, k_BHCK, v_BHCV = (x.swapaxes(1, 2) for x in (q_BCHK, k_BCHK, v_BCHV))
    real_BC, place_N, s_BHNKV = segment_BC >= 0, jnp.arange(chains.places), chains.s_BHNKV
    beta_BHC1 = jnp.where(real_BC[..., None], beta_BCH, 0).swapaxes(1, 2)[..., None]

    at_BCN = real_BC[..., None] & (place_BC[..., None] == place_N)
    same_BCN = (segment_BC[..., None] == chains.segment_BN[:, None]) & real_BC[..., None]
    goes_on_BCN = at_BCN & same_BCN & (branch_BC[..., None] == chains.branch_BN[:, None])
    of_prompt_BCN = same_BCN & (chains.branch_BN[:, None] == 0) & (place_N == 0)
    reads_BCN = goes_on_BCN | (of_prompt_BCN & ~goes_on_BCN.any(-1, keepdims=True))
    same_branch_BCc = branch_BC[:, :, None] == branch_BC[:, None, :]
    same_segment_BCc = (segment_BC[:, :, None] == segment_BC[:, None, :]) & real_BC[:, :, None]
    path_BCc = jnp.tril(same_segment_BCc & (same_branch_BCc | (branch_BC[:, None, :] == 0)))  # c is on the path to C

    fall_BHC = jnp.einsum("bts,bsh->bht", path_BCc.astype(decay_BCH.dtype), decay_BCH, precision="highest")
    between_BHCc = faded(fall_BHC[..., :, None] - fall_BHC[..., None, :], path_BCc[:, None])
    since_BHCN = faded(fall_BHC[..., None], reads_BCN[:, None])

    def of_chains(x_BHCK):
        """What vectors read from the state that each token began at."""
        x_BHCX = (since_BHCN[..., None] * x_BHCK[..., None, :]).reshape(*x_BHCK.shape[:3], -1)
        return x_BHCX @ s_BHNKV.reshape(*x_BHCX.shape[:2], -1, s_BHNKV.shape[-1])

    lower_BHCc = jnp.tril(beta_BHC1 * (k_BHCK @ k_BHCK.swapaxes(-1, -2)) * between_BHCc, -1)
    written_BHCV = jax.lax.linalg.triangular_solve(
        lower_BHCc + jnp.eye(lower_BHCc.shape[-1], dtype=lower_BHCc.dtype),
        beta_BHC1 * (v_BHCV - of_chains(k_BHCK)),
        left_side=True,
        lower=True,
        unit_diagonal=True,
    )
    o_BHCV = of_chains(q_BHCK) + (q_BHCK @ k_BHCK.swapaxes(-1, -2) * between_BHCc) @ written_BHCV

    last_BN = jnp.where(at_BCN, jnp.arange(at_BCN.shape[1])[:, None], -1).max(1)
    grows_BN = last_BN >= 0
    at_last = lambda x_BHCX: jnp.take_along_axis(x_BHCX, jnp.maximum(last_BN, 0)[:, None, :, None], axis=2)  # noqa: E731
    until_BHNC = jnp.where(grows_BN[:, None, :, None], at_last(between_BHCc), 0)
    from_BHNN = at_last(since_BHCN)
    keeps_BHN = jnp.where(grows_BN[:, None], jnp.diagonal(from_BHNN, axis1=-2, axis2=-1), 1)
    forks_BHN = jnp.where(grows_BN[:, None] & (place_N > 0), from_BHNN[..., 0], 0)
    s_BHNKV = keeps_BHN[..., None, None] * s_BHNKV + forks_BHN[..., None, None] * s_BHNKV[:, :, :1]
    s_BHNKV += jnp.einsum("bhnck,bhcv->bhnkv", until_BHNC[..., None] * k_BHCK[:, :, None], written_BHCV)
    tag_BN = lambda x_BC: jnp.take_along_axis(x_BC, jnp.maximum(last_BN, 0), axis=1)  # noqa: E731
    segment_BN = jnp.where(grows_BN, tag_BN(segment_BC), chains.segment_BN)
    branch_BN = jnp.where(grows_BN, tag_BN(branch_BC), chains.branch_BN)
    return Chains(s_BHNKV, segment_BN, branch_BN), o_BHCV.swapaxes(1, 2)


def faded(log_decay, where):
    """exp of log decays, 0 where a path does not lead."""
    return jnp.exp(jnp.where(where, log_decay, -jnp.inf))
