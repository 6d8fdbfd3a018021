"""TensorBoard event files of a run, without TensorFlow: its scalars, config, pictures and row among the HPARAMS."""

import time
from collections.abc import Mapping
from pathlib import Path

from tensorboard.compat.proto import tensor_pb2, types_pb2
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import api_pb2 as api
from tensorboard.plugins.hparams import metadata
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo
from tensorboard.plugins.hparams.summary_v2 import hparams_pb
from tensorboard.plugins.text import metadata as text_metadata
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from lab.options import leaves
from lab.study.report import page
from lab.study.report.layout import differences
from lab.study.report.tensorboard import image


class Writer:
    """Writes one run into `directory`. Reopened, it continues: its first step replaces what was written from there."""

    def __init__(self, directory: str | Path):
        self._file = EventFileWriter(str(directory))
        self._step = None

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Adds one point at `step` to the curve of each name."""
        if self._step is None:
            # A run killed after its last checkpoint has logged steps that are now taken again.
            self._add(step, session_log=SessionLog(status=SessionLog.START))
        self._step = step
        self._add(step, summary=_scalars(values))

    def hparams(self, labels: Mapping[str, bool | float | str], metrics: Mapping[str, float], step: int) -> None:
        """Marks the run as finished at `step`, with `metrics` under the hyperparameters `labels`.

        Nothing that was written from that step is replaced: curves stay whole where a run is asked again."""
        labels = {name: _plain(value) for name, value in labels.items()}
        for summary in (_experiment(labels, metrics), hparams_pb(labels), _session_end()):
            self._add(0, summary=summary)
        self._add(step, summary=_scalars(metrics))

    def text(self, name: str, markdown: str) -> None:
        """Shows Markdown under `name` in the TEXT tab."""
        content = tensor_pb2.TensorProto(dtype=types_pb2.DT_STRING, string_val=[markdown.encode()])
        value = Summary.Value(tag=name, metadata=text_metadata.create_summary_metadata(name, ""), tensor=content)
        self._add(0, summary=Summary(value=[value]))

    def image(self, name: str, png: bytes, caption: str) -> None:
        """Shows a picture under `name` in the IMAGES tab, at the last step."""
        self._add(self._step or 0, summary=Summary(value=[image(name, png, caption)]))

    def close(self) -> None:
        """Flushes and closes the file."""
        self._file.close()

    def _add(self, step: int, **content) -> None:
        self._file.add_event(Event(step=step, wall_time=time.time(), **content))


def describe(config: Mapping, baseline: Mapping | None) -> str:
    """A run's config as Markdown: what it changes of its baseline's (None: it has none), then every field."""
    changed = differences(config, baseline) if baseline else {}
    rows = [f"| {field} | {page.cell(ours)} | {page.cell(theirs)} |" for field, (ours, theirs) in changed.items()]
    head = ["| field | here | baseline |", "| --- | --- | --- |"]
    intro = [*head, *rows] if rows else ["The same as its baseline." if baseline else "No baseline."]
    every = [f"    {field} = {value!r}" for field, value in leaves(config).items() if not field.startswith("study.")]
    return "\n".join([*intro, "", "Every field:", "", *every])


def _scalars(values: Mapping[str, float]) -> Summary:
    return Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()])


def _experiment(labels: Mapping, metrics: Mapping) -> Summary:
    """The columns of the HPARAMS tab: the same from every run, so it does not matter which one is read."""
    hparams = [api.HParamInfo(name=name, type=_type(value)) for name, value in labels.items()]
    infos = [api.MetricInfo(name=api.MetricName(tag=name)) for name in metrics]
    experiment = api.Experiment(hparam_infos=hparams, metric_infos=infos)
    return _plugin(metadata.EXPERIMENT_TAG, HParamsPluginData(experiment=experiment))


def _plain(value) -> bool | float | str:
    """What the tab can hold: tuples and the like as text."""
    return value if isinstance(value, bool | int | float | str) else str(value)


def _type(value: bool | float | str) -> int:
    if isinstance(value, bool):
        return api.DATA_TYPE_BOOL
    return api.DATA_TYPE_STRING if isinstance(value, str) else api.DATA_TYPE_FLOAT64


def _session_end() -> Summary:
    end = SessionEndInfo(status=api.STATUS_SUCCESS, end_time_secs=time.time())
    return _plugin(metadata.SESSION_END_INFO_TAG, HParamsPluginData(session_end_info=end))


def _plugin(tag: str, data: HParamsPluginData) -> Summary:
    content = metadata.create_summary_metadata(data)
    return Summary(value=[Summary.Value(tag=tag, metadata=content, tensor=metadata.NULL_TENSOR)])
