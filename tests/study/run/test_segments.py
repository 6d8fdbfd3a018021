"""The segments of a run: when one begins, what it says, and that unlike ones are never paired."""

import pytest
import tiny

from lab import kernels
from lab.model import mesh as lab_mesh
from lab.study.judge.pairing import Score, mismatch
from lab.study.results import Outcome
from lab.study.run import segments

HERE = {"implementation": "tiled", "mesh": {"data": 2}, "device_kind": "cpu"}
THERE = HERE | {"device_kind": "NVIDIA H100"}


def begun(directory):
    return [(one["first_step"], one["device_kind"]) for one in segments.read(directory)]


def test_a_segment_begins_where_a_run_goes_on_in_another_way(tmp_path):
    assert segments.read(tmp_path) == []
    assert segments.begin(tmp_path, 0, HERE) == ""
    assert segments.begin(tmp_path, 50, HERE) == "" and begun(tmp_path) == [(0, "cpu")]
    told = segments.begin(tmp_path, 60, THERE)
    assert "from step 60" in told and "device_kind cpu -> NVIDIA H100" in told
    assert begun(tmp_path) == [(0, "cpu"), (60, "NVIDIA H100")]


def test_steps_that_are_made_again_belong_to_the_segment_that_makes_them(tmp_path):
    segments.begin(tmp_path, 0, HERE)
    segments.begin(tmp_path, 60, THERE)
    assert segments.begin(tmp_path, 40, HERE) == "" and begun(tmp_path) == [(0, "cpu")]
    assert segments.begin(tmp_path, 0, THERE) == "" and begun(tmp_path) == [(0, "NVIDIA H100")]


def test_a_segment_says_how_and_on_what_its_steps_are_made(devices):
    config = tiny.config(run__implementation="auto", run__mesh__fsdp=2, run__remat="full")
    way = segments.way(config, lab_mesh.make(config.run.mesh), 3)
    assert way["implementation"] == "tiled" and way["mesh"] == dict(data=4, fsdp=2, tensor=1, context=1)
    assert way["remat"] == "full" and way["vmapped"] == 3 and way["device_kind"] == devices[0].device_kind
    assert {"jax", "flax", "optax", "scan", "microbatches"} <= {*way}
    assert not {"workers", "checkpoint.every", "log.every"} & {*way}  # these round nothing


def test_a_segment_names_what_took_the_place_of_one_that_adds_no_bias(monkeypatch):
    monkeypatch.setitem(kernels.AUTO, "cpu", ("pallas_triton", 2**20))
    for name, taken in (("rope2d", "pallas_triton"), ("t5", "tiled")):
        config = tiny.config(model__position__name=name)
        assert segments.way(config, lab_mesh.make(config.run.mesh), 1)["implementation"] == taken


@pytest.mark.parametrize(("other", "told"), [
    ([(0, HERE)], ""),
    ([(0, THERE)], "device_kind from step 0 on: cpu and NVIDIA H100"),
    ([(0, HERE), (60, THERE)], "segments from steps 0 and 0, 60"),
])  # fmt: skip
def test_runs_of_unlike_segments_are_refused_with_the_command_that_remakes_one(other, told):
    def score(made):
        result = {"environment": {}, "text_hash": "a", "segments": [{"first_step": s, **way} for s, way in made]}
        cell = {"name": "b", "directory": "cells/b-12"}
        return Score(Outcome(cell, 3, result, None, [], {}), 1.0, (1,))

    found = mismatch(score([(0, HERE)]), score(other))
    assert found == (
        f"{told}; to make it again: rm -r cells/b-12/seed-3 in the study's directory, and the study's command"
        if told
        else ""
    )
