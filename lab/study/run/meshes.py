"""The mesh of a study that asks for one (run.auto_mesh): the simplest on which all of its cells fit, by estimate."""

import jax
from ml_collections import ConfigDict

from lab.errors import UserError
from lab.model import mesh as lab_mesh
from lab.study.define import plan
from lab.study.define.cell import Cell
from lab.study.run import hosts, runs
from lab.train import memory

ROOM = 0.9  # of a device's memory: a program does not fill it without gaps
GIB = 2**30


def decide(config: ConfigDict, cells: list[Cell]) -> tuple[dict[str, int], str]:
    """Sizes of the axes for all cells, and why these: one mesh, since runs of unlike ones are never paired.

    Raises UserError where no mesh over these devices divides what the cells have, and where their memory is unknown.
    """
    limit = int(config.run.device_memory * GIB) or memory.of_device()
    if limit is None:
        raise UserError("run.auto_mesh: the devices do not say what memory they have; set run.device_memory, in GiB")
    configs = [*{plan.program(cell.config): cell.config for cell in cells}.values()]
    needed = [memory.estimate(one) for one in configs]
    members = {"none": 1, "seeds": config.study.seeds, "numbers": len(cells)}[
        config.study.vmap
    ]  # of one program, at most
    found, passed = [], ""  # (bytes, sizes) of what divides; why the simplest is not taken
    for sizes in lab_mesh.simplest_first(jax.device_count()):
        refused = _refused(configs, sizes)
        if not refused:
            mesh = lab_mesh.make(sizes)
            found.append((members * max(one(mesh) for one in needed), sizes))
            if found[-1][0] <= ROOM * limit:
                break
        passed = passed or f"; {lab_mesh.told(sizes)}: {refused or f'{_gib(found[-1][0])} GiB'}"
    if not found:
        raise UserError(f"run.auto_mesh finds no mesh over {jax.device_count()} devices that divides all cells{passed}")
    fits = found[-1][0] <= ROOM * limit
    taken, sizes = found[-1] if fits else min(found, key=lambda one: one[0])
    sizes = dict(zip(sizes, hosts.agreed([*sizes.values()]), strict=True))
    told = f"about {_gib(taken)} GiB of a device's {_gib(limit)}{'' if fits else ', which may not fit'}"
    return sizes, f"{lab_mesh.told(sizes)} chosen: {told}{passed}"


def _refused(configs: list[ConfigDict], sizes: dict[str, int]) -> str:
    """Why a mesh cannot be that of all cells; "" if it can."""
    mesh = lab_mesh.make(sizes)
    for config in configs:
        changed = config.copy_and_resolve_references()
        changed.run.update(auto_mesh=False, device_memory=0.0, mesh=sizes)
        try:
            plan.check_run(changed)
            runs.check_mesh(changed, mesh)
        except UserError as error:
            return str(error).partition(";")[0]
    return ""


def _gib(size: float) -> str:
    return f"{size / GIB:.1f}" if size >= GIB / 10 else f"{size / GIB:.2g}"
