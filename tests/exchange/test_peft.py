"""Adapters in the layout of `peft`: W + (alpha / rank) B A of their tensors is the merged model that is exported."""

import json

import jax
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file

from lab.errors import UserError
from lab.exchange import exporting, peft
from lab.model import parameter
from lab.train import partition
from lab.train.partition import Partition

RANK, ALPHA = 2, 5.0
LLAMA = dict(
    model__position__ratio=0.0, model__position__unselected="time", model__rule="causal", model__tied=False,
    model__layers=2, model__position__stride=128,
)  # fmt: skip


def exported(path, out) -> dict[str, np.ndarray]:
    exporting.to_hf(path, out, lambda size: None, lambda size: None, lambda line: None)
    return load_file(out / "model.safetensors")


def test_adapters_and_the_merged_model_say_the_same(tmp_path):
    whole = tiny.model(tiny.config(**LLAMA), seed=1)
    tiny.saved(tmp_path / "base", whole, tiny.config(**LLAMA))
    lora = dict(model__lora__rank=RANK, model__lora__alpha=ALPHA, model__lora__targets=("q", "o", "down"))
    config = tiny.config(checkpoint=str(tmp_path / "base"), **LLAMA, **lora)
    structure, adapters, rest = parameter.split(partition.parted(whole, Partition.of(config), jax.random.key(0)))
    rng = np.random.default_rng(0)
    adapters = jax.tree.map(lambda x: jax.numpy.asarray(rng.normal(size=x.shape), np.float32), adapters)
    tiny.saved(tmp_path / "tuned", parameter.nnx.merge(structure, adapters, rest), config)

    before, after = exported(tmp_path / "base", tmp_path / "hf"), exported(tmp_path / "tuned", tmp_path / "merged")
    made = peft.to_peft(tmp_path / "tuned", tmp_path / "adapters")
    assert json.loads((tmp_path / "adapters" / peft.CONFIG).read_text()) == made
    assert (made["r"], made["lora_alpha"], made["target_modules"]) == (RANK, ALPHA, ["down_proj", "o_proj", "q_proj"])
    theirs = load_file(tmp_path / "adapters" / peft.WEIGHTS)
    assert len(theirs) == 2 * 3 * 2 and {*before} == {*after}
    adapted = {name.removesuffix(".lora_A.weight") for name in theirs if "lora_A" in name}
    for name, weight in before.items():
        beside, expected = f"base_model.model.{name.removesuffix('.weight')}", weight.astype(np.float64)
        if beside in adapted:
            a, b = (theirs[f"{beside}.lora_{side}.weight"].astype(np.float64) for side in "AB")
            expected = expected + ALPHA / RANK * b @ a
            assert np.abs(expected - weight).max() > 0.1
        np.testing.assert_allclose(after[name], expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match=r"has no adapters; give the directory of a run with model.lora.rank"):
        peft.to_peft(tmp_path / "base", tmp_path / "none")
    assert not (tmp_path / "none").exists()
