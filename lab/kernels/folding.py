"""Queries and keys as tiles: the heads that read the same keys are folded into the rows of a query tile.

N query tiles of all rows of the batch, M key tiles; q and k: tokens of a tile; C bundles of F query heads that read one
group of keys, F a divisor of H / G; R = F * q rows.
"""

import jax.numpy as jnp


def whole(x_BTHK, tile: int, width: int = 1):
    """Padded to whole tiles of tokens, and to a width that is a multiple of `width`; itself where it is that."""
    tokens, numbers = -x_BTHK.shape[1] % tile, -x_BTHK.shape[3] % width
    return jnp.pad(x_BTHK, ((0, 0), (0, tokens), (0, 0), (0, numbers))) if tokens or numbers else x_BTHK


def fold_queries(x_BTHK, tile: int, C: int):
    """[B, T, H, K] -> [N, C, R, K] with R = (head of the bundle, token of the tile)."""
    x = whole(x_BTHK, tile)
    B, T, H, K = x.shape
    return x.reshape(B, T // tile, tile, C, H // C, K).transpose(0, 1, 3, 4, 2, 5).reshape(-1, C, H // C * tile, K)


def unfold_queries(x_NCRK, B: int, T: int, H: int):
    """What fold_queries was given, [B, T, H, K]."""
    N, C, R, K = x_NCRK.shape
    tile = R // (H // C)
    x = x_NCRK.reshape(B, N // B, C, H // C, tile, K).transpose(0, 1, 4, 2, 3, 5)
    return x.reshape(B, N // B * tile, H, K)[:, :T]


def key_tiles(x_BSGK, tile: int):
    """[B, S, G, K] -> [M, k, G, K]: nothing moves where the tile divides S."""
    return whole(x_BSGK, tile).reshape(-1, tile, *x_BSGK.shape[2:])


def spread_queries(q_BTHK, G: int):
    """[B, T, H, G K]: each query with zeros for the groups that are not its own, so that one product takes all heads.

    It multiplies G times as much, and puts no keys of a head apart from those of others, which takes a CPU longer.
    """
    B, T, H, K = q_BTHK.shape
    own_GG = jnp.eye(G, dtype=q_BTHK.dtype)
    return jnp.einsum("btgrk,gh->btgrhk", q_BTHK.reshape(B, T, G, H // G, K), own_GG).reshape(B, T, H, G * K)


def own_values(o_BTHV, G: int):
    """[B, T, H, V] of [B, T, H, G V]: of the sums of all groups' values that of its own."""
    B, T, H, _ = o_BTHV.shape
    o = o_BTHV.reshape(B, T, G, H // G, G, -1)
    return jnp.stack([o[:, :, g, :, g] for g in range(G)], axis=2).reshape(B, T, H, -1)
