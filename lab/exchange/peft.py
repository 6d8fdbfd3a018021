"""A run that trained adapters as a directory that `peft` opens, and a partial run as a cell that needs no base."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict
from safetensors.numpy import save_file

from lab import model as lab_model
from lab.config import base, restored
from lab.data import tokenizers
from lab.errors import UserError
from lab.exchange import companions
from lab.exchange.exporting import expressed
from lab.exchange.importing import whole_or_nothing
from lab.model import lora, parameter
from lab.storage import write_json
from lab.train import origin
from lab.train.checkpoint import Checkpoints, Position
from lab.train.origin import Origin
from lab.train.step import State

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def to_peft(path: Path, out: Path) -> dict:
    """Writes `out` from a run that trained adapters; returns its adapter_config.json. It is opened upon the base of the
    run, which is exported by itself. Raises UserError for a run of other kinds, and where no family is that model; then
    nothing is written."""
    found = origin.find(path)
    if not found.partition.rank or found.base is None:
        raise UserError(f"{path} has no adapters; give the directory of a run with model.lora.rank above 0")
    config, beneath = restored(found.stored), _root(found).cell
    family, _ = expressed(_whole(config), companions.origin(beneath))
    model = origin.read_parted(found, lab_model.undrawn(config.model, jax.devices()[0]))
    tensors = _tensors(model, family.layer)
    names = sorted({name.split(".")[-3] for name in tensors})
    made = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,  # what peft loads it upon, its caller says
        "r": found.partition.rank,
        "lora_alpha": found.partition.alpha,
        "lora_dropout": 0.0,
        "target_modules": names,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    with whole_or_nothing(out) as draft:
        (draft / CONFIG).write_text(json.dumps(made, indent=2) + "\n")
        save_file(tensors, draft / WEIGHTS, metadata={"format": "pt"})
    return made


def _tensors(model, names: dict[str, str]) -> dict[str, np.ndarray]:
    """lora_A [rank, in] and lora_B [out, rank] of every layer. names: of the tensors of our parameters, in a layer."""
    variables, found = parameter.by_parts(model), {}
    for path in lora.adapters(model):
        _, entry, *own = path
        if (theirs := names.get(".".join(own))) is None:
            told = f"the model has adapters of {'.'.join(path)}, for which its family has no tensor"
            raise UserError(f"{told}; choose other model.lora.targets")
        a, b = (np.asarray(variables[*path[:-1], path[-1] + side].get_raw_value()) for side in (lora.A, lora.B))
        for place, (of_a, of_b) in enumerate(zip(a, b, strict=True)):
            layer, rank = place * len(model.blocks) + int(entry), of_a.shape[-1]
            name = f"base_model.model.model.layers.{layer}.{theirs.removesuffix('.weight')}"
            found[f"{name}.lora_A.weight"] = np.ascontiguousarray(of_a.reshape(-1, rank).T)
            found[f"{name}.lora_B.weight"] = np.ascontiguousarray(of_b.reshape(rank, -1).T)
    return found


def merge(found: Origin, out: Path) -> None:
    """Makes `out` a cell of the same model, whose checkpoint holds all weights. Raises what reading them does."""
    config = _whole(restored(found.stored))
    model = origin.read(found, lab_model.undrawn(config.model, jax.devices()[0]))
    write_json(out / "config.json", json.loads(config.to_json_best_effort()))
    tokenizers.load(found.cell, config.data.eos).save(out)
    for name in (*companions.COMPANIONS, companions.ORIGIN):
        if (file := _root(found).cell / name).is_file():
            shutil.copyfile(file, out / name)
    checkpoints = Checkpoints(out / "seed-0" / "checkpoints", keep=1)
    checkpoints.save(Position(0, 0), State(model, ()))
    checkpoints.close()


def _whole(config: ConfigDict) -> ConfigDict:
    """The config as it were, had all of its weights been trained from drawn ones."""
    config = config.copy_and_resolve_references()
    config.checkpoint, config.model.lora, config.train.freeze = "", base().model.lora, ()
    return config


def _root(found: Origin) -> Origin:
    """Where the weights began that others are parts of."""
    return found if found.base is None else _root(found.base)
