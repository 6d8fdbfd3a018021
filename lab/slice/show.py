"""What is printed of a training step that was compiled for a slice: memory, collectives, and its time at best."""

from collections.abc import Iterator

from rich.table import Table

from lab.model import mesh as lab_mesh
from lab.slice import chips, hlo
from lab.slice.step import Compiled, Slice
from lab.train import memory

GIB = 2**30


def described(config, of: Slice, made: Compiled, row: dict, keys: float) -> dict:
    """All that is known of it. row: of the plan; keys: that a query sees, the mean over layers."""
    mesh, over = dict(made.mesh.shape), made.mesh.shape["data"] * made.mesh.shape["fsdp"]
    found = {
        "topology": of.name,
        "chips": len(of.devices),
        "mesh": mesh,
        "compile_seconds": round(made.seconds, 1),
        "fits": made.work is not None and made.total <= made.limit,
        "bytes": {"held": made.held, "temporary": made.temporary, "total": made.total, "hbm": int(made.limit)},
    }
    found["verdict"] = _verdict(config, mesh, made, found["fits"], over)
    if made.work is None:
        return found
    places = [device.coords for device in made.mesh.devices.flat]
    spent = chips.network(of.chip, of.sides, places, made.work)
    flops = made.work.flops + made.work.kernels * keys
    line = chips.roofline(of.chip, flops, made.work.bytes, sum(spent.values()))
    tokens = config.data.rows * config.data.texts_per_row * config.data.text_length
    model = row["train_flops_per_token"] * tokens / len(of.devices)
    return found | {
        "collectives": _collectives(made.work, mesh, spent),
        "flops": flops,
        "flops_model": model,
        "bytes_moved": made.work.bytes,
        "seconds": line._asdict() | {"best": line.best, "worst": line.worst},
        "bound": line.bound,
        "tokens": tokens,
        "tokens_per_second": tokens / line.best,
        "mfu": model / of.chip.flops / line.best,
        "unknown_loops": made.work.unknown,
    }


def _verdict(config, mesh: dict, made: Compiled, fits: bool, over: int) -> str:
    told = f"mesh {lab_mesh.told(mesh)}"
    if fits:
        return f"{told} fits: {made.total / GIB:.2f} of {made.limit / GIB:.2f} GiB of a chip"
    return f"{told} does not fit: {memory.unfit(config, made.held, made.temporary or 0, made.limit, over)}"


def _collectives(work: hlo.Work, mesh: dict, spent: dict) -> list[dict]:
    """One for each kind and axes, those that take longest first. bytes: that each chip receives in a step."""
    found: dict[tuple[str, str], dict] = {}
    for each, count in work.collectives.items():
        key = each.kind, hlo.axes_of(each, mesh)
        row = found.setdefault(key, dict(kind=key[0], axes=key[1], count=0, bytes=0.0, seconds=0.0))
        for name, more in (("count", count), ("bytes", count * each.moved), ("seconds", spent[each])):
            row[name] += more
    return sorted(found.values(), key=lambda row: -row["seconds"])


def shown(name: str, found: dict) -> Iterator[str | Table]:
    """For a terminal."""
    spent = f"compiled in {found['compile_seconds']:.0f} s"
    yield f"{name}: {found['topology']}, {found['chips']} chips, mesh {lab_mesh.told(found['mesh'])}; {spent}"
    held, temporary, total, hbm = (value / GIB for value in found["bytes"].values())
    yield (
        f"memory of a chip: {held:.2f} GiB of weights, optimizer and batch, {temporary:.2f} of temporaries; "
        f"{total:.2f} of {hbm:.2f} GiB"
    )
    if "seconds" in found:
        table = Table(title="Collectives of a step")
        for column in ("kind", "over", "times", "GiB received by each chip", "ms at best"):
            table.add_column(column, justify="left" if column in ("kind", "over") else "right")
        for row in found["collectives"]:
            numbers = f"{row['count']:,}", f"{row['bytes'] / GIB:.3f}", f"{1e3 * row['seconds']:.2f}"
            table.add_row(row["kind"], row["axes"], *numbers)
        yield table
        at = {key: f"{1e3 * value:,.1f}" for key, value in found["seconds"].items()}
        yield (
            f"a step of {found['tokens']:,} tokens: {found['flops'] / 1e12:.2f} TFLOP of a chip (the model's own: "
            f"{found['flops_model'] / 1e12:.2f}) in {at['compute']} ms at its peak, "
            f"{found['bytes_moved'] / GIB:.1f} GiB of HBM in {at['memory']} ms, exchange in {at['network']} ms"
        )
        yield (
            f"at best {at['best']} ms, bound by {found['bound']} ({at['worst']} were nothing done at once): "
            f"{found['tokens_per_second']:,.0f} tokens a second, MFU {found['mfu']:.1%}"
        )
        if found["unknown_loops"]:
            yield f"{found['unknown_loops']} loops of a length that depends on the data were counted once"
    yield found["verdict"]
