"""Transformer ablations: studies of one change at a time, on a laptop, GPUs and TPU pods."""

__all__ = ["load"]


def load(path):
    """(model, tokenizer) of a finished or running cell, or of a Hugging Face checkpoint.

    `path` is the directory of a cell (its first seed is taken), of one of its seeds, or of one checkpoint. The newest
    checkpoint is read, onto one device. Raises UserError where there is none. A directory of Hugging Face's format is
    opened too, if lab.exchange has its family.
    """
    # Imported here: `import lab` must stay light, and must not touch JAX before lab.runtime has.
    import jax

    from lab.config import restored
    from lab.data import tokenizers
    from lab.exchange import importing
    from lab.model import undrawn
    from lab.storage import read_json
    from lab.train.checkpoint import locate, read_model

    if importing.theirs(path):
        return importing.load(path)
    cell, directory, step = locate(path)
    config = restored(read_json(cell / "config.json"))
    model = undrawn(config.model, jax.devices()[0])
    return read_model(directory, model, step), tokenizers.load(cell, config.data.eos)
