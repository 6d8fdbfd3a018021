"""`transformers` opens what is written here, with equal logits: `make test-hf`, in an environment that has it."""

import json
import os
import pathlib
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lab.config
from lab import model as lab_model
from lab.data import tokenizers
from lab.exchange import exporting, importing
from lab.model import parameter, presets
from lab.options import set_field
from lab.storage import write_json
from lab.train import checkpoint, streamed

PYTHON = os.environ.get("LAB_HF_PYTHON")
pytestmark = pytest.mark.skipif(not PYTHON, reason="make test-hf names a Python that has transformers")
SCRIPT = pathlib.Path(__file__).with_name("reference_checkpoints.py")
PLACE = SCRIPT.with_suffix("")
TRAINED = {  # models as they are trained here
    "plain": (None, {}),
    "llama": ("llama", {"position.theta": 500.0}),
    "biased": ("llama", {"mixer.bias": "all", "feedforward.bias": True}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"mixer.head_dim": 10}),
    "mistral": ("llama", {"rule": "causal & window(5)"}),
    "gemma2": ("gemma2", {"mixer.softmax_scale": 1 / 3, "pattern": ((("rule", "causal & window(5)"),), ())}),
}


def quiet(*told):
    """What a conversion has to say."""


def trained(preset: str | None, fields: dict, cell: pathlib.Path) -> pathlib.Path:
    """A cell with generic weights, and their logits beside it."""
    config = lab.config.base()
    config.model.update(dict(dim=16, layers=3))
    config.model.mixer.update(dict(heads=4, kv_heads=2, head_dim=4))
    config.model.feedforward.width = 24
    if preset:
        presets.apply(config.model, preset)
    for name, value in fields.items():
        set_field(config.model, name, value)
    model, rng = lab_model.build(config.model, jax.random.key(0)), np.random.default_rng(0)
    drawn = {
        name: np.asarray(w) + 0.3 * rng.normal(size=w.shape).astype(np.float32)
        for name, w in checkpoint._named(parameter.split(model)[1]).items()
    }
    model = checkpoint._with_weights(model, {name: jnp.asarray(w) for name, w in drawn.items()})
    arrays = {name: streamed.Streamed(w.shape, w.shape, w.__getitem__) for name, w in drawn.items()}
    streamed.write(cell / "seed-0" / "checkpoints", arrays)
    write_json(cell / "config.json", json.loads(config.to_json_best_effort()))
    tokenizers.Bytes().save(cell)
    tokens = rng.integers(0, 256, (2, 24)).astype(np.int32)
    np.save(cell / "tokens.npy", tokens)
    np.save(cell / "logits.npy", np.asarray(model(jnp.asarray(tokens))))
    return cell


def test_logits_are_equal_after_export(tmp_path, monkeypatch):
    places = []
    for name, (preset, fields) in TRAINED.items():
        cell = trained(preset, fields, tmp_path / f"cell-{name}")
        monkeypatch.setattr(exporting, "SHARD", 10_000 if name == "llama" else 10**9)
        exporting.to_hf(cell, tmp_path / name, quiet, quiet)
        places.append((tmp_path / name, cell))
    for origin in sorted(PLACE.iterdir()):
        importing.from_hf(origin, tmp_path / f"in-{origin.name}", quiet, quiet)
        out = tmp_path / f"again-{origin.name}"
        exporting.to_hf(tmp_path / f"in-{origin.name}", out, quiet, quiet)
        places.append((out, origin))
    for place, origin in places:
        for file in ("tokens.npy", "logits.npy"):
            (place / file).write_bytes((origin / file).read_bytes())
    command = [PYTHON, "-I", SCRIPT, *(place for place, _ in places)]
    made = subprocess.run(command, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr[-3000:]
    found = {pathlib.Path(place).name: off for place, off in json.loads(made.stdout.splitlines()[-1]).items()}
    print(json.dumps(found, indent=1))
    assert len(found) == len(places) and max(found.values()) < 5e-5, found
