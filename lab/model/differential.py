"""Differential attention V2: an attention map less another (Microsoft, unilm/Diff-Transformer V2; arXiv 2410.05258)."""

import jax
import jax.numpy as jnp

from lab.kernels.rules import Rule
from lab.model import parameter
from lab.model.attention import Attention, Softmax, further_keys


class Differential(Attention):
    """2 H query heads, o = o_1 - sigmoid(x w) o_2 for the two of each pair, which share a key-value group."""

    options = Softmax.options
    heads_each = 2

    def __init__(self, model, rule: Rule, key: jax.Array):
        super().__init__(model, rule, key)
        self.subtracted = parameter.matrix(
            further_keys(key, 1, after=3)[0], (model.dim, model.mixer.heads), ("embed", "heads")
        )

    def merge(self, o_BTHV, x_BTD):
        o_BTHPV = o_BTHV.reshape(*o_BTHV.shape[:2], -1, 2, self.v_head_dim)
        share_BTH = jax.nn.sigmoid(jnp.einsum("btd,dh->bth", x_BTD, self.subtracted[...].astype(x_BTD.dtype)))
        return o_BTHPV[..., 0, :] - share_BTH[..., None] * o_BTHPV[..., 1, :]
