"""Attention whose keys and values share numbers: S1, S2, S3 (kexue.fm/archives/10907) and GTA (arXiv 2505.21487).

c: the numbers of a key that do not rotate, which values have too; N of them. r: those that rotate, R of them.
"""

import jax
import jax.numpy as jnp

from lab.errors import UserError
from lab.kernels.rules import Rule
from lab.model import init, norm
from lab.model.attention import Kept, Softmax, further_keys, heads
from lab.model.latent import LATENT_NORM, check_unrotated
from lab.model.position import rotary_dim
from lab.options import without


class PartlyShared(Softmax):
    """S1: k = [c ; R_j r], v = [c ; e] with e of V - N numbers of its own."""

    options = without(Softmax.options, "qk_norm", "qk_norm_over")
    rope_of_all_groups = False  # whether the groups share one rotated key

    def __init__(self, model, rule: Rule, key: jax.Array):
        super().__init__(model, rule, key)
        _, c, e, _ = jax.random.split(key, 4)
        D, G, R, axes = model.dim, self.kv_heads, self.rotary_dim, ("embed", "kv_heads", "head_dim")
        N = self.head_dim - R
        one, its_axes = (1, ("embed", "shared", "head_dim")) if self.rope_of_all_groups else (G, axes)
        self.c = init.matrix(model, "value", c, (D, G, N), axes)
        rope = further_keys(key, 1, after=3)[0]
        self.rope = init.matrix(model, "key", rope, (D, one, R), its_axes) if R else None
        self.extra = init.matrix(model, "value", e, (D, G, self.v_head_dim - N), axes)

    @classmethod
    def check(cls, model) -> None:
        super().check(model)
        check_unrotated(model)
        shared, (_, V) = model.mixer.head_dim - rotary_dim(model), cls.widths(model)
        if shared >= V:
            raise UserError(
                f"model.mixer.v_head_dim = {model.mixer.v_head_dim} must be above {shared}, the numbers that values "
                f"share with keys in model.mixer.name = {model.mixer.name!r}; or 0 for model.mixer.head_dim"
            )
        if "v" in cls.rotated(model) and V - shared < rotary_dim(model):
            raise UserError(f"model.mixer.rotate = {model.mixer.rotate!r} would rotate what keys share; leave out v")

    @property
    def cached(self):
        N = self.head_dim - self.rotary_dim
        ropes = 1 if self.rope_of_all_groups or self.rope is None else self.kv_heads
        return (self.kv_heads, N), (ropes, self.rotary_dim), (self.kv_heads, self.v_head_dim - N)

    def keep(self, x_BTD, rotation) -> Kept:
        c_BTGN, r_BTGR, e_BTGE = (heads(x_BTD, w) for w in (self.c, self.rope, self.extra))
        return c_BTGN, self.turned("k", r_BTGR, rotation), self.turned("v", e_BTGE, rotation)

    def read(self, kept: Kept):
        c_BSGN, r_BSGR, e_BSGE = kept
        r_BSGR = jnp.broadcast_to(r_BSGR, (*c_BSGN.shape[:3], self.rotary_dim))
        return jnp.concatenate([c_BSGN, r_BSGR], -1), jnp.concatenate([c_BSGN, e_BSGE], -1)


class GroupedTied(PartlyShared):
    """GTA: S1 in which the groups share one rotated key."""

    rope_of_all_groups = True


class FullyShared(Softmax):
    """S2: k = v = [c ; R_j r]. The output's last R numbers are rotated back (VO-RoPE), so that they are relative."""

    options = without(Softmax.options, "v_head_dim")
    rotates_unasked = "qkvo"

    def __init__(self, model, rule: Rule, key: jax.Array):
        super().__init__(model, rule, key)
        k = jax.random.split(key, 4)[1]
        shape, axes = (model.dim, self.kv_heads, self.head_dim), ("embed", "kv_heads", "head_dim")
        self.kv = init.matrix(model, "value", k, shape, axes)

    @classmethod
    def check(cls, model) -> None:
        super().check(model)
        if ("k" in cls.rotated(model)) != ("v" in cls.rotated(model)):
            raise UserError(
                f"model.mixer.rotate = {model.mixer.rotate!r}: keys are the values in model.mixer.name = "
                f"{model.mixer.name!r}; have both k and v in it, or neither"
            )

    @property
    def cached(self):
        return ((self.kv_heads, self.head_dim),)

    def keep(self, x_BTD, rotation) -> Kept:
        kv_BTGK = heads(x_BTD, self.kv)
        return (self.turned("k", self.normed(self.k_norm, kv_BTGK), rotation),)

    def read(self, kept: Kept):
        return kept[0], kept[0]


class LatentShared(Softmax):
    """S3: k = [c ; R_j r], v = c: MLA as it decodes, without the low rank of its queries and output.

    c is normed with mixer.latent_norm. Holding W_UK and W_UV of an MLA inside its W_Q and W_O, at that MLA's
    mixer.softmax_scale, it computes the same.
    """

    options = without(Softmax.options, "v_head_dim", "qk_norm", "qk_norm_over") | LATENT_NORM
    rotates = "qk"

    def __init__(self, model, rule: Rule, key: jax.Array):
        super().__init__(model, rule, key)
        c = jax.random.split(key, 4)[1]
        D, G, N, R = model.dim, self.kv_heads, self.v_head_dim, self.rotary_dim
        self.c = init.matrix(model, "value", c, (D, G, N), ("embed", "kv_heads", "latent"))
        rope, axes = further_keys(key, 1, after=3)[0], ("embed", "kv_heads", "head_dim")
        self.rope = init.matrix(model, "key", rope, (D, G, R), axes) if R else None
        self.latent_norm = norm.make(model, N) if model.mixer.latent_norm else None

    @staticmethod
    def widths(model) -> tuple[int, int]:
        return model.mixer.head_dim, model.mixer.head_dim - rotary_dim(model)

    @classmethod
    def check(cls, model) -> None:
        check_unrotated(model)
        super().check(model)

    @property
    def cached(self):
        return (self.kv_heads, self.v_head_dim), (self.kv_heads if self.rope is not None else 1, self.rotary_dim)

    def keep(self, x_BTD, rotation) -> Kept:
        c_BTGN = heads(x_BTD, self.c)
        c_BTGN = c_BTGN if self.latent_norm is None else self.latent_norm(c_BTGN)
        return c_BTGN, self.turned("k", heads(x_BTD, self.rope), rotation)

    def read(self, kept: Kept):
        c_BSGN, r_BSGR = kept
        r_BSGR = jnp.broadcast_to(r_BSGR, (*c_BSGN.shape[:3], self.rotary_dim))
        return jnp.concatenate([c_BSGN, r_BSGR], -1), c_BSGN
