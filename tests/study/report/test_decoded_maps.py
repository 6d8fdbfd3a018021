"""Maps of branches that were decoded: the numbers of the runs, where they belong, in the picture and on the page."""

import json

import commands
import pandas as pd
import pytest
from studies import ASKED, write, write_study

from lab import report
from lab.study import evaluations, results
from lab.study.report import decoding, figures, live

VALUES = {"rope_ratio": [0.0, 1.0], "train_branch": ["fixed1", "1-15"]}
COUNTS, SEEDS = (1, 2, 16), 2
FIELDS = {"kind": "decoding", "prompt": "own", "prompt_tokens": 8, "new_tokens": 24, "texts": 6, "temperature": 1.0}


def row(labels, seed: int, count: int) -> dict:
    """Every number says whose it is."""
    loss = 1 + labels["rope_ratio"] + 0.1 * (labels["train_branch"] == "1-15") + 0.001 * count + 0.0001 * seed
    others = {"attention_on_others": loss / 10, "swap_kl": loss / 1e4} if count > 1 else dict.fromkeys(
        ("attention_on_others", "swap_kl")
    )  # fmt: skip
    found = {"eval_branch": count, "loss": loss, "accuracy": 0.5, "tokens": 10, "loss_alone": 3 * loss, "groups": 6}
    return found | others


def built(directory, sections=(("decoding", "rope_ratio", "train_branch"), "curves"), skip=()):
    write_study(directory, VALUES, lambda labels, count: 2.0, (1,), SEEDS, sections=sections)
    plan = json.loads((directory / "plan.json").read_text())
    plan["asks"]["decoded"], plan["config"]["evaluate"] = (
        "eval_branch",
        {"loss": {"kind": "branches"}, "decoded": FIELDS},
    )
    for cell in plan["cells"]:
        cell["asks"] = ASKED | {"decoded": ASKED["loss"]}
        for seed in cell["seeds"]:
            found = evaluations.begun("decoded", "eval_branch", ASKED["loss"]) | {"complete": True}
            found["conditions"] = [row(cell["labels"], seed, count) for count in COUNTS]
            if (cell["name"], seed) not in skip:
                evaluations.save(directory / cell["directory"] / f"seed-{seed}", found)
    write(directory / "plan.json", plan)
    return directory


def mean(ratio: float, draw: str, count: int, column: str) -> float | None:
    values = [row({"rope_ratio": ratio, "train_branch": draw}, seed, count) for seed in range(SEEDS)]
    values = [one | {"cost": one["loss_alone"] - one["loss"]} for one in values]
    return None if values[0][column] is None else sum(one[column] for one in values) / SEEDS


def test_every_map_has_the_means_of_its_cells(tmp_path):
    study = results.collect(built(tmp_path))
    charts = {piece.name: piece for piece in decoding.section("rope_ratio", "train_branch")(study) if
              hasattr(piece, "live")}  # fmt: skip
    assert [*charts] == [f"decoded_{column}" for column in decoding.MAPS]
    for column in decoding.MAPS:
        for panel in charts[f"decoded_{column}"].live["panels"]:
            (heat,), title = panel["data"], panel["layout"]["title"]["text"]
            draw = title.removeprefix("train_branch ")
            counts = [int(count) for count in heat["x"]]
            assert counts == [count for count in COUNTS if mean(0.0, draw, count, column) is not None]
            for ratio, line in zip(VALUES["rope_ratio"], heat["z"], strict=True):
                assert line == pytest.approx([mean(ratio, draw, count, column) for count in counts], rel=1e-5)
        assert len(charts[f"decoded_{column}"].live["panels"]) == 2


def test_the_report_draws_them_and_says_how_they_were_found(tmp_path):
    report.rebuild(built(tmp_path, skip={("rope_ratio=0.0,train_branch=fixed1", 1)}))
    text, csv = (tmp_path / "report.md").read_text(), (tmp_path / "results" / "decoded.csv").read_text()
    assert "## Decoded branches" in text and "\n## decoded" not in text  # not told twice
    assert "6 groups of branches began each with the first 8 tokens" in text and "standard deviation 7" in text
    assert all((tmp_path / "figures" / f"decoded_{column}.png").stat().st_size > 1000 for column in decoding.MAPS)
    assert csv.startswith("rope_ratio,train_branch,seed,eval_branch,loss,accuracy,tokens,loss_alone,groups,")
    assert len(csv.splitlines()) == 1 + 3 * (4 * SEEDS - 1)


def test_without_the_section_the_loss_is_told_as_of_any_ask(tmp_path):
    report.rebuild(built(tmp_path, sections=("curves",)))
    assert "## decoded" in (text := (tmp_path / "report.md").read_text()) and "Decoded branches" not in text


def test_nothing_decoded_yet_is_said(tmp_path):
    cells = [f"rope_ratio={ratio},train_branch={draw}" for ratio in (0.0, 1.0) for draw in VALUES["train_branch"]]
    report.rebuild(built(tmp_path, skip={(name, seed) for name in cells for seed in range(SEEDS)}))
    assert "Nothing has been decoded yet." in (tmp_path / "report.md").read_text()


def test_small_numbers_are_written_with_digits_that_count():
    panels = [{"a": {0.0: {2: 0.00123}, 1.0: {2: 0.5}}}]
    (axes,) = figures.heat_maps(panels, "ratio", "branches", ".2g").axes
    assert {text.get_text() for text in axes.texts} == {"0.0012", "0.5"}
    (panel,) = live.heat_maps(panels, "ratio", "branches", ".2g")["panels"]
    assert panel["data"][0]["texttemplate"] == "%{z:.2g}" and "%{z:.4g}" in panel["data"][0]["hovertemplate"]


@pytest.mark.long
@pytest.mark.slow
def test_a_study_that_is_trained_is_asked_to_decode(tmp_path):
    """By another config of its name, in its directory: nothing is trained again, and the maps are drawn."""
    corpus, work = commands.write_corpus(tmp_path / "words.jsonl", texts=400), tmp_path / "work"
    options = dict(sections=(("decoding", "rope_ratio", "train_branch"), "curves"), steps=10)
    made = commands.write_study(tmp_path / "made.py", corpus, commands.ONE_CELL, **options)
    commands.finished("main", f"--config={made}", f"--workdir={work}", log=tmp_path / "first")
    (run,) = commands.runs(work).values()
    trained, plain = (run / "result.json").read_bytes(), (work / "results.csv").read_bytes()
    assert "Nothing has been decoded yet." in (work / "report.md").read_text()
    asked = "branches=(1, 2, 3), texts=2, rows=2, prompt_tokens=4, new_tokens=5"
    lines = f"""    from lab.config import add_ask
    add_ask(config, "decoded", "decoding", {asked})
    return config
"""
    made.write_text(made.read_text().replace("    return config\n", lines))
    commands.finished("main", f"--config={made}", f"--workdir={work}", log=tmp_path / "second")
    assert (run / "result.json").read_bytes() == trained and (work / "results.csv").read_bytes() == plain
    found = pd.read_csv(work / "results" / "decoded.csv")
    assert list(found["eval_branch"]) == [1, 2, 3] and list(found["tokens"]) == [10, 20, 30]
    assert (found["loss"] > 0).all() and (found["loss_alone"] > 0).all() and found["swap_kl"][1:].gt(0).all()
    assert found["attention_on_others"][1:].between(0, 1, inclusive="neither").all() and found["swap_kl"].isna()[0]
    assert (work / "figures" / "decoded_swap_kl.png").exists()
    assert {"decoded"} <= {*pd.read_csv(work / "timings.csv")["phase"]}
