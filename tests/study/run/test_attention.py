"""Which implementation of attention a study takes: found once for a machine, kept, and written into the study."""

import json
import os
import subprocess
import sys

import commands
import matrix
import pytest
import tiny
import variants
from studies import write, write_study

from lab import cluster, kernels, main, report, runtime
from lab.config import add_ask
from lab.errors import UserError
from lab.kernels import choice
from lab.study.define import cell
from lab.study.run import attention

CHOSEN = choice.Decision("reference", [choice.Tried("reference", "", {0: 1e-3, 1: 1e-4}, {"o": 1e-3})], "be warned")


@pytest.mark.parametrize("sink", [False, True])
def test_a_trace_tells_how_layers_call_attention(sink):
    config = variants.config("default", model__mixer__sink=sink)
    found, mixer = attention._calls(config, (2, 16), training=True), config.model.mixer
    assert len(found) == config.model.layers
    for call in found:
        assert call["q"] == (2, 16, mixer.heads, mixer.head_dim)
        assert call["k"] == call["v"] == (2, 16, mixer.kv_heads, mixer.head_dim)
        assert call["of_lse"] == sink and not call["biased"]
        assert call["frequencies"] == (config.model.position.dim or mixer.head_dim) // 2
    assert not any(call["of_lse"] for call in attention._calls(config, (2, 16), training=False))


def made(**overrides) -> cell.Cell:
    config = tiny.config(**overrides)
    config.data.update(text_length=8, texts_per_row=4, rows=4, draw="fixed4")
    config.evaluate.loss.update(branches=(2, 4), texts=32, texts_per_row=4, rows=4)
    return cell.Cell("one", {}, config)


def test_problems_of_a_study_are_counted_and_cut_to_a_device():
    one = made(model__layers=2, train__steps=10)
    training, asked = attention.of_study([one, one], devices=1)
    assert training.training and not asked.training
    assert (training.calls, asked.calls) == (20, 2 * 2 * 2)
    assert training.q[:2] == asked.q[:2] == (4, 32) and training.at[0].shape == (4, 32)
    training, _ = attention.of_study([one], devices=2)
    assert training.q[0] == training.k[0] == training.at[1].shape[0] == 2


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A host with a GPU, and a list of the trials that are made on it."""
    tried = []

    def choose(problems, names, say):
        tried.append(names)
        return CHOSEN

    monkeypatch.setenv("LAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(choice, "choose", choose)
    here = attention.Machine(["NVIDIA H100"], "580.1")
    monkeypatch.setattr(attention.Machine, "here", classmethod(lambda cls: here))
    return here, tried


def test_cells_that_drop_let_a_study_try_what_can_drop(machine, tmp_path):
    """Whatever was taken before they were added."""
    here, tried = machine
    cells = [made(), made(train__dropout__attention=0.1)]
    (tmp_path / "plan.json").write_text(json.dumps({"attention": {"name": "cudnn", "machine": here.described()}}))
    assert attention.decide(cells[0].config, cells[:1], tmp_path, print)["name"] == "cudnn" and not tried
    attention.decide(cells[0].config, cells, tmp_path, print)
    assert tried == [["tiled"]]


def test_it_is_tried_once_for_a_machine(machine, tmp_path):
    here, tried = machine
    one, said = made(), []
    decide = lambda workdir="a", **overrides: attention.decide(  # noqa: E731
        one.config, [made(**overrides)], tmp_path / workdir, said.append
    )
    found = decide()
    assert found["name"] == "reference" and found["machine"]["gpus"] == ["NVIDIA H100"]
    lacking = {one["name"]: one["refused"] for one in found["tried"] if one["name"] not in {"reference", "tiled"}}
    assert {*tried[0], *lacking} == {"tiled", "pallas_gpu", "pallas_triton", "cudnn", "tokamax"}
    assert all(kernels.lacks(name) == why for name, why in lacking.items()) and not {*tried[0]} & {*lacking}
    assert said[-1] == "attention: reference is taken; be warned" and any("1.000 ms" in line for line in said)
    assert decide("b") == found and len(tried) == 1  # of the cache
    here.driver = "590.2"
    assert decide()["machine"]["driver"] == "590.2" and len(tried) == 2
    decide(model__mixer__heads=2, model__mixer__kv_heads=2)
    assert len(tried) == 3  # other problems
    (path, *_) = sorted((tmp_path / "cache" / "attention").glob("*.json"), key=os.path.getmtime)[::-1]
    path.write_bytes(path.read_bytes()[:-9])
    decide(model__mixer__heads=2, model__mixer__kv_heads=2)
    assert len(tried) == 4


def test_a_study_goes_on_with_its_own(machine, tmp_path):
    here, tried = machine
    one, said = made(), []
    there = {"name": "tiled", "machine": here.described(), "tried": [], "warning": ""}
    (tmp_path / "plan.json").write_text(json.dumps({"attention": there}))
    decide = lambda: attention.decide(one.config, [one], tmp_path, said.append)  # noqa: E731
    assert decide()["name"] == "tiled" and not tried
    here.names = ["NVIDIA A100"]
    assert decide()["name"] == "reference" and len(tried) == 1
    assert said[-1] == "attention: tiled was taken on another machine; runs go on here in a new segment"


def test_a_name_and_a_host_without_a_gpu_try_nothing(machine, monkeypatch, tmp_path):
    one = made(run__implementation="tiled")
    assert attention.decide(one.config, [one], tmp_path, print) is None
    monkeypatch.setattr(attention.Machine, "here", classmethod(lambda cls: None))
    assert attention.decide(made().config, [made()], tmp_path, print) is None and not machine[1]


def test_a_cache_that_cannot_be_written_costs_a_trial_each_time(machine, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LAB_CACHE", str(tmp_path / "file" / "below"))
    for _ in range(2):
        assert attention.decide(made().config, [made()], tmp_path, print)["name"] == "reference"
    assert len(machine[1]) == 2


class Client:
    """What hosts tell each other."""

    def __init__(self):
        self.told = {}

    def key_value_set(self, key, value):
        self.told[key] = value

    def blocking_key_value_get(self, key, wait):
        return self.told[key]


def test_the_first_of_several_hosts_tries_and_the_others_take_its_answer(machine, monkeypatch, tmp_path):
    here, tried = machine
    state = attention.distributed.global_state
    monkeypatch.setattr(state, "client", Client())
    monkeypatch.setattr(state, "num_processes", 2)
    decide = lambda: attention.decide(made().config, [made()], tmp_path, print)  # noqa: E731
    found = decide()
    monkeypatch.setattr(state, "process_id", 1)
    assert decide() == found and len(tried) == 1
    here.driver = "590.2"
    with pytest.raises(UserError, match="the hosts differ in GPUs, drivers or code"):
        decide()
    monkeypatch.setattr(attention.Machine, "here", classmethod(lambda cls: None))
    with pytest.raises(UserError, match="the hosts differ in GPUs, drivers or code"):
        decide()


def test_the_report_says_what_was_tried(tmp_path):
    work = write_study(tmp_path, counts=(1, 2))
    tried = [
        {"name": "cudnn", "refused": "", "seconds": [0.0012, 0.0034], "errors": {}, "same": False, "sums": None},
        {"name": "pallas_gpu", "refused": "wrong: o is off by 2.0e-01 on 0", "seconds": [], "errors": {}, "same": True},
    ]
    plan = json.loads((work / "plan.json").read_text())
    write(
        work / "plan.json",
        plan | {"attention": {"name": "cudnn", "warning": "be warned", "machine": {}, "tried": tried}},
    )
    report.rebuild(work)
    text = (work / "report.md").read_text()
    assert "Attention: be warned." in text and "| cudnn | 1.200 3.400 | no | taken |" in text
    assert "| pallas_gpu | — | yes | wrong: o is off by 2.0e-01 on 0 |" in text


@pytest.mark.parametrize(("platforms", "code", "out", "found"), [
    ("", 0, "NVIDIA H100, 580.1\nNVIDIA H100, 580.1\n", 2), ("cuda,cpu", 0, "NVIDIA L4, 580.1\n", 1),
    ("cpu", 0, "NVIDIA H100, 580.1\n", None), ("", 9, "NVIDIA-SMI has failed, no driver\n", None), ("", 0, "", None),
])  # fmt: skip
def test_the_machine_is_known_by_its_driver(monkeypatch, platforms, code, out, found):
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: name)
    ran = subprocess.CompletedProcess([], code, out, "")
    monkeypatch.setattr(attention.subprocess, "run", lambda *_, **__: ran)
    here = attention.Machine.here()
    assert (here and len(here.names)) == found


@pytest.mark.slow
def test_the_choice_stands_in_the_plan_and_in_the_segments(machine, monkeypatch, tmp_path):
    monkeypatch.setattr(runtime, "start", lambda config: cluster.Cluster())
    monkeypatch.setattr(runtime, "stop_requests", lambda: lambda step: False)
    corpus = commands.write_corpus(tmp_path / "corpus.jsonl")
    study = commands.write_study(tmp_path / "study.py", corpus, cells=commands.ONE_CELL, sections=("curves",), steps=8)
    sizes = ["--config.data.rows=8", "--config.evaluate.loss.rows=8", "--config.evaluate.loss.texts=32"]
    work = tmp_path / "work"
    assert main.main([f"--config={study}", f"--workdir={work}", *sizes]) == 0
    plan = json.loads((work / "plan.json").read_text())
    assert plan["attention"]["name"] == plan["config"]["run"]["implementation"] == "reference"
    (run,) = commands.runs(work).values()
    assert [one["implementation"] for one in json.loads((run / "segments.json").read_text())["segments"]] == [
        "reference"
    ]


PROBE = """
import sys
from lab import runtime
runtime.tune_allocator()
from jax._src import xla_bridge
from lab.command import load_config
from lab.study.open import open
from lab.study.run import attention
for path in sys.argv[1:]:
    study = open(load_config(path))
    problems = attention.of_study(study.cells[:1], 1)
    assert not xla_bridge.backends_are_initialized(), path
    print(path, len(problems))
"""


@pytest.mark.slow
def test_no_device_is_held_before_it_is_decided(request):
    configs = matrix.some(sorted((commands.REPOSITORY / "configs").glob("*.py")), 6, request.config)
    command = [sys.executable, "-c", PROBE, *map(str, configs)]
    run = subprocess.run(command, cwd=commands.REPOSITORY, capture_output=True, text=True)
    assert not run.returncode and len(run.stdout.splitlines()) == len(configs), run.stderr


@pytest.mark.slow
def test_the_command_prints_the_table(tmp_path):
    corpus = commands.write_corpus(tmp_path / "corpus.jsonl")
    study = commands.write_study(tmp_path / "study.py", corpus, cells=commands.ONE_CELL)
    command = [sys.executable, "-m", "lab.kernels.trial", f"--config={study}"]
    run = subprocess.run(command, cwd=commands.REPOSITORY, capture_output=True, text=True)
    lines = run.stdout.splitlines()
    assert not run.returncode and not run.stderr, run.stderr
    assert lines[0].startswith("attention: trying tiled (1 of 2)")
    assert sum(line.startswith("attention, problem") for line in lines) == 2
    assert sum(" ms" in line for line in lines) == 4 and lines[-1].endswith("is taken")


def test_hosts_without_a_gpu_agree_and_one_beside_a_first_without_is_refused(machine, monkeypatch, tmp_path):
    state, here = attention.distributed.global_state, attention.Machine.here
    monkeypatch.setattr(state, "client", Client())
    monkeypatch.setattr(attention.Machine, "here", classmethod(lambda cls: None))
    decide = lambda: attention.decide(made().config, [made()], tmp_path, print)  # noqa: E731
    assert decide() is None
    monkeypatch.setattr(state, "process_id", 1)
    assert decide() is None
    monkeypatch.setattr(attention.Machine, "here", here)
    with pytest.raises(UserError, match="the hosts differ in GPUs, drivers or code"):
        decide()


def test_an_ask_that_adds_to_scores_counts_when_an_implementation_is_chosen():
    plain, asking = made(), made()
    add_ask(asking.config, "far", model=(("position.name", "alibi"),), branches=(1,), texts_per_row=4)
    asking.config.model.position.update(dict(theta=1e4, ratio=0.0, stride=128))
    every = [*kernels.IMPLEMENTATIONS]
    assert attention._able([plain], every) == every and "cudnn" not in attention._able([plain, asking], every)
