"""Opens a study: everything checked that shows before its data is read."""

import contextlib
import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Callable

from ml_collections import ConfigDict

from lab import config as lab_config
from lab.options import leaves
from lab.study.define import calibration, plan, start, tuning
from lab.study.define.cell import Cell, labels
from lab.study.define.resolve import resolve
from lab.study.report import sections
from lab.study.run import attention, hosts, meshes, places, repeats, runs, trials


@dataclasses.dataclass(frozen=True)
class Study:
    """A config that was checked, its cells before tuning, and their rows of the plan. Trials and runs read its data."""

    config: ConfigDict
    cells: list[Cell]
    rows: list[dict]
    workdir: pathlib.Path
    remake: bool = False  # runs that were made under other versions of the libraries
    attention: dict | None = None  # what trials found, once `decide_attention` has
    mesh: str = ""  # what `decide_mesh` chose, and why

    def decide_attention(self, say: Callable[[str], None]) -> "Study":
        """The study with an implementation in the place of "auto", if this host has GPUs (lab.study.run.attention)."""
        found = attention.decide(self.config, self.cells, self.workdir, say)
        return self if found is None else self._run_as(dict(implementation=found["name"]), attention=found)

    def decide_mesh(self) -> "Study":
        """The study with axes in the place of run.auto_mesh (lab.study.run.meshes), if it asks for that."""
        if not self.config.run.auto_mesh:
            return self
        sizes, why = meshes.decide(self.config, self.cells)
        study = self._run_as(dict(auto_mesh=False, device_memory=0.0, mesh=sizes), mesh=why)
        named = [{"executable": plan.program(cell.config)} for cell in study.cells]
        return dataclasses.replace(study, rows=[row | name for row, name in zip(study.rows, named, strict=True)])

    def _run_as(self, fields: dict, **found) -> "Study":
        """The study with other fields of run in all of its configs."""

        def changed(config: ConfigDict) -> ConfigDict:
            copy = config.copy_and_resolve_references()
            copy.run.update(fields)
            return copy

        cells = [dataclasses.replace(cell, config=changed(cell.config)) for cell in self.cells]
        return dataclasses.replace(self, config=changed(self.config), cells=cells, **found)

    @functools.cached_property
    def trials(self) -> list[trials.Trial]:
        """Every cell at every point of the grid; none where nothing is tuned."""
        return trials.trials(self.config, self.cells, self.workdir, self.remake)

    def planned(self, command: str, held: contextlib.ExitStack | None = None) -> list[runs.Run]:
        """Every run, cells at their best points as far as trials are made, and the repeats of a calibration; plan.json
        is written, with the command. held: closes what keeps other configs out of the directory, from here on.

        Raises UserError for a mesh or batches that do not fit the devices, hosts that differ, and a directory that
        holds something else.
        """
        cells = trials.tuned(self.cells, self.trials)
        rows = plan.table(self.config, cells) if self.trials else self.rows
        seeds = range(self.config.seed, self.config.seed + self.config.study.seeds)
        every = runs.runs_of(cells, seeds, self.workdir, self.remake)
        again = repeats.repeats(self.config, every, self.workdir, self.remake)
        runs.check_devices(every)
        runs.check_hosts_agree([*every, *again])
        tried, repeated = [trial.describe() for trial in self.trials], repeats.describe(again)

        def write() -> None:
            if held is not None:
                places.check(self.workdir, self.config)
                held.enter_context(places.held(self.workdir, self.config))
            runs.write_plan(self.workdir, self.config, rows, every, tried, command, self.attention, repeated)

        hosts.first(write)
        return [*every, *again]


def open(
    config: ConfigDict,
    overridden: tuple[str, ...] = (),
    workdir: pathlib.Path | None = None,
    remake: bool = False,
) -> Study:
    """The study of a config whose fields `overridden` were set by the command; its files go to `workdir`, or to
    runs/<study>. Reads no data. Raises UserError for whatever cannot run or be reported."""
    lab_config.check_fields(config)
    lab_config.ROOMS["study"].check(leaves(config.study), "study.")
    config = start.laid(config, overridden)
    cells = resolve(config, overridden)
    sections.parts(config.study.sections, [label for _, label in labels(config.study)])
    rows = plan.table(config, cells)
    calibration.check(config, cells)
    for point, cell in itertools.product(tuning.points(config, cells), cells):
        plan.check(tuning.with_values(cell, point))
    return Study(config, cells, rows, workdir or pathlib.Path("runs") / config.study.name, remake)
