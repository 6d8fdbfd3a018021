"""The whole lab once, on every supported Python and JAX: a study from its config to its report, and its model back."""

import csv
import html.parser
import json
from urllib.parse import unquote

import commands
import compiling
import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import lab
from lab import data as lab_data
from lab.data.pipeline import evaluation_batches
from lab.errors import UserError
from lab.kernels import rules
from lab.train import step

pytestmark = pytest.mark.smoke
STEPS = 12
CELLS = 'product(vary("model.position.ratio", (0.0, 1.0)), vary("data.draw", ("1-3",)))'


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """The directory of a study of two cells that has run."""
    place = tmp_path_factory.mktemp("smoke")
    study = commands.write_study(place / "tiny.py", commands.write_corpus(place / "corpus.jsonl"), CELLS, steps=STEPS)
    run = commands.finished(
        "main", f"--config={study}", f"--workdir={place / 'runs'}", log=place / "log", **compiling.USUAL
    )
    assert run.err == ""
    assert "compiled: train_step 1 (" in run.out and "evaluation_step 1 (" in run.out
    assert "2 of 2 runs done, 0 failed" in run.out
    return place / "runs"


def rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_results_hold_every_cell_and_condition(work):
    found = rows(work / "results.csv")
    assert [(float(row["rope_ratio"]), int(row["eval_branch"])) for row in found] == [
        (ratio, count) for ratio in (0.0, 1.0) for count in (1, 2, 4)
    ]
    for row in found:
        assert 0 < float(row["loss"]) < 2 * np.log(258)
        np.testing.assert_allclose(float(row["ppl"]), np.exp(float(row["loss"])), rtol=1e-12)


def test_timings_hold_every_phase(work):
    found = rows(work / "timings.csv")
    assert [row["phase"] for row in found] == 2 * ["train", "eval", "eval", "eval"]
    for row in found:
        assert float(row["seconds"]) > 0 and float(row["tokens_per_second"]) > 0 and float(row["peak_bytes"]) > 0
        assert row["phase"] == "eval" or 0 <= float(row["overhead_share"]) <= 1


def test_every_step_is_logged_once(work):
    runs = commands.runs(work)
    assert len(runs) == 2
    for run in runs.values():
        logged = commands.metrics(run)
        assert [line["step"] for line in logged] == list(range(STEPS))
        assert all(np.isfinite(line["loss"]) and 0 < line["fill"] <= 1 for line in logged)
    hashes = [[line["text_hash"] for line in commands.metrics(run)] for run in runs.values()]
    assert hashes[0] == hashes[1] and len(set(hashes[0])) == STEPS


def test_the_page_is_self_contained(work):
    class Page(html.parser.HTMLParser):
        pictures, other = 0, ()

        def handle_starttag(self, tag, attributes):
            for name, value in attributes:
                if name in ("src", "href") and not value.startswith("#"):
                    embedded = value.startswith("data:image/png;base64,")
                    self.pictures, self.other = self.pictures + embedded, self.other + (value,) * (not embedded)

    page = Page()
    page.feed((work / "report.html").read_text())
    assert page.pictures >= 4 and len(page.other) == 2  # cells: each has its page
    assert all((work / unquote(link)).is_file() for link in page.other)
    assert len(list((work / "figures").glob("*.png"))) >= 4 and (work / "report.md").stat().st_size > 500


def test_tensorboard_shows_the_curve_and_the_comparison(work):
    for run in commands.runs(work).values():
        events = EventAccumulator(str(run / "tensorboard")).Reload()
        losses = {line["step"]: line["loss"] for line in commands.metrics(run)}
        points = {point.step: point.value for point in events.Scalars("train/loss_nats")}
        assert points == {9: np.float32(losses[9])}  # log.every = 10
        assert "eval/loss_nats_eval_branch_4" in events.Tags()["scalars"]


def test_a_finished_cell_gives_its_model_back(work):
    """The loaded model has, on the texts that the config names, the loss that the run recorded."""
    cell = sorted(work.glob("cells/*"))[-1]
    model, tokenizer = lab.load(cell)
    config = ConfigDict(json.loads((cell / "config.json").read_text()))
    texts = lab_data.open(config).validation
    (asked,) = (json.loads(path.read_text()) for path in (cell / "seed-0").glob("evaluations/loss-*.json"))
    evaluate = jax.jit(step.evaluation_step)
    for condition in asked["conditions"]:
        batches = evaluation_batches(config, config.evaluate.loss, texts, condition["eval_branch"])
        parts = [evaluate(model, batch) for batch in batches]
        nats, right, tokens = (sum(map(float, part)) for part in zip(*parts, strict=True))
        assert tokens == condition["tokens"] and right / tokens == condition["accuracy"]
        np.testing.assert_allclose(nats / tokens, condition["loss"], rtol=1e-5)
    assert tokenizer.decode(tokenizer.encode("an ordinary text")) == "an ordinary text"


def test_the_newest_checkpoint_is_loaded_unless_another_is_named(work):
    run = next(iter(commands.runs(work).values()))
    saved = commands.steps_saved(run)
    assert len(saved) == 2 and saved[-1] == STEPS
    tokens = lab.load(run)[1].encode("rest of the story")[None]
    newest, first, last = (
        np.asarray(lab.load(path)[0](tokens)) for path in (run, *(run / "checkpoints" / str(n) for n in saved))
    )
    np.testing.assert_array_equal(newest, last)
    assert np.abs(newest - first).max() > 1e-3


def test_load_refuses_what_is_no_cell(work, tmp_path):
    with pytest.raises(UserError, match="is in no cell"):
        lab.load(tmp_path)
    with pytest.raises(UserError, match="has no checkpoint 7; there are"):
        lab.load(next(iter(commands.runs(work).values())) / "checkpoints" / "7")


def test_fields_are_laid_over_a_loaded_model(work):
    cell = sorted(work.glob("cells/*"))[-1]
    (as_it_was, _), (model, _) = (lab.load(cell, model=over) for over in ((), (("rule", "own_branch"),)))
    assert as_it_was.blocks[0].mixer.rule != model.blocks[0].mixer.rule == rules.own_branch
    jax.tree.map(np.testing.assert_array_equal, *(jax.tree.leaves(each) for each in (as_it_was, model)))
    with pytest.raises(UserError, match=r"load\.model: model\.rule = 'none' is unknown"):
        lab.load(cell, model=(("rule", "none"),))


def test_running_again_runs_nothing(work):
    before = {path: path.read_bytes() for path in work.glob("cells/*/*/result.json")}
    results = (work / "results.csv").read_bytes()
    run = commands.finished(
        "main", f"--config={work.parent / 'tiny.py'}", f"--workdir={work}", log=work.parent / "again"
    )
    assert "compiled: train_step 0 (0.0 s), evaluation_step 0 (0.0 s), for 0 new runs" in run.out
    assert {path: path.read_bytes() for path in work.glob("cells/*/*/result.json")} == before
    assert (work / "results.csv").read_bytes() == results


@pytest.mark.slow
def test_a_vmapped_study_leaves_each_run_its_result(tmp_path_factory):
    """Marked, with a checkpoint of its own that loads, and nothing left of the stack."""
    place = tmp_path_factory.mktemp("vmapped")
    study = commands.write_study(place / "tiny.py", commands.write_corpus(place / "corpus.jsonl"), steps=6)
    flags = (f"--config={study}", f"--workdir={place / 'work'}", "--config.study.vmap=numbers")
    run = commands.finished("main", *flags, log=place / "log")
    assert "train_steps 1 (" in run.out and "4 of 4 runs done" in run.out
    results = [json.loads(path.read_text()) for path in (place / "work").glob("cells/*/seed-0/result.json")]
    assert len(results) == 4 and {result["segments"][-1]["vmapped"] for result in results} == {4}
    model, tokenizer = lab.load(next((place / "work").glob("cells/*")))
    assert model(tokenizer.encode("word")[None]).shape[:2] == (1, 4)
    assert not (place / "work" / "stacks").exists()
