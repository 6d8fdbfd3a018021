"""How batches, activations and attention lie over the mesh (data, fsdp, tensor, context)."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lab.errors import UserError
from lab.options import Option

AXES = ("data", "fsdp", "tensor", "context")
OPTIONS = {
    axis: Option(-1 if axis == "data" else 1, f"devices along {axis}; -1: what is left of them", least=-1)
    for axis in AXES
}
CHOSEN = {
    "auto_mesh": Option(False, "run.mesh is chosen from what the cells need and what a device has of memory"),
    "device_memory": Option(0.0, "GiB of a device, for auto_mesh; 0: what it says itself", least=0, most=10**6),
}
BATCH = ("data", "fsdp")  # rows; tokens lie over context, heads over tensor
TOKENS = P(BATCH, "context")  # of an array [B, T]


def make(config, over: Sequence | None = None) -> Mesh:
    """The mesh that `config.run.mesh` describes over these devices, or all of all hosts; one axis may be -1: what is
    left. On a TPU an axis may take a part of a side of the slice."""
    sizes, over = [config[axis] for axis in AXES], jax.devices() if over is None else over
    devices = len(over)
    known = [size for size in sizes if size != -1]
    wanted = [devices // max(math.prod(known), 1) if size == -1 else size for size in sizes]
    if len(known) < len(sizes) - 1 or min(wanted) < 1 or math.prod(wanted) != devices:
        shown = ", ".join(f"{axis} {size}" for axis, size in zip(AXES, sizes, strict=True))
        raise UserError(
            f"run.mesh ({shown}) does not cover {devices} devices; their product must be {devices}, one may be -1"
        )
    laid = mesh_utils.create_device_mesh(wanted, over, allow_split_physical_axes=True)
    return Mesh(laid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def told(sizes: Mapping[str, int]) -> str:
    """The axes of more than one device, in words."""
    return " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "of one device"


def check_choice(run) -> None:
    """Refuses a mesh that is both chosen and set, and memory that nothing plans with."""
    if not run.auto_mesh:
        if run.device_memory:
            raise UserError(
                f"run.device_memory = {run.device_memory} means nothing beside run.auto_mesh = False; choose 0, or "
                "run.auto_mesh = True"
            )
        return
    for axis, option in OPTIONS.items():
        if run.mesh[axis] != option.default:
            raise UserError(
                f"run.mesh.{axis} = {run.mesh[axis]} means nothing beside run.auto_mesh = True, which chooses the "
                f"mesh; choose {option.default}, or run.auto_mesh = False"
            )


def simplest_first(devices: int) -> Iterator[dict[str, int]]:
    """Sizes of the axes of every mesh over so many devices. Context grows last, before it tensor, before that fsdp."""
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    for context, tensor, fsdp in itertools.product(divisors, repeat=3):
        if devices % (context * tensor * fsdp) == 0:
            yield dict(data=devices // (context * tensor * fsdp), fsdp=fsdp, tensor=tensor, context=context)


def check_rows(mesh: Mesh, name: str, rows: int, tokens: int) -> None:
    """Refuses a batch that does not divide over the mesh."""
    over_rows, over_tokens = mesh.shape["data"] * mesh.shape["fsdp"], mesh.shape["context"]
    if rows % over_rows:
        raise UserError(
            f"{name} = {rows} does not divide over run.mesh data x fsdp = {over_rows}; choose a multiple of it, "
            "fewer devices, or run.auto_mesh = True"
        )
    if over_rows % (processes := jax.process_count()):
        raise UserError(
            f"run.mesh data x fsdp = {over_rows} does not divide over {processes} processes, each of which reads rows "
            "of its own; choose a multiple of them"
        )
    if tokens % over_tokens:
        raise UserError(
            f"rows of {tokens} tokens do not divide over run.mesh.context = {over_tokens}; choose a divisor"
        )


def place(batch, mesh: Mesh):
    """A host's rows of a batch [..., B, T] as global arrays. Over context, tiles of tokens are dealt out in turn.

    The mask is a function of coordinates, so the order is free; dealt out, every device has early and late queries.
    """
    stack = (None,) * (batch.tokens.ndim - 2)
    sharding = NamedSharding(mesh, P(*stack, *TOKENS))
    deal = _dealt_out(batch.tokens.shape[-1], mesh.shape["context"])
    put = lambda x: jax.make_array_from_process_local_data(sharding, x if deal is None else x[..., deal])  # noqa: E731
    return jax.tree.map(put, batch)


def _dealt_out(tokens: int, parts: int) -> np.ndarray | None:
    if parts == 1:
        return None
    tile = math.gcd(tokens // parts, 64)
    return np.arange(tokens).reshape(-1, parts, tile).swapaxes(0, 1).reshape(-1)


def current() -> dict[str, int]:
    """Axis sizes of the mesh in use (jax.set_mesh), empty where there is none or where it has one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return {} if mesh.empty or mesh.size == 1 else dict(mesh.shape)


def constrain(x: jax.Array) -> jax.Array:
    """Lays activations x [B, T, ...] over the mesh."""
    return jax.lax.with_sharding_constraint(x, TOKENS) if current() else x


def everywhere(tree):
    """The same arrays, whole on every device."""
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, P()), tree) if current() else tree


def place_rows(x: np.ndarray, mesh: Mesh) -> jax.Array:
    """A host's rows [B, T] as a global array whose rows lie over the mesh, and whose tokens stay in order."""
    return jax.make_array_from_process_local_data(NamedSharding(mesh, P(BATCH)), x)


def per_device(function, in_specs, out_specs):
    """`function` run by each device on its own part; on one device, simply `function`.

    Loops of a data-dependent length cannot be partitioned by the compiler, so attention says itself what each holds.
    """
    if not current():
        return function
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)
