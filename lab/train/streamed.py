"""A checkpoint of weights that are never held at once: each array is written and read in pieces.

What is written is what `lab.train.checkpoint` reads. Arrays are float32, and their pieces are chunks on the disk.
"""

import asyncio
import dataclasses
import json
import pathlib
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from typing import ClassVar, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from lab.errors import UserError
from lab.storage import sealed
from lab.train.checkpoint import Position

Index = tuple[slice, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Streamed:
    """An array that is made piece by piece.

    chunk: the shape of a piece; those at the end of an axis may be smaller. piece: float32 numbers at an index.
    """

    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    piece: Callable[[Index], np.ndarray]
    dtype: ClassVar = np.dtype(np.float32)

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))


def boxes(shape: tuple[int, ...], chunk: tuple[int, ...]) -> Iterator[Index]:
    """The indices of all pieces, the last axis fastest."""
    for place in np.ndindex(*(-(-size // step) for size, step in zip(shape, chunk, strict=True))):
        yield tuple(
            slice(at * step, min((at + 1) * step, size)) for at, size, step in zip(place, shape, chunk, strict=True)
        )


class Checksum:
    """What `lab.train.checkpoint` calls the checksum of weights, of their names, added up piece by piece."""

    def __init__(self, names: Iterable[str]):
        self.value = 0
        self._numbers = {name: number for number, name in enumerate(sorted(names))}

    def add(self, name: str, piece: np.ndarray, index: Index, shape: tuple[int, ...]) -> None:
        """Adds the float32 numbers at an index of the array of that name."""
        self.value = (self.value + _weighed(piece, index, shape, self._numbers[name])) % 2**32


class _Handler(ocp.type_handlers.NumpyHandler):
    """Writes one piece at a time, whatever Orbax begins at once."""

    def __init__(self, write: Callable[[Streamed, ts.TensorStore], Awaitable[None]]):
        super().__init__(deepcopy_host_arrays=False)
        self._write, self._turn = write, asyncio.Semaphore(1)

    async def _open_and_write(self, value: Streamed, tspec: dict, ts_context: ts.Context):
        async with self._turn:
            tspec["metadata"]["chunks"] = value.chunk
            await self._write(value, await ts.open(ts.Spec(tspec), create=True, open=True, context=ts_context))


def _weighed(piece: np.ndarray, index: Index, shape: tuple[int, ...], number: int) -> int:
    """The part of a checksum that the numbers at an index of the array of this number have: see
    `lab.train.checkpoint`."""
    places, stride = np.zeros((1,) * len(shape), np.uint32), 1
    for axis in reversed(range(len(shape))):
        at = (np.arange(index[axis].start, index[axis].stop, dtype=np.uint64) * stride).astype(np.uint32)
        places = places + at.reshape([-1 if axis == i else 1 for i in range(len(shape))])
        stride *= shape[axis]
    weights = np.broadcast_to(places, piece.shape) * np.uint32(2)
    weights += np.uint32((2 * 7919 * number + 1) % 2**32)
    weights *= np.ascontiguousarray(piece).view(np.uint32)
    return int(np.sum(weights, dtype=np.uint32))


def write(directory: pathlib.Path, arrays: Mapping[str, Streamed], wrote: Callable[[int], None] = lambda n: None):
    """Writes the weights of a model, by their names in a checkpoint, as one of no steps into a directory of
    checkpoints. wrote: is told of the bytes of each piece."""
    directory = pathlib.Path(directory).absolute()
    total, names = Checksum(arrays), {id(array): name for name, array in arrays.items()}

    async def write_pieces(array: Streamed, stored: ts.TensorStore) -> None:
        for index in boxes(array.shape, array.chunk):
            piece = array.piece(index)
            total.add(names[id(array)], piece, index, array.shape)
            await stored[index].write(piece)
            wrote(piece.nbytes)

    of_arrays = jax.Array, ocp.type_handlers.get_type_handler(jax.Array)  # Orbax warns where there is none
    registry = ocp.type_handlers.create_type_handler_registry((Streamed, _Handler(write_pieces)), of_arrays)
    items = {
        "state": ocp.PyTreeCheckpointHandler(type_handler_registry=registry),
        "position": ocp.JsonCheckpointHandler(),
    }
    options = ocp.CheckpointManagerOptions(create=True, enable_async_checkpointing=False)
    position = Position(0, 0)._asdict()
    with ocp.CheckpointManager(directory, options=options, item_handlers=items) as manager:
        state = ocp.args.PyTreeSave({"model": dict(arrays)})
        manager.save(0, args=ocp.args.Composite(state=state, position=ocp.args.JsonSave(position)))
    # The sum is known when all is written, and Orbax takes what it is given for JSON before.
    file = directory / "0" / "position" / "metadata"
    if not file.is_file():
        raise RuntimeError(f"Orbax has not written {file}: its layout is another one")
    file.write_text(json.dumps(sealed(position | {"numbers": total.value, "weights": total.value})))


class Stored(NamedTuple):
    """An array of a checkpoint, read in pieces."""

    array: ts.TensorStore

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape)

    @property
    def chunk(self) -> tuple[int, ...]:
        return tuple(self.array.chunk_layout.read_chunk.shape)

    def __getitem__(self, index: Index) -> np.ndarray:
        return self.array[index].read().result()


def read(checkpoint: pathlib.Path, names: list[str]) -> dict[str, Stored]:
    """The weights of a checkpoint, by their names in it. Raises UserError where one is not there."""
    found = {}
    for name in names:
        kvstore = {"driver": "ocdbt", "base": f"file://{checkpoint.absolute()}/state/", "path": f"model.{name}/"}
        try:
            found[name] = Stored(ts.open({"driver": "zarr", "kvstore": kvstore}, read=True).result())
        except ValueError as error:
            raise UserError(f"checkpoint {checkpoint} has no {name} that can be read: {_line(error)}") from error
    return found


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
