"""What forgetting attention sums up, in the precision that it needs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import variants

from lab.coordinates import Coordinates
from lab.model.attending import View


@pytest.mark.slow
def test_forgetting_in_bfloat16_knows_what_it_forgets_to_float32():
    """Scores of F_i - F_j alone, over F of up to 150: one number of bfloat16 would be off by half a nat."""
    config = variants.config("mixer forgetting", model__compute="bfloat16")
    mixer = jax.tree.map(lambda w: w[0], tiny.model(config).blocks[0].mixer)
    T, H, G = 60, mixer.heads, mixer.kv_heads
    at = Coordinates.single(1, T)
    view = tiny.model(config).views(at, at)[0]
    rng = np.random.default_rng(0)
    log_f = -rng.uniform(0, 5, (1, T, H, 1)).astype(np.float32)
    total, v = np.cumsum(log_f, axis=1), rng.normal(size=(1, T, G, mixer.v_head_dim)).astype(np.float32)
    half = lambda x: jnp.asarray(x, jnp.bfloat16)  # noqa: E731
    q_BTHK, k_BSGK = half(np.zeros((1, T, H, mixer.head_dim))), half(np.zeros((1, T, G, mixer.head_dim)))
    kept = k_BSGK, half(v), jnp.asarray(log_f), jnp.asarray(total)
    o_BTHV, lse_BTH = jax.jit(lambda q: mixer.attend(q, kept, view, decoding=False))(q_BTHK)
    for h in range(H):
        scores = np.float64(total[0, :, None, h, 0]) - total[0, None, :, h, 0]
        weights_TS = np.where(np.tril(np.ones((T, T), bool)), np.exp(scores), 0)
        np.testing.assert_allclose(lse_BTH[0, :, h], np.log(weights_TS.sum(1)), atol=1e-3)
        expected = weights_TS / weights_TS.sum(1, keepdims=True) @ np.float64(half(v))[0, :, h * G // H]
        np.testing.assert_allclose(np.float64(o_BTHV[0, :, h]), expected, atol=0.03)


def test_what_forgetting_sums_over_a_long_row_is_a_sum_in_float32():
    """Against float64: of equal numbers to a last digit, since their mean is exact and their count a whole number; of
    others as near as float32 comes by adding them up one by one."""
    T, new = 16_384, 64
    mixer = jax.tree.map(
        lambda w: w[0], tiny.model(variants.config("mixer forgetting", model__rule="causal")).blocks[0]
    )
    at = Coordinates.single(1, T)
    angles = jnp.ones((1, new, 1, 4)), jnp.zeros((1, new, 1, 4))
    view = View(angles, None, at.map(lambda x: x[:, -new:]), at, None, jnp.arange(T - new, T)[None], "tiled")
    total_seen = jax.jit(lambda log_f: mixer.mixer.total_seen(log_f, view))
    drawn = -np.random.default_rng(0).uniform(0.01, 0.03, (1, T, mixer.mixer.heads, 1)).astype(np.float32)
    for log_f, most in ((np.full_like(drawn, -1 / 64), np.spacing(np.float32(255))), (drawn, None)):
        exact = np.cumsum(np.float64(log_f), axis=1)[:, -new:]
        by_hand = np.abs(np.cumsum(log_f, axis=1)[:, -new:] - exact).max()
        assert np.abs(np.asarray(total_seen(log_f), np.float64) - exact).max() <= (by_hand if most is None else most)
