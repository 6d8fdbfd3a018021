"""Transformer ablations: studies of one change at a time, on a laptop, GPUs and TPU pods."""

__all__ = ["load"]


def load(path, model=(), base=None, apart=False):
    """(model, tokenizer) of a finished or running cell, of an imported model, or of a Hugging Face checkpoint.

    `path` is the directory of a cell (its first seed is taken), of one of its seeds, or of one checkpoint, here or in
    an object store (s3://, gs://). The newest checkpoint is read, onto one device; adapters are merged. A directory of
    Hugging Face's format is opened too, if lab.exchange has its family. model: fields that are laid over its
    config.model on the same weights, such as (("rule", "own_branch"),). base: where the checkpoint lies now that a cell
    began from, if it trained no weights or a part of them. apart: whether branches of a prompt see nothing of each
    other also where the rule is `causal`, which tells none of them from one text. Raises UserError where there is no
    checkpoint.
    """
    # Imported here: `import lab` must stay light, and must not touch JAX before lab.runtime has.
    import jax
    from ml_collections import ConfigDict

    from lab import storage
    from lab.config import restored
    from lab.data import tokenizers
    from lab.evaluate.asks import remodelled
    from lab.exchange import importing
    from lab.model import spec, undrawn
    from lab.train import origin

    def laid(config):
        over = (*spec.apart(config.model), *model) if apart else model
        return remodelled(config, ConfigDict({"model": over}), field="load")

    path = storage.local(path)
    if importing.theirs(path):
        opened = importing.Opened(path)
        opened.model = laid(opened.config()).model
        return importing.load(opened)
    found = origin.find(path, base)
    config = laid(restored(found.stored))
    like = undrawn(config.model, jax.devices()[0])
    return origin.read(found, like), tokenizers.load(found.cell, config.data.eos)
