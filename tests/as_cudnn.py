"""cuDNN's attention in plain JAX, for where there is no cuDNN: lab.kernels.cudnn._call."""

import jax
import jax.numpy as jnp


def call(q_BTHK, k_BSGK, v_BSGV, mask_B1TS, scale):
    """A mask is a bias of a large negative number, so that a query which sees nothing averages all values."""
    k, v = (jnp.repeat(x, q_BTHK.shape[2] // x.shape[2], 2) for x in (k_BSGK, v_BSGV))
    scores = jnp.einsum("bthk,bshk->bhts", q_BTHK, k, preferred_element_type=jnp.float32) * scale
    scores = scores + jnp.where(mask_B1TS, 0, -(2.0**41))
    return jnp.einsum("bhts,bshv->bthv", jax.nn.softmax(scores).astype(v.dtype), v), jax.nn.logsumexp(scores, -1)
