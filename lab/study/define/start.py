"""Where the cells of a study begin from: config.checkpoint, whose model and tokenizer are theirs."""

import pathlib

from ml_collections import ConfigDict

from lab import config as lab_config
from lab import model as lab_model
from lab.data import packing, tokenizers
from lab.data.corpora import CORPORA
from lab.errors import UserError
from lab.evaluate import asks, long
from lab.model import lora, parameter
from lab.options import leaves, set_field
from lab.train import origin, partition

TOKENIZER = ("data.tokenizer", "data.eos")  # which a checkpoint brings


def laid(config: ConfigDict, overridden: tuple[str, ...] = ()) -> ConfigDict:
    """A study's config on its checkpoint; the config itself where it has none.

    The checkpoint is that of one step. The model is the checkpoint's, whatever the study's own is, but for adapters,
    for a type that the study computes in and for the fields that the command set (`overridden`). The study's cells are
    laid over that. So is the tokenizer.
    Raises UserError for a directory that holds no weights, or no tokenizer.
    """
    lab_config.CHECKPOINT.check("checkpoint", config.checkpoint)
    if not config.checkpoint:
        return config
    try:
        pinned = origin.pinned(config.checkpoint)  # once: a run that goes on may save others
        found = origin.find(pinned)
        brought = _brought(lab_config.restored(found.stored), found.cell, config.data.corpus, overridden)
    except UserError as error:
        brings = f"; bring {config.study.brings}" if config.study.brings else ""
        raise UserError(f"config.checkpoint = {config.checkpoint!r}: {error}{brings}") from None
    changed = config.copy_and_resolve_references()
    changed.checkpoint = pinned
    own = {"model.compute"} if config.model.compute != lab_config.base().model.compute else set()  # no part of weights
    for name, value in brought.items():
        if name not in {*overridden, *own}:
            set_field(changed, name, value)
    if changed.study.untrained and "train.steps" not in overridden:
        changed.train.steps = 0
    return changed


def _brought(stored: ConfigDict, cell: pathlib.Path, corpus: str, overridden: tuple[str, ...]) -> dict[str, object]:
    """{field: value} of what a checkpoint's cell says of its model and its tokenizer."""
    fields = {f"model.{name}": v for name, v in leaves(stored.model).items() if name not in lora.OPTIONS}
    if corpus not in CORPORA or "data.tokenizer" in overridden:  # a probe has one of its own
        return fields
    name = tokenizers.name_of(cell)
    if name is None:
        raise UserError(f"it was trained on a probe, data.corpus = {stored.data.corpus!r}, and can read no text")
    return fields | dict(zip(TOKENIZER, (name, stored.data.eos), strict=True))


def check_brought(config: ConfigDict) -> None:
    """Refuses to run a study that is of a checkpoint, and has none: what it would cost can be planned."""
    if config.study.brings and not config.checkpoint:
        raise UserError(
            f"config.checkpoint is empty: this study is of {config.study.brings}; convert it, python -m lab.convert "
            "from-hf DIR OUT, and give --config.checkpoint=OUT, or the directory of a cell of the lab"
        )


def _check_lengths(config: ConfigDict, stored: ConfigDict) -> None:
    """Refuses asks of long documents by another L than that of the texts on which a checkpoint was trained here."""
    if stored.model.position.trained or not stored.train.steps or stored.data.corpus not in CORPORA:
        return
    times = packing.most_times(stored.data)
    for name, asked in config.evaluate.items():
        if asks.ASKS[asked.kind].rows and (L := long.trained(config, asked)) != times:
            raise UserError(
                f"evaluate.{name}.trained = {L}, and config.checkpoint = {config.checkpoint!r} was trained on texts of "
                f"{times} tokens; choose that, of configs/length_extrapolation.py the scale :{times}"
            )


def check(config: ConfigDict, name: str) -> None:
    """Refuses a cell `name` that cannot begin from the study's checkpoint, or that needs one and has none."""
    partition.check(config)
    if not config.checkpoint:
        return
    stored = lab_config.restored(origin.find(config.checkpoint).stored)
    _check_lengths(config, stored)
    there, here = (_shapes(lab_model.abstract(each.model)) for each in (stored, config))
    for weight in sorted({*there, *here}):
        if there.get(weight) != here.get(weight):
            theirs, ours = (of.get(weight, "none") for of in (there, here))
            raise UserError(
                f"the cell {name!r} would have other weights than config.checkpoint = {config.checkpoint!r}: {weight} "
                f"is {theirs} there and {ours} here; change fields that leave the shapes of weights as they are"
            )


def _shapes(model) -> dict[str, tuple[int, ...]]:
    """Of the weights of a model, by the dotted path to each."""
    weights = parameter.split(model)[1]
    return {".".join(path): weight.get_raw_value().shape for path, weight in parameter.by_parts(weights).items()}


def digest(config: ConfigDict) -> str | None:
    """Of the weights that a cell begins from; None where they are drawn."""
    return origin.digest(origin.find(config.checkpoint)) if config.checkpoint else None


def trained(config: ConfigDict, model) -> tuple[int, int]:
    """(numbers that are trained, numbers of matrices that get no gradient) of a cell whose whole, abstract model is
    given."""
    if not config.train.steps:
        return 0, 0
    if not partition.Partition.of(config).partial:
        return parameter.count(model), 0
    parted = partition.abstract(config)
    return parameter.count(parted), partition.without_gradient(parted)
