"""Transformer ablations: studies of one change at a time, on a laptop, GPUs and TPU pods."""

import pathlib

from lab.errors import UserError

__all__ = ["load"]


def load(path, model=()):
    """(model, tokenizer) of a finished or running cell.

    `path` is the directory of a cell (its first seed is taken), of one of its seeds, or of one checkpoint. The newest
    checkpoint is read, onto one device. Raises UserError where there is none. model: fields that are laid over its
    config.model on the same weights, such as (("rule", "own_branch"),).
    """
    # Imported here: `import lab` must stay light, and must not touch JAX before lab.runtime has.
    import jax
    from ml_collections import ConfigDict

    from lab.config import restored
    from lab.data import tokenizers
    from lab.evaluate.asks import remodelled
    from lab.model import build
    from lab.storage import read_json
    from lab.train.checkpoint import read_model

    path = pathlib.Path(path)
    cell = next((p for p in (path, *path.parents) if (p / "config.json").is_file()), None)
    if cell is None:
        raise UserError(f"{path} is in no cell: neither it nor a directory above it has a config.json")
    if path == cell:
        seeds = [int(seed.name[5:]) for seed in cell.glob("seed-*") if seed.name[5:].isdecimal()]
        path = cell / f"seed-{min(seeds, default=0)}"
    step = int(path.name) if path.name.isdecimal() else None
    directory = path.parent if step is not None else path / "checkpoints"
    if not directory.is_dir():
        raise UserError(f"{directory} does not exist: nothing was saved there yet")
    config = restored(read_json(cell / "config.json"))
    config = remodelled(config, ConfigDict({"model": model}), field="load")
    drawn = build(config.model, jax.random.key(0))
    return read_model(directory, drawn, step), tokenizers.load(cell, config.data.eos)
