"""Forgetting attention (FoX, arXiv 2503.02130): older keys fade at a rate that each token sets."""

import jax
import jax.numpy as jnp

from lab.kernels.rules import Rule
from lab.model import parameter
from lab.model.attending import View, attend_over_mesh
from lab.model.attention import Attention, Kept, Softmax, further_keys
from lab.options import without

PARTS = 3  # dimensions in which one F rides


class Forgetting(Attention):
    """s_ij += log f of every token that i sees and j does not, f = sigmoid(x w + b) for each head (equation 5).

    With F_i the sum of log f over what i sees, that is F_i - F_j where seeing is transitive, and the softmax takes
    out F_i: each key needs -F_j alone, which rides in more dimensions of it, a few for each query head of its group.
    """

    options = without(Softmax.options, "softcap")  # it would cap what is forgotten
    adds = ()  # its scores have a bias of their own
    stretches = False  # it rides in more dimensions of queries and keys
    rules = ("causal", "all_branches", "own_branch")  # transitive: a window is not

    def __init__(self, model, rule: Rule, key: jax.Array):
        super().__init__(model, rule, key)
        self.forget = parameter.matrix(
            further_keys(key, 1, after=3)[0], (model.dim, model.mixer.heads), ("embed", "heads")
        )
        self.forget_bias = parameter.bias(model.mixer.heads, "heads", value=4.0)  # f = 0.98: forgetting is learned

    @property
    def cached(self):
        """Beside keys and values, log f and F of every head."""
        return *super().cached, (self.heads, 1), (self.heads, 1)

    @property
    def work_per_key(self) -> int:
        """Also the dimensions that carry F, and the sum that makes it."""
        return super().work_per_key + self.heads * (self.heads // self.kv_heads) * PARTS + 1 + self.heads

    def init_cache(self, batch: int, length: int, dtype, branches: int = 1) -> Kept:
        """Log f and F in float32: F grows with the length."""
        *kept, log_f, total = super().init_cache(batch, length, dtype, branches)
        return *kept, *(x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in (log_f, total))

    def keep(self, x_BTD, rotation) -> Kept:
        """Keys, values and log f [B, T, H, 1]; F needs those of others."""
        x32 = x_BTD.astype(jnp.promote_types(x_BTD.dtype, jnp.float32))
        logit_BTH = jnp.einsum("btd,dh->bth", x32, self.forget[...]) + self.forget_bias[...]
        return *super().keep(x_BTD, rotation), jax.nn.log_sigmoid(logit_BTH)[..., None]

    def remember(self, x_BTD, view: View, cache: Kept | None) -> tuple[Kept, Kept | None]:
        new = self.keep(x_BTD, view.rotation)
        if cache is None:
            return (*new, self.total_seen(new[-1], view)), None
        *kept, total = cache
        kept = [view.put(old, x) for old, x in zip(kept, new, strict=True)]
        cache = *kept, view.put(total, self.total_seen(kept[-1], view))
        return cache, cache

    def total_seen(self, log_f_BSH1, view: View):
        """F [B, T, H, 1] of the new tokens. Over equal scores attention is a mean, and its normaliser the count: a
        whole number that is known through its logarithm alone, and so to fewer digits the larger it is."""
        log_f_BS1H = log_f_BSH1.swapaxes(2, 3)
        q_BT11 = jnp.zeros((*view.queries.shape, 1, 1), log_f_BS1H.dtype)
        k_BS11 = jnp.zeros((*log_f_BS1H.shape[:2], 1, 1), log_f_BS1H.dtype)
        mean_BT1H, count_BT1 = attend_over_mesh(q_BT11, k_BS11, log_f_BS1H, view.whole(), self, scale=1.0)
        return (mean_BT1H * jnp.round(jnp.exp(count_BT1))[..., None]).swapaxes(2, 3)

    def attend(self, q_BTHK, kept: Kept, view: View, decoding: bool):
        if view.frequencies is not None:  # before queries grow by the dimensions that carry F
            q_BTHK, view = self.turned("q", q_BTHK, view.rotation), view.of_rotated()
        k_BSGK, v_BSGV, _, total_BSH1 = kept
        B, S, G, _ = k_BSGK.shape
        R = self.heads // G
        parts_BSHP = jnp.stack(parts(-total_BSH1[..., 0], k_BSGK.dtype), axis=-1)
        own_RX = jnp.repeat(jnp.eye(R, dtype=q_BTHK.dtype), PARTS, axis=1)  # each head reads the parts of its own F
        own_BTHX = jnp.broadcast_to(jnp.tile(own_RX, (G, 1)), (*q_BTHK.shape[:3], R * PARTS))
        q_BTHX = jnp.concatenate([q_BTHK * self.scale, own_BTHX], -1)
        k_BSGX = jnp.concatenate([k_BSGK, parts_BSHP.reshape(B, S, G, R * PARTS)], -1)
        o_BTHV, lse_BTH = attend_over_mesh(q_BTHX, k_BSGX, v_BSGV, view, self, scale=1.0)
        return o_BTHV, lse_BTH + view.take(total_BSH1)[..., 0]


def parts(x, dtype) -> list:
    """Three numbers of `dtype` that sum to x as float32 holds it, each with no more digits than bfloat16 has.

    So no product with one rounds them, be it of bfloat16 or of the fewer digits that an accelerator multiplies.
    """
    found = []
    for _ in range(PARTS - 1):
        found.append(jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7))  # the compiler may drop a cast
        x = x - found[-1]
    return [part.astype(dtype) for part in (*found, x)]
