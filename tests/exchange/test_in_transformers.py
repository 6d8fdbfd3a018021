"""`transformers` opens what is written here, with equal logits: `make test-hf`, in an environment that has it."""

import json
import os
import pathlib
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

import lab
import lab.config
from lab import model as lab_model
from lab.data import tokenizers
from lab.exchange import exporting, importing, peft
from lab.model import parameter, presets
from lab.options import set_field
from lab.storage import read_json, write_json
from lab.train import checkpoint, partition, streamed

PYTHON = os.environ.get("LAB_HF_PYTHON")
pytestmark = pytest.mark.skipif(not PYTHON, reason="make test-hf names a Python that has transformers")
SCRIPT = pathlib.Path(__file__).with_name("reference_checkpoints.py")
PLACE = SCRIPT.with_suffix("")
LONGER = {"position.unselected": "time", "position.trained": 16}  # of 24 tokens
STRETCHED = {
    "linear": {"scaling.name": "linear", "scaling.factor": 2.0},
    "ntk": {"scaling.name": "ntk", "scaling.factor": 2.0},
    "dynamic": {"scaling.name": "dynamic", "scaling.factor": 2.0},
    "dynamic of a length": {"scaling.name": "dynamic", "length": 40},
    "yarn": {"scaling.name": "yarn", "length": 40, "scaling.beta_fast": 2.0, "scaling.truncate": False},
    "llama3": {"scaling.name": "llama3", "scaling.factor": 4.0},
    "longrope": {"scaling.name": "longrope", "scaling.factor": 2.0, "scaling.short_factor": (1.0, 1.5),
                 "scaling.long_factor": (2.0, 4.0)},
    "longrope of a length": {"scaling.name": "longrope", "length": 12, "scaling.short_factor": (1.0, 1.5),
                             "scaling.long_factor": (2.0, 4.0)},
    "proportional": {"scaling.name": "proportional", "scaling.partial_rotary_factor": 0.5},
}  # fmt: skip
TRAINED = {  # models as they are trained here
    "plain": (None, {}),
    "llama": ("llama", {"position.theta": 500.0}),
    "biased": ("llama", {"mixer.bias": "all", "feedforward.bias": True}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"mixer.head_dim": 10}),
    "mistral": ("llama", {"rule": "causal & window(5)"}),
    **{
        name: ("llama", LONGER | {f"position.{field}": value for field, value in fields.items()})
        for name, fields in STRETCHED.items()
    },
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


TEMPLATES = (
    "{% for message in messages %}<s> {{ message['content'] }} </s>{% endfor %}",
    """{{- bos_token }}
    {%- for message in messages %}
        {%- if loop.index0 > 3 %}{% break %}{% endif %}
        {{- message.role + ' ' + message.content | trim + eos_token }}
    {%- endfor %}
    {% if add_generation_prompt %}
w5
    {% endif %}""",
    "{{ messages | tojson }}{% generation %} w6 {{ tools is none }}{% endgeneration %}{% set x = namespace(a=1) %}",
)


def adapters(place: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """(what peft opens, the cell with the logits of the merged model)"""
    base = trained("llama", LONGER, place / "cell-base")
    whole, _ = lab.load(base)
    config = lab.config.restored(read_json(base / "config.json"))
    config.checkpoint = str(base)
    config.model.lora.update(dict(rank=2, alpha=3.0, targets=("q", "o", "down")))
    structure, drawn, rest = parameter.split(partition.parted(whole, partition.Partition.of(config), jax.random.key(0)))
    rng = np.random.default_rng(1)
    drawn = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), np.float32), drawn)
    tuned = nnx.merge(structure, drawn, rest)
    cell = tiny.saved(place / "cell-tuned", tuned, config)
    np.save(cell / "tokens.npy", tokens := np.load(base / "tokens.npy"))
    np.save(cell / "logits.npy", logits := np.asarray(partition.whole(tuned)(jnp.asarray(tokens))))
    assert np.abs(logits - np.load(base / "logits.npy")).max() > 0.1
    peft.to_peft(cell, place / "adapters")
    exporting.to_hf(base, place / "adapters" / "base", quiet, quiet)
    return place / "adapters", cell


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
    places.append(adapters(tmp_path))
    chatting = [place for place, _ in places if (place / "chat_template.jinja").is_file()]
    for place, template in zip(chatting, TEMPLATES, strict=False):
        (place / "chat_template.jinja").write_text(template)
        tokenizer = tokenizers.load(place)
        text = tokenizer.chat.asked("w3 <s> w4\n")
        (place / "chat.json").write_text(json.dumps(["w3 <s> w4\n", text, tokenizer.encode_chat(text).tolist()]))
    assert len(chatting) >= len(TEMPLATES)
    for place, origin in places:
        for file in ("tokens.npy", "logits.npy"):
            (place / file).write_bytes((origin / file).read_bytes())
    command = [PYTHON, "-I", SCRIPT, *(place for place, _ in places)]
    made = subprocess.run(command, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr[-3000:]
    found = {pathlib.Path(place).name: off for place, off in json.loads(made.stdout.splitlines()[-1]).items()}
    print(json.dumps(found, indent=1))
    assert len(found) == len(places) and max(found.values()) < 5e-5, found
