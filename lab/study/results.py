"""What a study has found so far, read from its directory, and the csv files made of it."""

import csv
import dataclasses
import functools
import io
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from lab.errors import SHOWN, UserError
from lab.options import tuples
from lab.storage import find_json, read_json, say_damaged, unsealed, write_atomically
from lab.study import evaluations, measure
from lab.study.evaluations import LOSS
from lab.study.measure import BITS, Measure

REPOSITORY = Path(__file__).parents[2]
NUMBERS = ("loss", "parameters_millions", "cache_per_token_per_layer")  # of published files, where they have them
TIMINGS = ("seconds", "tokens_per_second", "peak_bytes", "overhead_share")
EMBEDDING = "embedding"  # in the column of_layer: no layer gave it
MIXING = ("name", "layer", "of_layer", "weight")
RUN, SCORES, SIZES = ("cell", "seed"), ("loss", "ppl", "accuracy"), ("tokens", "parameters")
OF_BYTES = (BITS.column, "tokens", "bytes")  # of results/bits_per_byte.csv
# What stands in tables of runs besides the labels: a label of such a name would write over it.
COLUMNS = {*RUN, *SCORES, *SIZES, "phase", *TIMINGS, "step", *MIXING, *OF_BYTES}
RESULT = {"parameters", "tokens", "timings", "environment"}  # what is read of a result.json
# What every report reads of a plan.json, of its cells and of its trials.
NUMBER = int | float
PLAN = dict(study=str, question=str, labels=list, condition=str, sections=list, published=str, command=str)
PLAN |= dict(config=dict, cells=list)
CELL = dict(
    asks=dict, name=str, labels=dict, directory=str, seeds=list, tokens=NUMBER, parameters=NUMBER, executable=str
)
TRIAL = dict(asks=dict, cell=str, values=dict, directory=str, seed=int)
REPEAT = dict(asks=dict, name=str, cell=str, directory=str, seeds=list)  # of the cell that is calibrated
ROWS = {"cells": ("a cell", CELL), "tuning": ("a trial", TRIAL), "calibration": ("a repeat", REPEAT)}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One seed of one cell. `result`, of its training, and `failure` are None where their files are missing; `metrics`
    may be empty; where a plan says what a step reads, they have bits_per_byte too. asked: the evaluation of every ask,
    as far as it was found; None where it was not begun."""

    cell: dict
    seed: int
    result: dict | None
    failure: dict | None
    metrics: list[dict]
    asked: dict[str, dict | None]

    @property
    def status(self) -> str:
        """done | failed | pending; a run that is trained and asked everything outweighs an earlier failure."""
        done = self.result and all(map(self.rows, self.asked))
        return "done" if done else "failed" if self.failure is not None else "pending"

    def rows(self, ask: str = LOSS) -> list[dict]:
        """What a trained run was found to have under each condition of an ask; none until all of them are found."""
        return evaluations.rows(self.asked.get(ask)) if self.result else []


@dataclasses.dataclass(frozen=True)
class Results:
    """A plan and its runs, in the plan's order. Frames have the short labels of the plan as columns."""

    directory: Path
    plan: dict
    runs: list[Outcome]

    @property
    def labels(self) -> list[str]:
        return [label for _, label in self.plan["labels"]]

    @property
    def condition(self) -> str:
        return self.plan["condition"]

    @property
    def measure(self) -> Measure:
        """What the cells are judged in."""
        return measure.of_plan(self.plan)

    @functools.cached_property
    def runs_by_cell(self) -> dict[str, list[Outcome]]:
        """The runs of every cell of the plan by its name."""
        found: dict = {cell["name"]: [] for cell in self.plan["cells"]}
        for run in self.runs:
            found[run.cell["name"]].append(run)
        return found

    def key(self, cell: dict) -> tuple:
        """The values of a cell's labels, in the order of the labels; "" for a label that the cell lacks."""
        return tuple(cell["labels"].get(label, "") for label in self.labels)

    @functools.cached_property
    def results(self) -> pd.DataFrame:
        """cell, the labels, seed, the condition, loss (nats per token), ppl, tokens (trained), parameters; and
        accuracy (share of tokens) where any run has it."""
        rows = [row for run in self.runs for row in _result_rows(self, run)]
        scores = [name for name in SCORES if name != "accuracy" or any(name in row for row in rows)]
        columns = ["cell", *self.labels, "seed", self.condition, *scores, *SIZES]
        return pd.DataFrame(rows, columns=columns)

    @functools.cached_property
    def bits(self) -> pd.DataFrame:
        """Of a study that is judged in them, by run and condition: cell, the labels, seed, the condition,
        bits_per_byte, and the labelled tokens and their bytes."""
        rows = [identity(self, run) | row for run in self.runs for row in run.rows()]
        return pd.DataFrame(rows, columns=["cell", *self.labels, "seed", self.condition, *OF_BYTES])

    @functools.cached_property
    def scores(self) -> list[float]:
        """What each row of `results` is judged by."""
        return [row[self.measure.column] for run in self.runs for row in run.rows()]

    @property
    def further_asks(self) -> dict[str, str]:
        """{name: what its axis is called} of the asks beside the one named loss."""
        return {name: column for name, column in self.plan.get("asks", {}).items() if name != LOSS}

    def answers(self, ask: str) -> pd.DataFrame:
        """Of a further ask: cell, the labels, seed, its axis, loss (nats per token), accuracy, tokens (labelled), in a
        study that is judged in bits_per_byte that, and what else its kind finds."""
        rows = [identity(self, run) | row for run in self.runs for row in run.rows(ask)]
        axis, known = self.further_asks[ask], ("loss", "accuracy", "tokens", self.measure.column)
        further = dict.fromkeys(name for row in rows for name in row)
        kept = [name for name in further if name not in (*known, *OF_BYTES, axis, *RUN, *self.labels)]
        columns = ["cell", *self.labels, "seed", axis, *dict.fromkeys((*known, *kept))]
        return pd.DataFrame(rows, columns=columns)

    @functools.cached_property
    def timings(self) -> pd.DataFrame:
        """cell, the labels, seed, phase (train, eval, or the name of a further ask), the condition, and the columns of
        TIMINGS where measured."""
        columns = ["cell", *self.labels, "seed", "phase", self.condition, *TIMINGS]
        return pd.DataFrame([row for run in self.runs for row in _timing_rows(self, run)], columns=columns)

    @functools.cached_property
    def curves(self) -> pd.DataFrame:
        """cell, the labels, seed, step, and what the metrics hold; every run that has logged a step, done or not."""
        rows = [identity(self, run) | line for run in self.runs for line in run.metrics]
        return pd.DataFrame(rows, columns=["cell", *self.labels, "seed", "step", "loss"] if not rows else None)

    @functools.cached_property
    def mixing(self) -> pd.DataFrame:
        """cell, the labels, seed, and the columns of MIXING: the weight that a layer learned for what another gave."""
        rows = [row for run in self.runs for row in _mixing_rows(self, run)]
        return pd.DataFrame(rows, columns=["cell", *self.labels, "seed", *MIXING]).astype({"weight": float})

    def config(self, cell: dict) -> dict:
        """The resolved config of a cell; empty where the cell has not been started."""
        path = self.directory / cell["directory"] / "config.json"
        return read_json(path) if path.exists() else {}

    def published(self) -> pd.DataFrame | None:
        """The published numbers that the plan names. Raises UserError where their file has none."""
        return published(self.plan["published"]) if self.plan["published"] else None


def published(name: str) -> pd.DataFrame:
    """The numbers of study.published. Raises UserError where it is no csv file with a column `loss` of numbers."""
    field, path = f"study.published = {name!r}", REPOSITORY / name
    if not path.is_file():
        raise UserError(f"{field}: there is no such file in the repository")
    try:
        frame = pd.read_csv(path, keep_default_na=False, na_values=[""])  # a variant may be called None
    except ValueError as error:
        raise UserError(f"{field} is no csv: {' '.join(str(error).split())}") from error
    if "loss" not in frame.columns:
        shown = ", ".join(map(str, frame.columns[:SHOWN]))
        raise UserError(f"{field} is no csv with a column loss; its first line is {shown[:200]!r}")
    for column in (name for name in NUMBERS if name in frame.columns):
        if not pd.api.types.is_numeric_dtype(frame[column]):
            raise UserError(f"{field} has something in its column {column} that is no number")
    return frame


def collect(directory: str | Path) -> Results:
    """Reads runs/<study>, finished or not. Raises UserError where it is not the directory of a study."""
    directory = Path(directory)
    if not (directory / "plan.json").exists():
        raise UserError(f"{directory} has no plan.json: give the directory of a study, such as runs/rope_ablation")
    plan = read_plan(directory / "plan.json")
    return Results(directory, plan, outcomes(directory, plan["cells"]))


def outcomes(directory: Path, cells: Sequence[dict]) -> list[Outcome]:
    """Every seed of every row of a plan, of its cells or of the repeats of one of them."""
    return [_run(directory, cell, seed) for cell in cells for seed in cell["seeds"]]


def read_plan(path: Path) -> dict:
    """A plan.json. Raises UserError where it is none, or one of a lab that had other fields in it."""
    plan = read_json(path)
    rows = [(told, one, fields) for name, (told, fields) in ROWS.items() for one in plan.get(name) or ()]
    for name, one, fields in [("it", plan, PLAN), *rows]:
        for field, kind in fields.items():
            if not isinstance(one, dict) or not isinstance(one.get(field), kind):
                raise UserError(
                    f"{path} is of an older lab, or no plan of a study: {name} lacks {field}; run the study's command "
                    "again, then its report"
                )
    for cell in plan["cells"]:
        cell["labels"] = {label: tuples(value) for label, value in cell["labels"].items()}
    return plan


def write_csv(study: Results) -> list[Path]:
    """Writes results.csv, the same bytes whenever the losses are the same, timings.csv, results/bits_per_byte.csv of a
    study that is judged in that, and mixing.csv where a run has learned weights of layers; returns their paths."""
    results = [row for run in study.runs for row in _result_rows(study, run)]
    timings = [row for run in study.runs for row in _timing_rows(study, run)]
    for name in study.further_asks:
        frame = study.answers(name)
        content = as_csv(list(frame.columns)[1:], frame.to_dict("records"))
        write_atomically(study.directory / "results" / f"{name}.csv", content)
    written = [
        write_atomically(study.directory / "results.csv", as_csv(list(study.results.columns)[1:], results)),
        write_atomically(study.directory / "timings.csv", as_csv(list(study.timings.columns), timings)),
    ]
    if study.measure is BITS:
        content = as_csv(list(study.bits.columns)[1:], study.bits.to_dict("records"))
        written.append(write_atomically(study.directory / "results" / f"{BITS.column}.csv", content))
    if study.mixing.empty:
        return written
    content = as_csv(list(study.mixing.columns), study.mixing.to_dict("records"))
    return [*written, write_atomically(study.directory / "mixing.csv", content)]


def trained(run: Path) -> dict | None:
    """The result.json of a run's directory; None where there is none that is whole."""
    found = find_json(run / "result.json")
    return found if found and {*found} >= RESULT else None


def failed(run: Path) -> dict | None:
    """Its failure.json."""
    return find_json(run / "failure.json")


def metrics(run: Path) -> list[dict]:
    """Its metrics.jsonl, one line for each step: a resumed run takes steps again, and the last line of a step counts.
    What is no line is passed over; that is said once, but of the end of a line that a kill has left."""
    path, steps = run / "metrics.jsonl", {}
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
        try:
            entry = unsealed(json.loads(line))
        except (ValueError, RecursionError):
            if line.endswith(b"\n"):
                say_damaged(path, "is damaged: lines of it are taken as missing")
            continue
        if isinstance(entry.get("step"), int) and isinstance(entry.get("loss"), int | float):
            steps[entry["step"]] = entry
    return [steps[step] for step in sorted(steps)]


def steps_logged(run: Path) -> int:
    """How many steps, from the first on, have a line that says what they read."""
    there = {line["step"] for line in metrics(run) if {"tokens", "text_hash"} <= {*line}}
    return next(step for step in itertools.count() if step not in there)


def judged_loss(rows: Sequence[dict], condition: str, judged: Sequence, column: str = "loss") -> float | None:
    """Mean loss, or another column, over the judged values of the condition (none: all); None of no rows."""
    losses = [row[column] for row in rows if not judged or row[condition] in judged]
    return sum(losses) / len(losses) if rows else None


def identity(study: Results, run: Outcome) -> dict:
    """The columns that say which run a row belongs to."""
    labels = dict(zip(study.labels, study.key(run.cell), strict=True))
    return {"cell": run.cell["name"], **labels, "seed": run.seed}


def _run(directory: Path, cell: dict, seed: int) -> Outcome:
    place = directory / cell["directory"] / f"seed-{seed}"
    asked = {name: evaluations.find(place, name, wanted) for name, wanted in cell.get("asks", {}).items()}
    lines = metrics(place)
    if "reads" in cell:
        lines = measure.with_bits(lines, **cell["reads"])
    return Outcome(cell, seed, trained(place), failed(place), lines, asked)


def _result_rows(study: Results, run: Outcome) -> list[dict]:
    if not run.rows():
        return []
    known = identity(study, run)
    size = {name: run.result[name] for name in SIZES}
    return [
        known
        | {study.condition: entry[study.condition], "loss": entry["loss"], "ppl": _perplexity(entry["loss"])}
        | {name: entry[name] for name in ("accuracy",) if name in entry}
        | size
        for entry in run.rows()
    ]


def _perplexity(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def _timing_rows(study: Results, run: Outcome) -> list[dict]:
    if not run.result:
        return []
    known, rows = identity(study, run), list(run.result["timings"])
    for name, column in {LOSS: study.condition, **study.further_asks}.items():
        phase = "eval" if name == LOSS else name
        timed = run.asked[name]["timings"] if run.rows(name) else []
        rows += [entry | {"phase": phase, study.condition: entry[column]} for entry in timed]
    measured = ("phase", study.condition, *TIMINGS)
    return [known | {name: entry.get(name) for name in measured} for entry in rows]


def _mixing_rows(study: Results, run: Outcome) -> list[dict]:
    path = study.directory / run.cell["directory"] / f"seed-{run.seed}" / "mixing.csv"
    if not run.result or not path.exists():
        return []
    return [identity(study, run) | row for row in csv.DictReader(io.StringIO(path.read_text("utf-8")))]


def as_csv(columns: Sequence[str], rows: list[dict]) -> bytes:
    """Floats as repr gives them, so equal numbers give equal bytes."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()
