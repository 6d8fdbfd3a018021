"""Event files as TensorBoard itself reads them back."""

import random

import pytest
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams import api_pb2, backend_context, get_experiment, list_session_groups
from tensorboard.plugins.hparams.metadata import PLUGIN_NAME, SESSION_END_INFO_TAG, parse_session_end_info_plugin_data

from lab.study.tensorboard import Writer

LOSS = "train/loss_nats"


def read(directory):
    multiplexer = EventMultiplexer(purge_orphaned_data=True)
    multiplexer.AddRunsFromDirectory(str(directory))
    multiplexer.Reload()
    return multiplexer


def points(directory, run, tag=LOSS):
    return {event.step: float(event.tensor_proto.float_val[0]) for event in read(directory).Tensors(run, tag)}


def test_scalars_come_back_at_their_steps(tmp_path):
    values = {step: random.uniform(0, 5) for step in range(10, 60, 10)}
    writer = Writer(tmp_path / "cell")
    for step, value in values.items():
        writer.scalars(step, {LOSS: value, "train/fill": 0.5})
    writer.close()
    assert points(tmp_path, "cell") == pytest.approx(values, rel=1e-6)
    assert set(points(tmp_path, "cell", "train/fill")) == set(values)


@pytest.mark.parametrize("torn", [0, 5], ids=["whole", "torn"])
def test_a_resumed_run_shows_each_step_once_with_its_second_value(tmp_path, torn):
    """Killed after step 50, with the last record possibly half written, and continued from the checkpoint at 20."""
    first = Writer(tmp_path / "cell")
    for step in range(10, 60, 10):
        first.scalars(step, {LOSS: float(step)})
    first.close()
    path = next((tmp_path / "cell").iterdir())
    path.write_bytes(path.read_bytes()[: -torn or None])
    second = Writer(tmp_path / "cell")
    for step in (30, 40):
        second.scalars(step, {LOSS: -float(step)})
    second.close()
    events = read(tmp_path).Tensors("cell", LOSS)
    assert [event.step for event in events] == [10, 20, 30, 40]
    assert points(tmp_path, "cell") == {10: 10.0, 20: 20.0, 30: -30.0, 40: -40.0}


def test_hparams_tab_compares_the_cells(tmp_path):
    for ratio, draw, loss in ((0.5, "1-15", 2.5), (1.0, "fixed1", 2.0)):
        writer = Writer(tmp_path / "cells" / f"{ratio}" / "seed-0" / "tensorboard")
        writer.scalars(100, {LOSS: 3.0})
        writer.hparams({"rope_ratio": ratio, "train_branch": draw, "seed": 0}, {"eval/loss_nats_1": loss})
        writer.close()
    provider = MultiplexerDataProvider(read(tmp_path), str(tmp_path))
    context = backend_context.Context(TBContext(data_provider=provider))
    request = RequestContext()
    experiment = get_experiment.Handler(request, context, "", api_pb2.GetExperimentRequest()).run()
    kinds = {"rope_ratio": api_pb2.DATA_TYPE_FLOAT64, "seed": api_pb2.DATA_TYPE_FLOAT64}
    kinds |= {"train_branch": api_pb2.DATA_TYPE_STRING}
    assert {info.name: info.type for info in experiment.hparam_infos} == kinds
    assert [info.name.tag for info in experiment.metric_infos] == ["eval/loss_nats_1"]
    wanted = api_pb2.ListSessionGroupsRequest(
        start_index=0,
        slice_size=10,
        allowed_statuses=[api_pb2.STATUS_SUCCESS],
        col_params=[api_pb2.ColParams(metric=api_pb2.MetricName(tag="eval/loss_nats_1"))],
        include_metrics=True,
    )
    groups = list_session_groups.Handler(request, context, "", wanted).run().session_groups
    found = {
        (group.hparams["rope_ratio"].number_value, group.hparams["train_branch"].string_value): group.metric_values[
            0
        ].value
        for group in groups
    }
    assert found == {(0.5, "1-15"): 2.5, (1.0, "fixed1"): 2.0}


def test_finished_runs_are_marked_successful_and_keep_their_curves(tmp_path):
    writer = Writer(tmp_path / "cell")
    writer.scalars(10, {LOSS: 3.0})
    writer.hparams({"rope_ratio": 1.0}, {"eval/loss_nats_1": 2.0})
    writer.close()
    content = read(tmp_path).SummaryMetadata("cell", SESSION_END_INFO_TAG).plugin_data
    assert content.plugin_name == PLUGIN_NAME
    assert parse_session_end_info_plugin_data(content.content).status == api_pb2.STATUS_SUCCESS
    assert points(tmp_path, "cell") == {10: 3.0}
    assert points(tmp_path, "cell", "eval/loss_nats_1") == {10: 2.0}
