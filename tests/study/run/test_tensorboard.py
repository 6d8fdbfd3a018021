"""Event files as TensorBoard itself reads them back."""

import contextlib
import dataclasses
import functools
import io
import json
import os
import pathlib
import random
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request

import matplotlib.image
import numpy as np
import pytest
from studies import write_run, write_study
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams import api_pb2, backend_context, get_experiment, list_session_groups
from tensorboard.plugins.hparams.metadata import PLUGIN_NAME, SESSION_END_INFO_TAG, parse_session_end_info_plugin_data

from lab import report
from lab.study import results
from lab.study.report import tensorboard
from lab.study.run.events import Writer, describe

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
        writer.hparams({"rope_ratio": ratio, "train_branch": draw, "seed": 0}, {"eval/loss_nats_1": loss}, 100)
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
    writer.close()
    again = Writer(tmp_path / "cell")  # as a later command that only asks
    again.hparams({"rope_ratio": 1.0}, {"eval/loss_nats_1": 2.0}, 10)
    again.close()
    content = read(tmp_path).SummaryMetadata("cell", SESSION_END_INFO_TAG).plugin_data
    assert content.plugin_name == PLUGIN_NAME
    assert parse_session_end_info_plugin_data(content.content).status == api_pb2.STATUS_SUCCESS
    assert points(tmp_path, "cell") == {10: 3.0}
    assert points(tmp_path, "cell", "eval/loss_nats_1") == {10: 2.0}


def test_config_and_its_differences_are_text(tmp_path):
    config = {"model": {"dim": 96, "position": {"ratio": 1.0}}, "study": {"name": "x"}}
    described = describe(config, config | {"model": {"dim": 96, "position": {"ratio": 0.5}}})
    assert "| model.position.ratio | 1.0 | 0.5 |" in described and "    model.dim = 96" in described
    assert "| model.dim" not in described and "study.name" not in described
    assert describe(config, config).startswith("The same as") and describe(config, None).startswith("No baseline")
    writer = Writer(tmp_path / "cell")
    writer.text("config", described)
    writer.scalars(10, {LOSS: 1.0})
    writer.close()
    (event,) = read(tmp_path).Tensors("cell", "config")
    assert event.tensor_proto.string_val[0].decode() == described
    assert points(tmp_path, "cell") == {10: 1.0}


@pytest.mark.slow
def test_figures_of_the_report_are_images_and_the_newest_replace_the_others(tmp_path):
    write_study(tmp_path, counts=(1, 16), seeds=2, skip={("rope_ratio=1.0,train_branch=1-15", 1)})
    report.rebuild(tmp_path)
    (first,) = (tmp_path / "tensorboard").iterdir()
    (event,) = read(tmp_path).Tensors("tensorboard", "report/learning_curves")
    width, height, image = event.tensor_proto.string_val
    assert image == (tmp_path / "figures" / "learning_curves.png").read_bytes() and event.step == 19
    assert matplotlib.image.imread(io.BytesIO(image)).shape[:2] == (int(height), int(width))
    write_run(tmp_path, results.collect(tmp_path).plan["cells"][-1], 1, counts=(1, 16))
    report.rebuild(tmp_path)
    (second,) = (tmp_path / "tensorboard").iterdir()
    assert second.name > first.name  # a server reads files of a directory in order


CELL = "rope_ratio=1.0,train_branch=1-15"
OVER_SEEDS = {"mean": np.mean, "low": np.min, "high": np.max}


def over_seeds(directory, over, tag=LOSS):
    """What a group of the cell must show, from the files of its finished runs."""
    (cell,) = directory.glob(f"cells/{CELL}-*")
    found = {}
    for run in cell.glob("seed-*"):
        if (run / "result.json").exists():
            if tag == LOSS:
                losses = {line["step"]: line["loss"] for line in results.metrics(run)}
            else:
                (path,) = run.glob("evaluations/*.json")
                rows = json.loads(path.read_text())["conditions"]
                (loss,) = (row["loss"] for row in rows if tag.endswith(f"_{row['eval_branch']}"))
                losses = {251: loss}
            for step, loss in losses.items():
                found.setdefault(step, []).append(loss)
    return {step: over(losses) for step, losses in found.items()}


def test_a_cell_over_its_seeds_is_three_runs_that_follow_the_seeds(tmp_path):
    def noise(labels, seed):
        return (0.3, 0.0, 0.9, 0.5)[seed]  # the last is neither the lowest nor the highest

    values, pending = {"rope_ratio": [1.0], "train_branch": ["1-15"]}, {(CELL, seed) for seed in range(4)}
    write_study(tmp_path, values, counts=(1, 16), seeds=4, noise=noise, skip=pending)
    (cell,) = results.collect(tmp_path).plan["cells"]
    place = f"groups/{pathlib.Path(cell['directory']).name}"
    for seed in range(4):
        write_run(tmp_path, cell, seed, counts=(1, 16), noise=noise)
        for _ in range(2):  # as often as it likes
            tensorboard.write_groups(results.collect(tmp_path))
        assert (tmp_path / place).exists() == (seed > 0)  # one seed has no band
        shown = read(tmp_path)
        for name, over in OVER_SEEDS.items() if seed else ():
            for tag in (LOSS, "eval/loss_nats_eval_branch_1", "eval/loss_nats_eval_branch_16"):
                events, wanted = shown.Tensors(f"{place}/{name}", tag), over_seeds(tmp_path, over, tag)
                assert [event.step for event in events] == sorted(wanted)  # each once
                found = {event.step: float(event.tensor_proto.float_val[0]) for event in events}
                assert found == pytest.approx(wanted, rel=1e-6)
            assert len([*(tmp_path / place / name).iterdir()]) == 1


def test_groups_of_cells_that_the_study_has_no_more_go(tmp_path):
    study = results.collect(write_study(tmp_path, counts=(1,), seeds=2))
    tensorboard.write_groups(study)
    assert len([*tmp_path.glob("groups/*/mean/*")]) == 10
    tensorboard.write_groups(dataclasses.replace(study, plan=study.plan | {"cells": study.plan["cells"][2:]}))
    assert len([*tmp_path.glob("groups/*/mean/*")]) == 8


@pytest.mark.slow
def test_the_server_shows_scalars_hparams_configs_and_figures(tmp_path):
    """The real server, opened as a user opens it, asked over HTTP what its page asks."""
    directory = write_study(tmp_path / "study", counts=(1, 16), seeds=3, noise=lambda labels, seed: 0.1 * seed**2)
    report.rebuild(directory)
    config = {"model": {"dim": 96}}
    for ratio, loss in ((0.5, 2.5), (1.0, 2.0)):
        writer = Writer(directory / "cells" / f"{ratio}" / "seed-0" / "tensorboard")
        writer.text("config", describe(config, None))
        writer.scalars(100, {LOSS: 3.0 + ratio})
        writer.hparams({"rope_ratio": ratio, "seed": 0}, {"eval/loss_nats_1": loss}, 10)
        writer.close()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = pathlib.Path(__file__).parents[3] / "launch" / "tensorboard.sh"
    environment = os.environ | {"PORT": str(port), "PYTHON": sys.executable}
    server = subprocess.Popen(
        [script, directory], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        ask = functools.partial(_ask, f"http://127.0.0.1:{port}/data/plugin/")
        run = "cells/1.0/seed-0/tensorboard"
        _wait(lambda: LOSS in ask("scalars/tags").get(run, {}) and "tensorboard" in ask("images/tags"))
        ((_, step, value),) = ask(f"scalars/scalars?run={urllib.parse.quote(run)}&tag={urllib.parse.quote(LOSS)}")
        assert (step, value) == (100, 4.0)
        body = {
            "startIndex": 0,
            "sliceSize": 10,
            "allowedStatuses": ["STATUS_SUCCESS"],
            "colParams": [{"hparam": "rope_ratio", "includeInResult": True}],
        }
        groups = ask("hparams/session_groups", body)["sessionGroups"]
        found = {group["hparams"]["rope_ratio"]: group["metricValues"][0]["value"] for group in groups}
        assert found == {0.5: 2.5, 1.0: 2.0}
        assert "report/learning_curves" in ask("images/tags")["tensorboard"]
        assert ask("text/tags")[run] == ["config"]
        (group,) = directory.glob(f"groups/{CELL}-*")
        for name, over in OVER_SEEDS.items():
            run = f"groups/{group.name}/{name}"
            for tag in (LOSS, "eval/loss_nats_eval_branch_16"):
                assert tag in ask("scalars/tags")[run]
                shown = ask(f"scalars/scalars?run={urllib.parse.quote(run)}&tag={urllib.parse.quote(tag)}")
                wanted = over_seeds(directory, over, tag)
                assert {step: value for _, step, value in shown} == pytest.approx(wanted, rel=1e-6)
                assert len(shown) == len(wanted)
    finally:
        server.terminate()
        server.wait(30)


def test_the_script_refuses_a_directory_that_is_not_there():
    script = pathlib.Path(__file__).parents[3] / "launch" / "tensorboard.sh"
    done = subprocess.run([script, "runs/none"], capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "runs/none" in done.stderr


def _ask(address, path, body=None):
    data = json.dumps(body).encode() if body else None
    request = urllib.request.Request(address + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.loads(answer.read())


def _wait(ready, seconds=90):
    for _ in range(2 * seconds):
        with contextlib.suppress(OSError, json.JSONDecodeError):
            if ready():
                return
        time.sleep(0.5)
    raise AssertionError(f"the server did not show the runs within {seconds} s")
