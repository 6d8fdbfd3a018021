"""Which implementation a name means, and what is refused."""

import importlib.util
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas
from test_attend import Case, draw

from lab import kernels
from lab.errors import UserError
from lab.kernels import pallas_triton, rules


def test_refusals_name_the_choices():
    (q, k, v), coordinates, _ = draw(Case(), 0)
    choices = "auto, reference, tiled, pallas_tpu, pallas_gpu, pallas_triton, cudnn, tokamax"
    with pytest.raises(UserError, match=rf"'tild' is unknown \(did you mean 'tiled'\?\).*{choices}"):
        kernels.attend(q, k, v, *coordinates, rules.causal, implementation="tild")
    with pytest.raises(UserError, match="4 query heads cannot share 3 key heads; choose a divisor of 4"):
        three = lambda x: jnp.repeat(x, 2, axis=2)[:, :, :3]  # noqa: E731
        kernels.attend(q, three(k), three(v), *coordinates, rules.causal)


def test_a_kernel_of_another_machine_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(kernels, "_interpreting", False)
    says = "'pallas_tpu' needs a TPU, and this is a CPU; choose among: auto, reference, tiled"
    with pytest.raises(UserError, match=says):
        kernels.resolve("pallas_tpu")
    with kernels.interpreted():
        assert kernels.resolve("pallas_tpu") == "pallas_tpu"
        with pytest.raises(
            UserError, match="'pallas_gpu' needs a GPU, and this is a CPU; choose among: auto, reference"
        ):
            kernels.resolve("pallas_gpu")


def test_a_kernel_that_this_jax_cannot_compile_is_refused_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax.experimental.pallas.triton", None)  # as if jax had it no more
    monkeypatch.delattr(pallas, "triton")
    spec = importlib.util.spec_from_file_location("without_triton", pallas_triton.__file__)
    without = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(without)
    monkeypatch.setitem(sys.modules, "lab.kernels.pallas_triton", without)
    monkeypatch.setattr(kernels, "_interpreting", False)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    says = (
        f"'pallas_triton' needs the Triton lowering of Pallas, which jax {jax.__version__} no longer has; choose among"
    )
    with pytest.raises(UserError, match=f"{says}: auto, reference, tiled, pallas_gpu(, cudnn)?(, tokamax)?$"):
        kernels.resolve("pallas_triton")
    monkeypatch.setitem(sys.modules, "lab.kernels.pallas_triton", pallas_triton)
    assert kernels.resolve("pallas_triton") == "pallas_triton"


def test_auto_goes_by_platform_and_length_and_says_once_what_it_took(monkeypatch, caplog):
    kernels._picked.cache_clear()
    with caplog.at_level("INFO"):
        assert {kernels.resolve(name, keys) for name in (None, "auto") for keys in (1, 4096)} == {"tiled"}
        monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
        taken = [kernels.resolve("auto", keys) for keys in (1, 4096, 2**17, 2**18, 2**18)]
    assert taken == ["pallas_tpu"] * 3 + ["tiled"] * 2
    assert [record.getMessage() for record in caplog.records] == [
        "attention: tiled (what there is for cpu)",
        "attention: pallas_tpu (what there is for tpu)",
        "attention: tiled (pallas_tpu takes rows of 131072 keys at most)",
    ]
