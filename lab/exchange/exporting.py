"""A checkpoint of the lab made a directory that `transformers` opens, tensor by tensor."""

import json
import os
import struct
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from ml_collections import ConfigDict

from lab import model as lab_model
from lab.config import restored
from lab.data import tokenizers
from lab.errors import UserError, shown
from lab.exchange import architecture, companions
from lab.exchange.families import FAMILIES, Family
from lab.exchange.importing import free, whole_or_nothing
from lab.exchange.source import CONFIG, DTYPES, INDEX, WEIGHTS
from lab.exchange.tensors import Parameter, by_tensor, parameters
from lab.train import checkpoint, streamed
from lab.train.origin import find

SHARD = 5 * 10**9  # bytes of a file, unless one tensor is larger
KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "use_cache")  # of an original config.json
NUMPY = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
SPELLED = {name: code for code, name in DTYPES.items()}


class Slot(NamedTuple):
    """Where a tensor goes: its file, where it begins in that, and its type and shape."""

    file: Path
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]


def to_hf(path: Path, out: Path, begun: Callable[[int], None], wrote: Callable[[int], None], say=print) -> dict:
    """Writes `out` from a checkpoint, a seed or a cell, as `lab.load` takes it; returns its config.json. Raises
    UserError where no family is that model, naming the option; then nothing is written."""
    begins = find(path)
    if begins.base is not None:  # a part of the weights is elsewhere
        beside = free(out).absolute().parent
        beside.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", suffix=".partial", dir=beside) as merged:
            from lab.exchange import peft  # which writes what this one writes of its config

            peft.merge(begins, Path(merged))
            return to_hf(Path(merged), out, begun, wrote, say)
    cell, directory, step = begins.cell, begins.directory, begins.step
    config = restored(begins.stored)
    origin = companions.origin(cell)
    family, made = expressed(config, origin)
    found = parameters(lab_model.abstract(config.model), family)
    tokenizer = tokenizers.load(cell, config.data.eos)
    if tokenizer.eos is not None:
        made.setdefault("eos_token_id", tokenizer.eos)
    for name in ("bos_token_id", "eos_token_id"):
        made.setdefault(name, None)  # not what `transformers` takes for a missing one
    step, about = checkpoint.newest(directory, step)
    with whole_or_nothing(out) as draft:
        dtypes = _dtypes(found, origin.get("dtypes", {}))
        made["torch_dtype"] = max(set(dtypes.values()), key=[*dtypes.values()].count)
        (draft / CONFIG).write_text(json.dumps(made, indent=2) + "\n")
        if said := companions.write(cell, draft, tokenizer):
            say(said)
        slots = _laid_out(draft, found, dtypes)
        begun(sum(slot.dtype.itemsize * int(np.prod(slot.shape)) for slot in slots.values()))
        _fill(directory / str(step), found, slots, about["weights"], wrote)
    return made


def expressed(config: ConfigDict, origin: Mapping) -> tuple[Family, dict]:
    """The family that config.model is, and its config.json. That which the model came from is tried first."""
    came_from = origin.get("config", {})
    kept = {key: came_from[key] for key in KEPT if key in came_from}
    positions = config.model.position.get("trained") or came_from.get("max_position_embeddings")
    positions = positions or config.data.text_length
    differing = []
    for family in sorted(FAMILIES.values(), key=lambda one: one.model_type != came_from.get("model_type")):
        made = architecture.write(config.model, family, kept, positions)
        try:
            other = architecture.read(family, made, Path(CONFIG))
        except UserError as error:
            differing.append({"": (str(error), family.model_type)})
            continue
        found = architecture.differences(config.model, other)
        if not found:
            return family, made
        differing.append(found)
    raise _not_expressed(differing)


def _not_expressed(differing: list[dict[str, tuple]]) -> UserError:
    """What no family has; else what those that are nearest have not, which no family has at once."""
    found = [one for one in differing if "" not in one]
    if not found:
        return UserError(f"no family of Hugging Face models is this one: {differing[0][''][0]}")
    nearest = [one for one in found if len(one) == min(map(len, found))]
    names = [name for name in nearest[0] if all(name in one for one in found)]
    names = names or list(dict.fromkeys(name for one in nearest for name in one))
    values = {name: pair[0] for one in nearest for name, pair in one.items()}
    told = " and ".join(f"model.{name} = {shown(values[name])}" for name in names)
    return UserError(f"no family of Hugging Face models has {told} in such a model; they are: {', '.join(FAMILIES)}")


def _dtypes(found: list[Parameter], original: Mapping[str, str]) -> dict[str, str]:
    """The type of each tensor: that which it came in, else float32."""
    return {name: original.get(name, "float32") for name, _ in by_tensor(found)}


def _laid_out(draft: Path, found: list[Parameter], dtypes: Mapping[str, str]) -> dict[str, Slot]:
    """Writes files of the right size with their headers, and an index if they are several: the tensors are to come."""
    shards: list[dict[str, tuple]] = [{}]
    held = 0
    for name, one in by_tensor(found):
        dtype = np.dtype(NUMPY[dtypes[name]])
        size = dtype.itemsize * int(np.prod(one.theirs))
        if held and held + size > SHARD:
            shards.append({})
            held = 0
        shards[-1][name] = (dtypes[name], dtype, one.theirs, held, held + size)
        held += size
    slots: dict[str, Slot] = {}
    for number, shard in enumerate(shards, 1):
        file = draft / (WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors")
        header = {
            name: {"dtype": SPELLED[spelled], "shape": list(shape), "data_offsets": [begin, end]}
            for name, (spelled, _, shape, begin, end) in shard.items()
        }
        text = json.dumps({"__metadata__": {"format": "pt"}} | header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file.write_bytes(struct.pack("<Q", len(text)) + text)
        data = 8 + len(text)
        for name, (_, dtype, shape, begin, _) in shard.items():
            slots[name] = Slot(file, data + begin, dtype, shape)
        os.truncate(file, data + max(end for *_, end in shard.values()))
    if len(shards) > 1:
        total = sum(slot.dtype.itemsize * int(np.prod(slot.shape)) for slot in slots.values())
        index = {
            "metadata": {"total_size": total},
            "weight_map": {name: slot.file.name for name, slot in slots.items()},
        }
        (draft / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return slots


def _fill(
    place: Path, found: list[Parameter], slots: Mapping[str, Slot], checksum: int, wrote: Callable[[int], None]
) -> None:
    """Writes the tensors, in pieces as large as the checkpoint has. Raises UserError where its numbers are not those
    that were saved."""
    stored = streamed.read(place, [one.name for one in found])
    total = streamed.Checksum(one.name for one in found)
    for one in found:
        array = stored[one.name]
        if array.shape != one.shape:
            raise UserError(f"checkpoint {place}: {one.name} is {list(array.shape)}, the model's is {list(one.shape)}")
        chunk = list(one.shape)
        for axis in {0, one.axis + one.stacked} if one.stacked else {one.axis}:
            chunk[axis] = array.chunk[axis]
        for index in streamed.boxes(one.shape, tuple(chunk)):
            piece = np.asarray(array[index], np.float32)
            total.add(one.name, piece, index, one.shape)
            rows = one.rows(index[one.axis + one.stacked])
            for layer, part in enumerate(piece if one.stacked else [piece], index[0].start if one.stacked else 0):
                wrote(_write_rows(slots[one.tensors[layer]], rows, one.to_rows(part)))
    if total.value != checksum:
        raise UserError(f"checkpoint {place} cannot be read ({checkpoint.CHANGED})")


def _write_rows(slot: Slot, rows: slice, block: np.ndarray) -> int:
    content = np.ascontiguousarray(block, slot.dtype).tobytes()
    row = slot.dtype.itemsize * int(np.prod(slot.shape[1:]))
    with slot.file.open("r+b") as file:
        file.seek(slot.offset + rows.start * row)
        file.write(content)
    return len(content)
