"""The next token of every branch, drawn from its logits: functions of the logits and of who is asked, of nothing else.

B rows, N branches, C vocabulary. Every number may be traced, so that requests with other settings share a program.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lab.errors import UserError


class Sampling(NamedTuple):
    """How tokens are drawn; for several requests, arrays [B]. Filters are applied in this order, to z / temperature."""

    temperature: float = 0.0  # 0: greedy, the token of the largest logit
    top_k: int = 0  # tokens with the k largest logits alone; 0: all
    top_p: float = 1.0  # the fewest tokens that have this probability together (nucleus sampling, arXiv 1904.09751)
    min_p: float = 0.0  # tokens with this share of the largest probability alone (arXiv 2407.01082)
    repetition_penalty: float = 1.0  # logits of tokens that the branch has seen (CTRL, arXiv 1909.05858, section 4.1)
    seed: int = 0  # of the random numbers


class Found(NamedTuple):
    """A token and how likely it was, in nats; for several, arrays [B, N], and [B, N, n] of the n likeliest tokens."""

    token: int
    log_p: float
    likeliest: jax.Array
    log_p_of_likeliest: jax.Array


RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "temperature": ("0, which is greedy, or a number from 1e-4 to 1e4", lambda x: x == 0 or 1e-4 <= x <= 1e4),
    "top_k": ("a whole number of at least 0; 0 keeps all tokens", lambda x: 0 <= x < 2**31),
    "top_p": ("a number above 0 and at most 1", lambda x: 0 < x <= 1),
    "min_p": ("a number from 0 to 1", lambda x: 0 <= x <= 1),
    "repetition_penalty": ("a number from 1e-4 to 1e4; 1 changes nothing", lambda x: 1e-4 <= x <= 1e4),
    "seed": ("a whole number from 0 to 2**32 - 1", lambda x: 0 <= x < 2**32),
}
FILTERS = ("top_k", "top_p", "min_p")


def check(sampling: Sampling) -> None:
    """Raises UserError for a setting that is out of its range, of another type, or without an effect."""
    for name, value in sampling._asdict().items():
        valid, inside = RANGES[name]
        whole = isinstance(Sampling._field_defaults[name], int)
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float) or not inside(value):
            raise UserError(f"{name} = {value!r} is not valid; choose {valid}")
    unread = [name for name in FILTERS if getattr(sampling, name) != Sampling._field_defaults[name]]
    if sampling.temperature == 0 and unread:
        raise UserError(
            f"{unread[0]} = {getattr(sampling, unread[0])} means nothing at temperature = 0, which takes the likeliest "
            "token; choose a temperature above 0"
        )


def penalised(z_BNC, seen_BNC, penalty_B):
    """Logits in which those of seen tokens are divided by the penalty, or multiplied by it where they are negative."""
    penalty_B11 = penalty_B[:, None, None]
    return jnp.where(seen_BNC, jnp.where(z_BNC > 0, z_BNC / penalty_B11, z_BNC * penalty_B11), z_BNC)


def likely(z_BNC, top_k_B, top_p_B, min_p_B):
    """Logits, -inf where a filter leaves a token out. Tokens of equal logits are kept or left out together."""
    C = z_BNC.shape[-1]
    top_k_B11, top_p_B11, min_p_B11 = (x[:, None, None] for x in (top_k_B, top_p_B, min_p_B))
    sorted_BNC = jnp.sort(z_BNC, axis=-1, descending=True)
    kept_BNC = (jnp.arange(C) < top_k_B11) | (top_k_B11 == 0)
    p_BNC = jax.nn.softmax(jnp.where(kept_BNC, sorted_BNC, -jnp.inf))
    before_BNC = jnp.cumsum(p_BNC, axis=-1) - p_BNC
    kept_BNC &= ((before_BNC < top_p_B11) | (top_p_B11 >= 1)) & (p_BNC >= min_p_B11 * p_BNC[..., :1])
    kept_BNC |= jnp.arange(C) == 0  # the likeliest, however small top_p is: float32 may have no such number
    least_BN1 = jnp.where(kept_BNC, sorted_BNC, jnp.inf).min(axis=-1, keepdims=True)
    return jnp.where(z_BNC >= least_BN1, z_BNC, -jnp.inf)


def noise(seed, request, branch, step, C: int):
    """Gumbel noise [C] for one token: a function of these four numbers alone, whatever else is in the batch."""
    key = jax.random.key(seed, impl="threefry2x32")
    for number in (request, branch, step):
        key = jax.random.fold_in(key, number)
    return jax.random.gumbel(key, (C,))


def next_tokens(z_BNC, seen_BNC: Callable[[], jax.Array], sampling: Sampling, request_B, branch_BN, step_BN):
    """The token of each branch, int32 [B, N]: argmax of z / temperature plus Gumbel noise is a draw of its softmax.

    seen_BNC: gives bool, which tokens each branch has seen. What no request asks for is not computed, and what one asks
    for changes no other.
    """

    def where(asked_B, change, z_BNC):
        """Logits that are changed in the rows that ask for it."""
        changed = lambda z_BNC: jnp.where(asked_B[:, None, None], change(z_BNC), z_BNC)  # noqa: E731
        return jax.lax.cond(asked_B.any(), changed, lambda z_BNC: z_BNC, z_BNC)

    def disturbed(z_BNC):
        of_branches = jax.vmap(noise, (None, None, 0, 0, None))
        return z_BNC + jax.vmap(of_branches, (0, 0, 0, 0, None))(
            sampling.seed, request_B, branch_BN, step_BN, z_BNC.shape[-1]
        )

    temperature_B, filters = sampling.temperature, (sampling.top_k, sampling.top_p, sampling.min_p)
    draws_B, penalty_B = temperature_B > 0, sampling.repetition_penalty
    z_BNC = where(penalty_B != 1, lambda z_BNC: penalised(z_BNC, seen_BNC(), penalty_B), z_BNC)
    z_BNC = z_BNC / jnp.where(draws_B, temperature_B, 1)[:, None, None]
    filtered_B = (sampling.top_k > 0) | (sampling.top_p < 1) | (sampling.min_p > 0)
    z_BNC = where(filtered_B, lambda z_BNC: likely(z_BNC, *filters), z_BNC)
    return jnp.argmax(where(draws_B, disturbed, z_BNC), axis=-1).astype(jnp.int32)


def likelihoods(z_BNC, token_BN, n: int, asked_B) -> Found:
    """How likely the softmax of logits finds the tokens, and its n likeliest: found where a row asks, else nothing."""
    log_sum_BN = jax.nn.logsumexp(z_BNC, axis=-1)
    log_p_BN = jnp.take_along_axis(z_BNC, token_BN[..., None], axis=-1)[..., 0] - log_sum_BN
    nothing = lambda z_BNC: (jnp.zeros((*token_BN.shape, n), z_BNC.dtype), jnp.zeros((*token_BN.shape, n), jnp.int32))  # noqa: E731
    top_BNn, likeliest_BNn = jax.lax.cond(asked_B.any(), lambda z_BNC: tuple(jax.lax.top_k(z_BNC, n)), nothing, z_BNC)
    return Found(token_BN, log_p_BN, likeliest_BNn, top_BNn - log_sum_BN[..., None])
