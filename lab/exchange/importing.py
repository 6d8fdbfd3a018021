"""A Hugging Face model made a directory that `lab.load` opens, or placed on a mesh as it is.

Neither holds a tensor whole: a file is written in pieces (lab.train.streamed), and a mesh is given what each device has
of one layer at a time.
"""

import contextlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from lab import model as lab_model
from lab.config import base
from lab.data import tokenizers
from lab.errors import UserError
from lab.exchange import architecture, companions
from lab.exchange.source import CONFIG, DTYPES, Original, find_json
from lab.exchange.tensors import Parameter, parameters
from lab.model import mesh as lab_mesh
from lab.model import parameter
from lab.storage import write_json
from lab.train import compiled, streamed

READ = (  # of a repository of the hub
    CONFIG, "tokenizer*.json", "special_tokens_map.json", "generation_config.json", "*.jinja",
    "model*.safetensors", "model.safetensors.index.json",
)  # fmt: skip


class Opened:
    """A source whose config.json and tensors were found to be a model. Raises UserError where they are not."""

    def __init__(self, directory: Path):
        self.source = Original(directory)
        self.family, text = architecture.text_of(self.source.config, self.source.config_file)
        whole = {key: value for key, value in self.source.config.items() if key.endswith("_token_id")}
        self.text = whole | text
        self.model = architecture.read(self.family, self.text, self.source.config_file)
        self.abstract = lab_model.abstract(self.model)
        self.parameters = parameters(self.abstract, self.family)
        head, embedding = self.family.whole["head"], self.family.whole["embedding"]
        self.source.check(self.parameters, {head: embedding} if self.model.tied else {})

    def config(self) -> ConfigDict:
        """That of the lab."""
        config = base()
        config.model = self.model
        return config

    def end(self) -> str:
        """The token that ends a text, "" where none is named. Raises UserError for a tokenizer that does not fit."""
        values = self.family.defaults | self.text
        return companions.special(self.source.directory, values, self.model.vocabulary)


def locate(name: str) -> Path:
    """A directory, or what the hub has of that name, in its cache. Raises UserError where there is neither."""
    if Path(name).is_dir():
        return Path(name)
    if name.count("/") > 1 or name.startswith((".", "/", "~")) or Path(name).exists():
        raise UserError(
            f"{name} is no directory; give that of a Hugging Face model, or its name on the hub, as OWNER/MODEL"
        )
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(f"{name} is no directory; to take it from the hub: pip install huggingface_hub") from None
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=READ))
    except Exception as error:  # of the network, of rights, and of what the library finds in its cache
        said = (str(error).strip().splitlines() or [""])[0][:200]
        raise UserError(
            f"{name} is no directory, and the hub does not give it ({type(error).__name__}: {said}); choose a directory"
        ) from error


def from_hf(directory: Path, out: Path, begun: Callable[[int], None], wrote: Callable[[int], None]) -> ConfigDict:
    """Writes `out`, which `lab.load` opens; returns its config. begun, wrote: are told of bytes to be written, and of
    those that were. Raises UserError for a directory that is not what it should be; then nothing is written."""
    opened = Opened(Path(directory))
    end = opened.end()
    with whole_or_nothing(out) as draft:
        config = opened.config()
        config.data.update(tokenizer=str(out / tokenizers.FILE), eos=end)
        companions.copy(opened.source.directory, draft)
        write_json(draft / "config.json", json.loads(config.to_json_best_effort()))
        dtypes = {name: DTYPES[one.dtype] for name, one in opened.source.tensors.items()}
        write_json(draft / companions.ORIGIN, {"config": opened.text, "dtypes": dtypes})
        begun(4 * sum(int(np.prod(one.shape)) for one in opened.parameters))
        arrays = {one.name: _streamed(opened.source, one) for one in opened.parameters}
        streamed.write(draft / "seed-0" / "checkpoints", arrays, wrote)
    return config


def free(out: Path) -> Path:
    """A place where nothing is yet. Raises UserError where something is."""
    if Path(out).exists():
        raise UserError(f"{out} is there already; choose another place, or remove it")
    return Path(out)


@contextlib.contextmanager
def whole_or_nothing(out: Path) -> Iterator[Path]:
    """A directory beside `out` that becomes it at the end, and is gone if anything fails. Raises UserError where there
    is something already."""
    out = free(out)
    draft = out.with_name(f".{out.name}.{secrets.token_hex(4)}.partial")
    draft.mkdir(parents=True)
    try:
        yield draft
        os.rename(draft, out)
    except BaseException:
        _remove(draft)
        raise


def _remove(draft: Path) -> None:
    """Removes a draft for good: threads that were writing it go on for a moment, and make it anew."""
    gone = 0
    for _ in range(100):
        gone = 0 if draft.exists() else gone + 1
        if gone == 5:
            return
        shutil.rmtree(draft, ignore_errors=True)
        time.sleep(0.1)


def _streamed(source: Original, one: Parameter) -> streamed.Streamed:
    """A parameter whose pieces are rows of a tensor."""

    def piece(index: streamed.Index) -> np.ndarray:
        tensor, own = one.tensors[index[0].start] if one.stacked else one.tensors[0], index[one.stacked :]
        part = one.from_rows(source.rows(tensor, one.rows(own[one.axis])))
        part = np.ascontiguousarray(part, np.float32)
        return part[None] if one.stacked else part

    return streamed.Streamed(one.shape, one.chunk, piece)


def theirs(path: str | Path) -> bool:
    """Whether a directory is of Hugging Face's format. Raises UserError for a config.json that cannot be read."""
    return "model_type" in find_json(Path(path) / CONFIG)


def load(opened: Opened) -> tuple[nnx.Module, tokenizers.Tokenizer]:
    """(model, tokenizer) of a Hugging Face directory, on one device: nothing is written."""
    devices = np.array(jax.devices()[:1]).reshape((1,) * len(lab_mesh.AXES))
    mesh = Mesh(devices, lab_mesh.AXES, axis_types=(AxisType.Auto,) * len(lab_mesh.AXES))
    return onto_mesh(opened, mesh), tokenizers.load(opened.source.directory, opened.end())


def onto_mesh(opened: Opened, mesh: Mesh) -> nnx.Module:
    """The model over a mesh, as its parameters are declared: the host holds what one device has of one layer."""
    structure, weights, tables = parameter.split(compiled.described(opened.config(), mesh))
    laid, treedef = jax.tree.flatten(weights)
    with jax.set_mesh(mesh):
        filled = [_placed(opened.source, one, like) for one, like in zip(opened.parameters, laid, strict=True)]
    return nnx.merge(structure, jax.tree.unflatten(treedef, filled), tables)


def _placed(source: Original, one: Parameter, like: jax.ShapeDtypeStruct) -> jax.Array:
    """A parameter over the mesh. What is stacked is filled layer by layer, in place."""
    mesh, spec = like.sharding.mesh, like.sharding.spec
    of_layer = NamedSharding(mesh, PartitionSpec(*spec[1:])) if one.stacked else like.sharding

    def layer(tensor: str) -> jax.Array:
        def held(index):
            """What a device has of a layer: its rows, and of them its columns."""
            start, stop, _ = index[one.axis].indices(one.own[one.axis])
            part = one.from_rows(source.rows(tensor, one.rows(slice(start, stop))))
            return part[tuple(slice(None) if axis == one.axis else at for axis, at in enumerate(index))]

        return jax.make_array_from_callback(one.own, of_layer, held)

    if not one.stacked:
        return jax.jit(lambda x: x.astype(like.dtype), out_shardings=like.sharding)(layer(one.tensors[0]))
    put = jax.jit(
        lambda whole, part, m: jax.lax.dynamic_update_index_in_dim(whole, part.astype(whole.dtype), m, 0),
        donate_argnums=0,
        out_shardings=like.sharding,
    )
    whole = jax.jit(lambda: jax.numpy.zeros(one.shape, like.dtype), out_shardings=like.sharding)()
    for m, tensor in enumerate(one.tensors):
        whole = put(whole, layer(tensor), m)
    return whole
