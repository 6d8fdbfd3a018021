"""The kernels for Hopper GPUs as they are, in the interpreter of jax 0.12, which looks for races and for what waits for
ever: warpgroups of several roles, tiles of 128, several turns of a program; against matrices in float64.

One primitive is replaced: the interpreter has no product that adds to a sum in registers (wgmma of a value in a
run_state), of which p v, ds k and their like are made. Register layouts are a machine's alone to show.
"""

import dataclasses
import faulthandler
import functools
import re

import exact
import jax
import jax.numpy as jnp
import numpy as np
import packs
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

from lab.kernels import hopper, pallas_gpu, rules
from lab.kernels.rotary import rotate, rotation

pytestmark = [
    pytest.mark.smoke,  # which runs under the newest jax, where there is another Python
    pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="this jax interprets no products of transposed tiles"),
]


@dataclasses.dataclass(frozen=True)
class Attention:
    """rows x T queries and keys, or only the last `asked` tokens ask; from `real` on there is padding alone; pairs: of
    queries that rotate inside; processors: that share the work, so that a program has several turns."""

    rule: rules.Rule
    T: int = 100
    H: int = 2
    G: int = 1
    K: int = 64
    V: int = 64
    rows: int = 1
    softcap: float | None = None
    pairs: int = 0
    pack: str = "interleaved"
    asked: int = 0
    real: int = 0
    processors: int = 3
    sharpness: float = 1.0

    @property
    def scale(self) -> float:
        return self.sharpness * self.K**-0.5


CASES = {
    "groups": Attention(rules.own_branch, H=4, G=2, processors=1),
    "padding anywhere, two rows": Attention(rules.all_branches, pack="scattered", rows=2),
    "full tiles, capped": Attention(rules.causal, T=192, H=1, pack="ragged", softcap=2.0),
    "rotated": Attention(rules.all_branches & rules.window(9), pairs=32),
    "narrow": Attention(rules.all_branches, T=70, H=1, K=32, V=16, pairs=8),
    "wide": Attention(rules.all_branches, T=70, H=1, K=128, V=128),
    "widest": Attention(rules.causal, T=70, K=256, V=256, processors=1),
    "tiles without a token": Attention(rules.causal, T=640, H=1, real=100, processors=1),
    "many tiles": Attention(rules.causal & rules.window(150), T=330, H=1),
    "partly rotated": Attention(rules.all_branches, T=70, H=1, pairs=16),
    "few queries": Attention(rules.causal, T=330, asked=70, pack="ragged"),
    "no room for results": Attention(rules.causal, T=70, H=2, K=192, V=192, processors=1),
    "unequal": Attention(rules.own_branch, T=70, H=1, K=192, V=128, pairs=32),
}


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    monkeypatch.setattr(hopper, "PROCESSORS", 3)
    kernel = functools.partial(hopper.plgpu.kernel, interpret=InterpretGPUParams(detect_races=True))
    monkeypatch.setattr(hopper.plgpu, "kernel", kernel)

    def add_dots(triples, meanwhile=lambda: None):
        found = [sums + jnp.dot(a, b_s[...], preferred_element_type=jnp.float32) for sums, a, b_s in triples]
        meanwhile()
        return found

    monkeypatch.setattr(hopper, "add_dots", add_dots)
    jax.clear_caches()  # of what was traced without this, or with other programs


def draw(case: Attention, seed: int):
    rng = np.random.default_rng(seed)
    at = packs.PACKS[case.pack](rng, case.rows, case.T)
    if case.real:
        padding = np.arange(case.T) >= case.real
        at = dataclasses.replace(at, segment=np.where(padding, -1, at.segment))
    asked = case.asked or case.T
    at = at.map(lambda x: x[:, -asked:]), at
    of_values = (case.T, case.G, case.V)
    shapes = [(case.rows, *shape) for shape in ((asked, case.H, case.K), (case.T, case.G, case.K), of_values)]
    arrays = [jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in shapes]
    do = jnp.asarray(rng.normal(size=(case.rows, asked, case.H, case.V)), jnp.bfloat16)
    dlse = jnp.asarray(rng.normal(size=(case.rows, asked, case.H)), jnp.float32)
    frequencies = jnp.asarray(rng.normal(size=(3, case.pairs)) / 10, jnp.float32) if case.pairs else None
    return arrays, at, (do, dlse), frequencies


def found(case: Attention, arrays, at, cotangents, frequencies):
    hopper.PROCESSORS = case.processors

    def attend(q, k, v, frequencies):
        return pallas_gpu.attend(q, k, v, *at, case.rule, case.scale, case.softcap, frequencies_3F=frequencies)

    def both(*inputs):
        outputs, pull = jax.vjp(attend, *inputs)
        return *outputs, *pull(cotangents)

    faulthandler.dump_traceback_later(300, exit=True)  # a kernel that waits for ever would not end
    try:
        return jax.device_get(jax.jit(both)(*arrays, frequencies))
    finally:
        faulthandler.cancel_dump_traceback_later()


def expected(case: Attention, arrays, at, cotangents, frequencies):
    q, k, v = arrays
    turned, turn = jax.vjp(
        lambda q, frequencies: rotate(q, rotation(at[0], frequencies)), q.astype(jnp.float32), frequencies
    ) if case.pairs else (q, None)  # fmt: skip
    seen = rules.visible(case.rule, *at)
    outputs, (ds, _, dv) = exact.attend(
        exact.scores(turned, k, case.scale), v, seen, *cotangents, softcap=case.softcap
    )  # fmt: skip
    dq, dk = exact.of_scores(ds, turned, k, case.scale)
    df = None
    if case.pairs:
        dq, df = turn(jnp.asarray(dq, jnp.float32))
    return *outputs, dq, dk, dv, df


@pytest.mark.parametrize("name", CASES)
def test_they_equal_matrices_in_float64(name):
    case = CASES[name]
    inputs = draw(case, seed=sum(map(ord, name)))
    allowed = {"o": 8e-3, "lse": 2e-3, "dq": 1.2e-2, "dk": 1.2e-2, "dv": 1.2e-2, "df": 3e-2}
    for (output, most), a, b in zip(allowed.items(), found(case, *inputs), expected(case, *inputs), strict=True):
        if b is None:
            continue
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert (np.isfinite(a) == np.isfinite(b)).all(), output
        a, b = (np.where(np.isfinite(b), x, 0) for x in (a, b))
        assert np.linalg.norm(a - b) <= most * np.linalg.norm(b), output


def test_queries_that_see_nothing_give_zeros_and_no_gradient():
    case = Attention(rules.own_branch, pack="scattered")
    arrays, at, cotangents, _ = draw(case, 1)
    blind = ~rules.visible(case.rule, *at).any(2)
    assert blind.any() and not blind.all()
    o, lse, dq, dk, dv, _ = found(case, arrays, at, cotangents, None)
    assert not o[blind].any() and not dq[blind].any() and (lse[blind] == -np.inf).all()
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in (dk, dv))


def test_a_negative_scale_overflows_nothing():
    """The greatest score of a row is that of its least product; of a gradient so sharp bfloat16 leaves nothing."""
    case = Attention(rules.causal, T=256, H=1, pack="ragged", sharpness=-64.0)
    inputs = draw(case, 5)
    assert pallas_gpu.plan(case.rule, *inputs[1]).lists.by_query.full.any()  # masked tiles multiply before
    for a, b in zip(found(case, *inputs)[:2], expected(case, *inputs)[:2], strict=True):
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        assert (np.isfinite(a) == np.isfinite(b)).all()
        a, b = (np.where(np.isfinite(b), x, 0) for x in (a, b))
        assert np.linalg.norm(a - b) <= 8e-3 * np.linalg.norm(b)


def test_a_copy_that_is_not_waited_for_is_a_race(monkeypatch):
    monkeypatch.setattr(hopper.plgpu, "barrier_wait", lambda barrier: None)
    with pytest.raises(jax.errors.JaxRuntimeError) as race:
        found(CASES["groups"], *draw(CASES["groups"], 0))
    gpu_callbacks.reset_gpu_interpret_mode_state()
    assert re.search(r"(?i)barrier|race", str(race.value))
