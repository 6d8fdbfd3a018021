"""tokamax behind the door: what surrounds its kernel equals the reference, with a stand-in that is given the same mask
and intervals; with the library's own plain operation too, where it is installed; what it does not take is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import packs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attend import Case, check_close, draw, seeds
from test_cudnn import outputs_and_gradients

from lab import kernels
from lab.errors import UserError
from lab.kernels import reference, rules, tokamax

CASES = {
    "groups, capped": Case(T=70, S=70, rule=rules.own_branch & rules.window(9), H=4, G=2, K=8, V=8, softcap=1.5),
    "few queries": Case(T=7, S=50, rule=rules.causal, H=2, G=2, K=8, V=8),
}


def as_tokamax_does(q_BTHK, k_BSGK, v_BSGV, mask_B1TS, begin_B1T, end_B1T, scale, softcap):
    """Only the keys of the interval exist; of them those of the mask are seen."""
    k, v = (jnp.repeat(x, q_BTHK.shape[2] // x.shape[2], 2) for x in (k_BSGK, v_BSGV))
    scores = jnp.einsum("bthk,bshk->bhts", q_BTHK, k) * scale
    scores = softcap * jnp.tanh(scores / softcap) if softcap else scores
    place = jnp.arange(k.shape[1])
    there = (place >= begin_B1T[..., None]) & (place < end_B1T[..., None]) & mask_B1TS
    scores = jnp.where(there, scores, -1e30)
    top = scores.max(-1)
    p = jnp.exp(scores - top[..., None])
    return jnp.einsum("bhts,bshv->bthv", p / p.sum(-1, keepdims=True), v), (top, p.sum(-1))


def check(case: Case, seed: int, pack: str) -> None:
    arrays, coordinates, (do, _) = draw(case, seed, pack)
    got, expected = (
        outputs_and_gradients(module.attend, case, arrays, coordinates, do) for module in (tokamax, reference)
    )
    check_close(got, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@settings(max_examples=3)
@given(seed=seeds, pack=st.sampled_from(sorted(packs.PACKS)))
def test_what_surrounds_the_kernel_equals_the_reference(name, seed, pack):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokamax, "_call", as_tokamax_does)
        check(CASES[name], seed, pack)


@pytest.mark.parametrize("name", CASES)
def test_the_librarys_own_operation_takes_the_mask_as_it_is_meant(name, monkeypatch):
    base = pytest.importorskip("tokamax._src.ops.attention.base", reason="tokamax is an extra")
    monkeypatch.setattr(tokamax, "_kernel", base.DotProductAttention)
    check(CASES[name], 0, "scattered")


@pytest.mark.parametrize("rule", [rules.all_branches, rules.own_branch, rules.causal & rules.window(5)], ids=str)
def test_intervals_begin_and_end_at_keys_that_are_seen(rule):
    at = packs.PACKS["scattered"](np.random.default_rng(3), 2, 60)
    mask, begin, end = (np.asarray(x)[:, 0] for x in tokamax.plan(rule, at, at))
    assert mask.shape == (2, tokamax.TILE, tokamax.TILE) and not mask[:, 60:].any() and not mask[:, :, 60:].any()
    np.testing.assert_array_equal(mask[:, :60, :60], rules.visible(rule, at, at))
    for row, query in np.ndindex(*begin.shape):
        seen = np.flatnonzero(mask[row, query])
        assert (begin[row, query], end[row, query]) == ((seen[0], seen[-1] + 1) if len(seen) else (0, 0))


@pytest.mark.parametrize(("K", "V", "dtype", "why"), [
    (64, 64, jnp.float32, "computes in bfloat16 or float16, and this is float32"),
    (192, 128, jnp.bfloat16, "needs keys and values of one width, and these are 192 and 128"),
    (64, 64, jnp.bfloat16, None),
])  # fmt: skip
def test_what_it_takes(K, V, dtype, why):
    assert tokamax.refusal(K, V, dtype) == why


def test_it_is_an_extra_and_has_no_gradient_of_the_log_normaliser(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(tokamax, "OBSTACLE", "needs tokamax; `pip install tokamax` (Python 3.12)")
    with pytest.raises(UserError, match=r"'tokamax' needs tokamax; `pip install tokamax` .*; choose among: auto"):
        kernels.resolve("tokamax")
    monkeypatch.setattr(tokamax, "_call", as_tokamax_does)
    case = CASES["few queries"]
    arrays, at, _ = draw(case, 0)
    pull = jax.vjp(lambda *arrays: tokamax.attend(*arrays, *at, case.rule, 0.1, None)[1], *arrays)[1]
    with pytest.raises(UserError, match="'tokamax' has no gradient of the log normaliser"):
        pull(jnp.ones((*at[0].shape, case.H)))
