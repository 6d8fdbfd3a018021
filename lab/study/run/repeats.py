"""The runs of an A/A calibration: a cell of the study once more at each of its seeds, from other initial values.

They lie in a folder of their own, so that whoever reads the cells of a study never takes them for its results.
"""

import dataclasses
import pathlib

from ml_collections import ConfigDict

from lab.study.define import asked, calibration, identity
from lab.study.run.runs import Run, place

FOLDER = "calibration"


def repeats(config: ConfigDict, runs: list[Run], workdir: pathlib.Path, remake: bool = False) -> list[Run]:
    """study.calibrate repeats of every run of the cell that is calibrated, one repeat after another; `runs` are all of
    the study."""
    if not config.study.calibrate:
        return []
    cells = list({run.cell.name: run.cell for run in runs}.values())
    name = calibration.calibrated(config.study, cells).name
    own, there, found = [run for run in runs if run.cell.name == name], identity.records(workdir, FOLDER), []
    for number in range(1, config.study.calibrate + 1):
        cell = calibration.repeat(own[0].cell, number)
        made = identity.record(cell.config, own[0].data)
        changed = dict(cell=cell, identity=made, baseline=own[0].cell, note=f"calibration {number}")
        directory = workdir / place(cell, made, there, remake, FOLDER)
        found += [dataclasses.replace(run, directory=directory / run.directory.name, **changed) for run in own]
    return found


def describe(repeats: list[Run]) -> list[dict]:
    """As plan.json has them: a row for each repeat of the cell, shaped like those of cells."""
    rows: dict[str, dict] = {}
    for run in repeats:
        about = {"name": f"{run.cell.name} ({run.note})", "cell": run.cell.name, "directory": run.place, "seeds": []}
        if run.place not in rows:
            rows[run.place] = about | {"asks": asked.wanted(run.cell.config, run.data)}
        rows[run.place]["seeds"].append(run.seed)
    return list(rows.values())
