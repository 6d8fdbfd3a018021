"""Which numbers dropout (arXiv 1207.0580) drops: a hash of where each one stands decides, not its place in memory.

So the same are dropped however a batch is cut, sharded or ordered, and whatever the backward pass computes again. The
hash is MurmurHash3_x86_32 of 32-bit words (A. Appleby, github.com/aappleby/smhasher): its state after the words that
many numbers share is kept, and one number costs one word more.

B rows, T queries, S keys, H query heads.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lab.errors import UserError

WORDS = 6  # of a number: step, layer, site, head, token, and the channel or the key's token; the seed is the hash's own


class Dropped(NamedTuple):
    """What `attend` drops of its probabilities.

    rate: the share, float32. head_H: uint32, the state of the hash after all words but the tokens. query_BT, key_BS:
    uint32, the words of the tokens.
    """

    rate: jax.Array
    head_H: jax.Array
    query_BT: jax.Array
    key_BS: jax.Array

    def states(self) -> jax.Array:
        """Of the hash for each query and head, uint32 [B, T, H]: the word of a key is all that is left."""
        return absorb(self.head_H, self.query_BT[..., None])

    def check(self, H: int) -> None:
        """Raises UserError for other heads."""
        if self.head_H.shape != (H,):
            raise UserError(f"dropout of {self.head_H.shape[0]} heads does not fit {H} query heads; choose {H}")


def absorb(state, word):
    """The state of the hash after one word more; both broadcast. Negative words count modulo 2^32."""
    mixed = _rotated(jnp.asarray(word).astype(jnp.uint32) * jnp.uint32(0xCC9E2D51), 15) * jnp.uint32(0x1B873593)
    return _rotated(jnp.asarray(state).astype(jnp.uint32) ^ mixed, 13) * jnp.uint32(5) + jnp.uint32(0xE6546B64)


def finished(state, words: int):
    """The hash, uint32, of a state after so many words."""
    h = state ^ jnp.uint32(4 * words)
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)


def hashed(seed, *words):
    """The hash of some words, uint32, in the shape that they broadcast to."""
    return finished(functools.reduce(absorb, words, seed), len(words))


def factors(state, word, rate, dtype):
    """0 for a number that is dropped, else 1 / (1 - rate), by the last of its WORDS."""
    bits = finished(absorb(state, word), WORDS)
    return jnp.where(bits >= (rate * 2.0**32).astype(jnp.uint32), 1 / (1 - rate), 0).astype(dtype)


@jax.custom_vjp
def dropped(x, state, word, rate):
    """x times its factors. They are computed again for the backward pass, which is the same product."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return (x * factors(state, word, rate, wide)).astype(x.dtype)


dropped.defvjp(lambda x, *at: (dropped(x, *at), at), lambda at, g: (dropped(g, *at), None, None, None))


def _rotated(x, bits: int):
    return (x << bits) | (x >> (32 - bits))
