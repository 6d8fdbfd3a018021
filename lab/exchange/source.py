"""A directory of a Hugging Face model: its config.json, and its tensors, which are read some rows at a time."""

import collections
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors

from lab.errors import UserError, shown
from lab.exchange.families import NESTED, OTHER_PARTS, OUTER, OUTER_HEAD
from lab.exchange.tensors import Parameter

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # as files and config.json spell them
# What files of some versions of `transformers` hold besides, and nothing reads.
UNREAD = re.compile(r".*\.rotary_emb\.inv_freq")


class Tensor(NamedTuple):
    """Where one lies: stored is its name in the file."""

    file: Path
    stored: str
    dtype: str
    shape: tuple[int, ...]


class Original:
    """The files are open as long as this is. Raises UserError for files that are not what they should be."""

    def __init__(self, directory: Path):
        self.directory = Path(directory)
        self.config_file = self.directory / CONFIG
        self.config = _json(self.config_file)
        self._open: dict[Path, safetensors.safe_open] = {}
        nested = self.config.get("model_type") in [*NESTED]
        self.tensors: dict[str, Tensor] = {}
        for file, named in self._files().items():
            self._take(file, named, nested)

    def _files(self) -> dict[Path, list[str] | None]:
        """The files of weights, and the names that the index has in each; None: all that it holds."""
        if (self.directory / WEIGHTS).is_file():
            return {self.directory / WEIGHTS: None}
        index = self.directory / INDEX
        if not index.is_file():
            others = sorted(path.name for path in self.directory.glob("*.bin"))
            told = f"; {others[0]} is not read: save the model as safetensors" if others else ""
            raise UserError(f"{self.directory} has neither {WEIGHTS} nor {INDEX}{told}")
        where = _json(index).get("weight_map")
        if not isinstance(where, dict) or not where:
            raise UserError(f"{index}: weight_map = {shown(where)} must name the file of each tensor")
        files = collections.defaultdict(list)
        for name, file in where.items():
            if not isinstance(file, str) or Path(file).name != file:
                raise UserError(f"{index}: the file of {name} = {shown(file)} must be a name of a file beside it")
            files[self.directory / file].append(name)
        for file, names in files.items():
            if not file.is_file():
                raise UserError(f"{file} is missing: {index.name} says that it holds {names[0]}")
        return files

    def _take(self, file: Path, named: list[str] | None, nested: bool) -> None:
        """Adds the tensors of a file."""
        try:
            self._open[file] = safetensors.safe_open(file, framework="np", backend="pread")
            held = list(self._open[file].keys())
        except (safetensors.SafetensorError, OSError) as error:
            raise UserError(f"{file} cannot be read as safetensors: {_line(error)}") from error
        if missing := sorted({*(named or ())} - {*held}):
            raise UserError(f"{file} does not hold {missing[0]}, which {INDEX} says is there")
        for stored in held:
            name = _name_in_text(stored) if nested else stored
            if name is None or UNREAD.fullmatch(stored):
                continue
            if name in self.tensors:
                raise UserError(f"{self.tensors[name].file} and {file.name} both hold {stored}")
            if named is not None and stored not in named:
                raise UserError(f"{file} holds {stored}, which {INDEX} does not name")
            part = self._open[file].get_slice(stored)
            self.tensors[name] = Tensor(file, stored, part.get_dtype(), tuple(part.get_shape()))

    def check(self, wanted: Iterable[Parameter], tied: Mapping[str, str]) -> None:
        """Raises UserError unless there are the tensors of all parameters, of their shapes, and no others, but for
        those of `tied`, {name: of which it is a copy}."""
        shapes = {tensor: one.theirs for one in wanted for tensor in one.tensors}
        where = self.directory / (WEIGHTS if (self.directory / WEIGHTS).is_file() else INDEX)
        for name, shape in shapes.items():
            if name not in self.tensors:
                raise UserError(f"{where} has no {name}, {list(shape)}, which the model of {CONFIG} has")
        for name, found in self.tensors.items():
            shape = shapes.get(tied.get(name, name))
            if shape is None:
                raise UserError(f"{found.file} holds {found.stored}, which the model of {CONFIG} has no place for")
            if found.shape != shape:
                raise UserError(
                    f"{found.file}: {found.stored} is {list(found.shape)}, and the model of {CONFIG} has {list(shape)}"
                )
            if found.dtype not in DTYPES:
                raise UserError(f"{found.file}: {found.stored} is of {found.dtype}; choose one of: {', '.join(DTYPES)}")
        for name, copied in tied.items():
            if name in self.tensors:
                self._check_copy(name, copied)

    def _check_copy(self, name: str, copied: str, step: int = 1024) -> None:
        length = self.tensors[name].shape[0]
        for start in range(0, length, step):
            rows = slice(start, min(start + step, length))
            if not np.array_equal(self.rows(name, rows), self.rows(copied, rows)):
                raise UserError(
                    f"{self.tensors[name].file}: {name} is not {copied}, and {CONFIG} says that they are tied "
                    "(tie_word_embeddings); choose false there"
                )

    def rows(self, name: str, rows: slice) -> np.ndarray:
        """Some rows of a tensor, in its own type."""
        found = self.tensors[name]
        try:
            return self._open[found.file].get_slice(found.stored)[rows]
        except (safetensors.SafetensorError, OSError) as error:
            raise UserError(f"{found.file}: {found.stored} cannot be read: {_line(error)}") from error


def _name_in_text(stored: str) -> str | None:
    """What a tensor of a model of text and pictures is called in a model of text; None: it is of another part."""
    if stored.startswith(OTHER_PARTS):
        return None
    if stored.startswith(OUTER_HEAD):
        return stored.replace(OUTER_HEAD, "lm_head.", 1)
    for outer in OUTER:
        if stored.startswith(outer):
            return stored.replace(outer, "model.", 1)
    return stored


def _json(file: Path) -> dict:
    """An object of JSON. Raises UserError where there is none, and for a key that is there twice."""

    def once(pairs):
        twice = [name for name, count in collections.Counter(name for name, _ in pairs).items() if count > 1]
        if twice:
            raise UserError(f"{file} names {twice[0]} twice")
        return dict(pairs)

    try:
        found = json.loads(file.read_bytes(), object_pairs_hook=once)
    except FileNotFoundError:
        raise UserError(f"{file.parent} has no {file.name}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{file} holds no JSON object")
    return found


def find_json(file: Path) -> dict:
    """The same; empty where there is no such file."""
    return _json(file) if file.is_file() else {}


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
