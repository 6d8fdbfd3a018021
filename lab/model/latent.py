"""Attention through a latent: MLA (arXiv 2405.04434, section 2.1) and its grouped form GLA (arXiv 2505.21487)."""

import jax
import jax.numpy as jnp

from lab.errors import UserError
from lab.kernels import Bias
from lab.kernels.rules import Rule
from lab.model import init, norm
from lab.model.attending import View, attend_over_mesh
from lab.model.attention import Kept, Softmax, further_keys, heads
from lab.model.position import rotary_dim
from lab.options import Option, without

LATENT_NORM = {"latent_norm": Option(True, "norms the latents")}


class LatentAttention(Softmax):
    """Keys and values are read from a latent c of mixer.latent numbers, and one rotated key that all heads share.

    [k_nope ; v] = c [W_UK ; W_UV], k = [k_nope ; R_j k_rope]. mixer.kv_heads latents, each of H / G heads: 1 is MLA,
    more is GLA. c is normed with mixer.latent_norm, and so is the query's latent where mixer.q_rank gives it one.
    Decoding uses the absorbed form: q_nope W_UK^T scores the latents themselves.
    """

    options = (
        without(Softmax.options, "qk_norm", "qk_norm_over")
        | LATENT_NORM
        | {"latent": Option(0, "numbers of a latent, cached", least=1)}
    )
    adds = (Bias,)  # the absorbed form has no keys to add to
    rotates = "qk"

    def __init__(self, model, rule: Rule, key: jax.Array):
        super().__init__(model, rule, key)
        _, k, v, _ = jax.random.split(key, 4)
        kv_down, rope = further_keys(key, 2, after=3)
        D, H, G, C = model.dim, model.mixer.heads, model.mixer.kv_heads, model.mixer.latent
        N = self.head_dim - self.rotary_dim
        self.kv_down = init.matrix(model, "latent", kv_down, (D, G, C), ("embed", "kv_heads", "latent"))
        R = self.rotary_dim
        self.rope = init.matrix(model, "key", rope, (D, 1, R), ("embed", "shared", "head_dim")) if R else None
        self.latent, self.latent_norm = C, norm.make(model, C) if model.mixer.latent_norm else None
        self.up_k = init.matrix(model, "key", k, (C, H, N), ("latent", "heads", "head_dim"))
        self.up_v = init.matrix(model, "value", v, (C, H, self.v_head_dim), ("latent", "heads", "head_dim"))

    @staticmethod
    def norm_of_query_latent(model):
        return norm.make(model, model.mixer.q_rank) if model.mixer.latent_norm else None

    @classmethod
    def check(cls, model) -> None:
        super().check(model)
        check_unrotated(model)

    @property
    def cached(self):
        return (self.kv_heads, self.latent), (1, self.rotary_dim)

    def keep(self, x_BTD, rotation) -> Kept:
        """Latents [B, T, G, C] and the rotated key [B, T, 1, R]."""
        c_BTGC = heads(x_BTD, self.kv_down)
        c_BTGC = c_BTGC if self.latent_norm is None else self.latent_norm(c_BTGC)
        return c_BTGC, self.turned("k", heads(x_BTD, self.rope), rotation)

    def read(self, kept: Kept):
        """Keys and values of every head, made from the latents."""
        c_BSGC, k_BS1R = kept
        k_BSHN, v_BSHV = (self.raised(c_BSGC, w) for w in (self.up_k, self.up_v))
        shared_BSHR = jnp.broadcast_to(k_BS1R, (*k_BSHN.shape[:3], self.rotary_dim))
        return jnp.concatenate([k_BSHN, shared_BSHR], -1), v_BSHV

    def attend(self, q_BTHK, kept: Kept, view: View, decoding: bool):
        return self.absorbed(q_BTHK, *kept, view) if decoding else super().attend(q_BTHK, kept, view, decoding)

    def absorbed(self, q_BTHK, c_BSGC, k_BS1R, view: View):
        """(q_nope W_UK^T) c + q_rope k_rope, over values c, and W_UV after: no key of its own for any head."""
        q_BTHN, q_BTHR = jnp.split(q_BTHK, [self.head_dim - self.rotary_dim], axis=-1)
        up_CHN, up_CHV = (w[...].astype(q_BTHK.dtype) for w in (self.up_k, self.up_v))
        q_BTHX = jnp.concatenate([jnp.einsum("bthn,chn->bthc", q_BTHN, up_CHN), q_BTHR], -1)
        shared_BSGR = jnp.broadcast_to(k_BS1R, (*c_BSGC.shape[:3], self.rotary_dim))
        o_BTHC, lse_BTH = attend_over_mesh(q_BTHX, jnp.concatenate([c_BSGC, shared_BSGR], -1), c_BSGC, view, self)
        return jnp.einsum("bthc,chv->bthv", o_BTHC, up_CHV), lse_BTH

    def raised(self, c_BSGC, up: jax.Array):
        """Each head's numbers, from the latent of its group."""
        C, H, N = up.shape
        up_CGRN = up[...].astype(c_BSGC.dtype).reshape(C, self.kv_heads, -1, N)
        return jnp.einsum("bsgc,cgrn->bsgrn", c_BSGC, up_CGRN).reshape(*c_BSGC.shape[:2], H, N)


def check_unrotated(model) -> None:
    """Refuses a head that rotates as a whole, in mixers that split it."""
    head_dim = model.mixer.head_dim
    if rotary_dim(model) >= head_dim:
        raise UserError(
            f"model.position.dim = {model.position.dim} leaves none of model.mixer.head_dim = {head_dim} unrotated, "
            f"which model.mixer.name = {model.mixer.name!r} needs; choose an even number of 2 to "
            f"{(head_dim - 1) // 2 * 2}"
        )
