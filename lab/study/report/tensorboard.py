"""What a report shows, as TensorBoard events, without TensorFlow: its figures, and groups of runs over their seeds."""

import io
import statistics
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from tensorboard.compat.proto import tensor_pb2, types_pb2
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.image import metadata as image_metadata
from tensorboard.summary.writer.record_writer import RecordWriter

from lab.storage import write_atomically
from lab.study.report.page import Chart
from lab.study.results import Outcome, Results

OVER_SEEDS = {"mean": statistics.fmean, "low": min, "high": max}  # runs that stand for a cell

Points = dict[str, dict[int, float]]  # {tag: {step: value}}


def write_figures(study: Results, charts: Sequence[Chart]) -> None:
    """The report's figures as images of a run of their own, at the step of how many runs are done."""
    newest, done = _newest(study, study.runs), sum(run.status == "done" for run in study.runs)
    path = _write(study.directory / "tensorboard", "report", newest, done, [_images(charts, done, newest)])
    _drop_others((study.directory / "tensorboard").glob("events.out.tfevents.*.report"), [path])


def write_groups(study: Results) -> None:
    """Every cell with several finished seeds as the runs groups/<cell>/mean, low and high: the mean, the smallest and
    the largest over those seeds of what their own runs show under the same names, at the steps that all have."""
    written = []
    for cell in study.plan["cells"]:
        runs = [run for run in study.runs if run.cell is cell and run.result]
        if len(runs) < 2:
            continue
        newest, curves = _newest(study, runs), [_curves(study, run) for run in runs]
        for name, over in OVER_SEEDS.items():
            events = _scalars(_joined(curves, over), newest)
            place = study.directory / "groups" / PurePosixPath(cell["directory"]).name / name
            written.append(_write(place, "group", newest, len(runs), events))
    _drop_others(study.directory.glob("groups/*/*/events.out.tfevents.*.group"), written)


def _curves(study: Results, run: Outcome) -> Points:
    """Of one run, as lab.study.run.log names them: the training loss wherever that is told to TensorBoard, and what the
    run was asked, after its last step."""
    config = study.plan["config"]
    every = config.get("run", {}).get("log", {}).get("every", 1)
    found = {"train/loss_nats": {line["step"]: line["loss"] for line in run.metrics if not (line["step"] + 1) % every}}
    last = run.metrics[-1]["step"] + 1 if run.metrics else 0
    for row in run.rows():
        found[f"eval/loss_nats_{study.condition}_{row[study.condition]}"] = {last: row["loss"]}
    return found


def _joined(curves: Sequence[Points], over) -> Points:
    """One value of those that all curves have."""
    first, *others = curves
    return {
        tag: {
            step: over([curve[tag][step] for curve in curves])
            for step in points
            if all(step in curve.get(tag, {}) for curve in others)
        }
        for tag, points in first.items()
    }


def _scalars(curves: Points, wall_time: float) -> list[Event]:
    """In the order of their steps, after a mark that a server forgets what an earlier file had from there on."""
    steps: dict[int, list] = {}
    for tag, points in curves.items():
        for step, value in points.items():
            steps.setdefault(step, []).append(Summary.Value(tag=tag, simple_value=value))
    mark = Event(step=min(steps, default=0), wall_time=wall_time, session_log=SessionLog(status=SessionLog.START))
    return [mark] + [
        Event(step=step, wall_time=wall_time, summary=Summary(value=steps[step])) for step in sorted(steps)
    ]


def _newest(study: Results, runs: Iterable[Outcome]) -> float:
    """When the last of what was found of the runs was written, in seconds."""
    places = [study.directory / run.cell["directory"] / f"seed-{run.seed}" for run in runs]
    found = [path for place in places for path in (*place.glob("result.json"), *place.glob("evaluations/*.json"))]
    return max((path.stat().st_mtime for path in found), default=0.0)


def _write(directory: Path, kind: str, newest: float, done: int, events: Sequence[Event]) -> Path:
    """A file of events, named by the time of the newest result: the same results give the same bytes, and a server that
    follows the directory goes on to the file of newer ones."""
    content = io.BytesIO()
    writer = RecordWriter(content)
    for event in (Event(wall_time=newest, file_version="brain.Event:2"), *events):
        writer.write(event.SerializeToString())
    writer.flush()
    path = directory / f"events.out.tfevents.{int(newest):010d}.{done}.{kind}"
    return write_atomically(path, content.getvalue())


def _drop_others(there: Iterable[Path], written: Sequence[Path]) -> None:
    for path in there:
        if path not in written:
            path.unlink(missing_ok=True)


def _images(charts: Sequence[Chart], step: int, wall_time: float) -> Event:
    values = [image(f"report/{chart.name}", chart.content, chart.caption) for chart in charts]
    return Event(step=step, wall_time=wall_time, summary=Summary(value=values))


def image(name: str, png: bytes, caption: str) -> Summary.Value:
    """A picture for the IMAGES tab."""
    width, height = struct.unpack(">II", png[16:24])  # of its header
    parts = [str(width).encode(), str(height).encode(), png]
    content = tensor_pb2.TensorProto(dtype=types_pb2.DT_STRING, string_val=parts)
    content.tensor_shape.dim.add(size=len(parts))
    return Summary.Value(tag=name, metadata=image_metadata.create_summary_metadata(name, caption), tensor=content)
