"""cuDNN behind the door: what surrounds its call equals the reference, with plain JAX in the place of the call; the
call itself is lowered for CUDA; and what it does not take is refused by name."""

import dataclasses

import as_cudnn
import jax
import jax.numpy as jnp
import numpy as np
import packs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attend import Case, check_close, draw, seeds, slowly

from lab import kernels
from lab.errors import UserError
from lab.kernels import cudnn, reference, rules
from lab.model.execution import REMAT

CASES = {
    "groups": Case(T=70, S=70, rule=rules.own_branch & rules.window(9), H=4, G=2),
    "few queries": Case(T=7, S=50, rule=rules.causal, H=2, G=2),
    "unequal": Case(T=33, S=33, rule=rules.all_branches, H=2, G=1, K=24, V=16),
}


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(cudnn, "_call", as_cudnn.call)


def outputs_and_gradients(attend, case, arrays, coordinates, do, **options):
    """Of o alone: (o, lse), (dq, dk, dv)."""
    scale = case.K**-0.5 if case.scale is None else case.scale
    run = lambda *arrays: attend(*arrays, *coordinates, case.rule, scale, None, **options)  # noqa: E731
    o, pull, lse = jax.vjp(run, *arrays, has_aux=True)
    return (o, lse), pull(do)


@pytest.mark.matrix("name")
@pytest.mark.parametrize("row_by_row", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("name", slowly(CASES, lambda name: name != "unequal"))
@settings(max_examples=3)
@given(seed=seeds, pack=st.sampled_from(sorted(packs.PACKS)))
def test_what_surrounds_the_call_equals_the_reference(name, row_by_row, seed, pack):
    arrays, coordinates, (do, _) = draw(CASES[name], seed, pack)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cudnn, "_call", as_cudnn.call)
        patch.setattr(cudnn, "MOST", 0 if row_by_row else cudnn.MOST)
        assert (cudnn.plan(CASES[name].rule, *coordinates) is None) == row_by_row
        got = outputs_and_gradients(cudnn.attend, CASES[name], arrays, coordinates, do)
    check_close(got, outputs_and_gradients(reference.attend, CASES[name], arrays, coordinates, do))


@pytest.mark.slow
def test_layers_share_a_mask_and_blind_queries_get_zeros(stand_in):
    case = CASES["groups"]
    arrays, (queries, keys), (do, _) = draw(case, 0)
    queries = dataclasses.replace(queries, segment=np.where(np.arange(case.T) % 3 == 0, 7, queries.segment))
    at = queries, keys
    sees_none = ~rules.visible(case.rule, *at).any(2)
    assert sees_none.any() and not sees_none.all()
    (o, lse), gradients = outputs_and_gradients(cudnn.attend, case, arrays, at, do, tiles=cudnn.plan(case.rule, *at))
    assert not o[sees_none].any() and (lse[sees_none] == -np.inf).all() and not gradients[0][sees_none].any()
    check_close(((o, lse), gradients), outputs_and_gradients(reference.attend, case, arrays, at, do))


def test_the_gradient_of_the_log_normaliser_is_refused(stand_in):
    case = CASES["groups"]
    arrays, at, _ = draw(case, 0)
    pull = jax.vjp(lambda *arrays: cudnn.attend(*arrays, *at, case.rule, 0.1, None)[1], *arrays)[1]
    with pytest.raises(UserError, match="'cudnn' has no gradient of the log normaliser"):
        pull(jnp.ones((*at[0].shape, case.H)))


def test_a_cap_is_refused(stand_in):
    arrays, at, _ = draw(CASES["groups"], 0)
    with pytest.raises(UserError, match=r"'cudnn' caps no scores \(softcap = 3.0\)"):
        cudnn.attend(*arrays, *at, rules.causal, 0.1, 3.0)


@pytest.mark.parametrize(("K", "V", "dtype", "capability", "why"), [
    (64, 64, jnp.float32, "9.0", "computes in bfloat16 or float16, and this is float32"),
    (64, 64, jnp.bfloat16, "7.5", "needs compute capability 8.0, and this GPU has 7.5"),
    (64, 32, jnp.bfloat16, "9.0", "needs keys and values of one width, or of 192 and 128, and these are 64 and 32"),
    (256, 256, jnp.bfloat16, "8.0", "needs widths of a multiple of 8 up to 128, and this is 256"),
    (36, 36, jnp.float16, "9.0", "needs widths of a multiple of 8 up to 256, and this is 36"),
    (256, 256, jnp.bfloat16, "9.0", None),
    (192, 128, jnp.bfloat16, "9.0", None),
    (128, 128, jnp.float16, "8.6", None),
    (128, 128, jnp.bfloat16, "10.0", None),
])  # fmt: skip
def test_what_it_takes(monkeypatch, K, V, dtype, capability, why):
    class Device:
        compute_capability = capability

    monkeypatch.setattr(jax, "devices", lambda: [Device])
    assert cudnn.refusal(K, V, dtype) == why


@pytest.mark.parametrize(("version", "faulty"), [(91002, False), (91300, True), (91402, True), (91500, False)])
def test_a_cudnn_with_a_known_fault_is_named(monkeypatch, version, faulty):
    monkeypatch.setattr(cudnn, "_version", lambda: version)
    monkeypatch.delattr(cudnn.fused, "should_export_dbias", raising=False)
    why = cudnn._obstacle()
    assert ("which access memory that is not theirs, and this is 9.1" in why) if faulty else why is None


@pytest.mark.smoke  # which also runs under a newer jax
def test_it_lowers_to_one_call_forward_and_one_backward(monkeypatch):
    """Or says which jax it needs."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    case = Case(T=128, S=128, rule=rules.all_branches, H=2, G=1, K=64, V=64)
    arrays, at, (do, _) = draw(case, 0)
    arrays, do = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), (arrays, do))
    if cudnn.OBSTACLE:
        with pytest.raises(UserError, match=r"'cudnn' needs jax 0.11.1 or newer, and this is .*; choose among: auto"):
            kernels.attend(*arrays, *at, case.rule, implementation="cudnn")
        return

    def both(keeping, arrays, do):
        attend = lambda *arrays: kernels.attend(*arrays, *at, case.rule, implementation="cudnn")  # noqa: E731
        o, pull = jax.vjp(keeping(attend), *arrays)
        return o, pull(do)

    monkeypatch.setattr(cudnn.fused, "check_cudnn_version", lambda: 91002)
    for keeping in (lambda attend: attend, lambda attend: jax.checkpoint(attend, policy=REMAT["dots"])):
        text = jax.jit(both, static_argnums=0).trace(keeping, arrays, do).lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("__cudnn$fmhaScaleBiasSoftmax(") == text.count("__cudnn$fmhaScaleBiasSoftmaxBackward(") == 1
