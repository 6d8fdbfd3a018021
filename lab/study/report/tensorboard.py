"""The figures of a report as TensorBoard events, without TensorFlow."""

import io
import struct
from collections.abc import Sequence

from tensorboard.compat.proto import tensor_pb2, types_pb2
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.image import metadata as image_metadata
from tensorboard.summary.writer.record_writer import RecordWriter

from lab.storage import write_atomically
from lab.study.report.page import Chart
from lab.study.results import Results


def write_figures(study: Results, charts: Sequence[Chart]) -> None:
    """The report's figures as images of a run of their own, at the step of how many runs are done.

    The file is named by the time of the newest result: the same results give the same bytes, and a server that
    follows the directory goes on to the file of newer ones.
    """
    places = [study.directory / run.cell["directory"] / f"seed-{run.seed}" for run in study.runs]
    found = [path for place in places for path in (*place.glob("result.json"), *place.glob("evaluations/*.json"))]
    newest, content = max((path.stat().st_mtime for path in found), default=0.0), io.BytesIO()
    done = sum(run.status == "done" for run in study.runs)
    events = RecordWriter(content)
    for event in (Event(wall_time=newest, file_version="brain.Event:2"), _images(charts, done, newest)):
        events.write(event.SerializeToString())
    events.flush()
    path = study.directory / "tensorboard" / f"events.out.tfevents.{int(newest):010d}.{done}.report"
    write_atomically(path, content.getvalue())
    for other in path.parent.glob("events.out.tfevents.*.report"):
        if other != path:
            other.unlink(missing_ok=True)


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
