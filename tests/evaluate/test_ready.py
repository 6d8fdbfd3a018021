"""What a long ask lacks is told where a study opens, in a line, before anything is trained."""

import pytest
import test_long
import tiny
from test_long import L, config_of

from lab.data import Data, tokenizers
from lab.errors import UserError
from lab.evaluate import asks, ready
from lab.storage import read_json, write_json
from lab.study.define import cell, start
from lab.study.run import runs

TRAINED = ("position.trained", L)
LINEAR = ("position.scaling.name", "linear")


def data_of(texts, tokenizer=None) -> Data:
    return Data(texts, texts, tokenizer or tokenizers.Bytes(), "training", "validation")


@pytest.mark.parametrize(("overrides", "told"), [
    ((("position.map.name", "self-extend"), ("position.map.window", 4), ("position.map.group", 4)),
     "evaluate.long.lengths: 17: model.position.map.name = 'self-extend' reaches 12 tokens of"),
    ((LINEAR, ("position.length", 16)), "evaluate.long.lengths: 17: model.position.length = 16 makes frequencies for"),
    ((("position.map.name", "leaky"), ("position.map.window", 2**20), ("position.map.leak", 64.0)),
     "evaluate.long.lengths: 17: model.position.map.name = 'leaky' makes of 17 time steps numbers up to 66"),
])  # fmt: skip
def test_lengths_that_a_method_does_not_reach_are_refused(overrides, told):
    with pytest.raises(UserError, match=told):
        asks.check(config_of(model=(TRAINED, *overrides)))


def test_lengths_that_it_reaches_are_not():
    four = ("position.map.name", "self-extend"), ("position.map.window", 4), ("position.map.group", 4)
    asks.check(config_of(model=(TRAINED, *four), lengths=(11, 12)))
    asks.check(config_of(model=(TRAINED, LINEAR, ("position.length", 17))))


def test_tasks_that_do_not_fit_are_told_with_what_they_take():
    config = config_of(stride=0)
    test_long.lab.config.add_ask(config, "found", "retrieval", lengths=(150, 400), tasks=("passkey", "needle-values"))
    config.evaluate.found.texts = 3
    told = r"evaluate.found.lengths: 150 tokens are fewer than .* have, .*\(passkey 151, needle-values 310\)"
    with pytest.raises(UserError, match=told) as refused:
        ready.check(config, data_of(test_long.texts(count=60)))
    config.evaluate.found.lengths = (int(str(refused.value).split("at least ")[1].split(",")[0]),)
    ready.check(config, data_of(test_long.texts(count=60)))


def test_an_evaluator_that_cannot_choose_keys_is_refused(tmp_path):
    made = config_of()
    made.model.vocabulary = 258
    place = tiny.saved(tmp_path / "evaluator", tiny.model(made), made)
    config, given = config_of(evaluator=str(place), short=3, block=4), data_of(test_long.texts())

    def refused(told: str, data=given) -> None:
        with pytest.raises(UserError, match=rf"evaluate.long.evaluator = .*{told}") as error:
            ready.check(config, data)
        assert "\n" not in str(error.value)

    ready.check(config, given)
    refused(
        r"has another tokenizer \(bytes\) than .*symbols\), and not both write bytes",
        data_of(test_long.texts(), tokenizers.Symbols(9)),
    )
    stored = read_json(place / "config.json")
    stored["model"]["position"] |= {"name": "learned", "length": 16}
    write_json(place / "config.json", stored)
    refused("has a vector for 16 positions, and is to read 17")
    for step in (place / "seed-0" / "checkpoints").glob("[0-9]*"):
        step.rename(tmp_path / "gone")
    refused("has no checkpoint")
    (place / "tokenizer.json").unlink()
    refused("holds no tokenizer.json")
    config.evaluate.long.evaluator = str(tmp_path / "nowhere")
    refused("nowhere is in no cell")


def test_a_study_tells_before_it_makes_a_run(tmp_path, monkeypatch):
    """What the command makes of a config once its data is open: nothing is written."""
    config = config_of(documents=20)
    config.model.vocabulary, config.data.texts_per_row = 258, 1
    config.evaluate.loss.update(texts=16, rows=2)
    monkeypatch.setattr(runs.lab_data, "open", lambda config: data_of(test_long.texts()))
    with pytest.raises(UserError, match=r"evaluate.long: 20 documents of 17 tokens take 340 of them, and .* have"):
        runs.runs_of([cell.make(config.study, (), config)], [0], tmp_path / "study")
    assert not (tmp_path / "study").exists()


def test_a_checkpoint_of_another_L_is_refused(tmp_path):
    """What a cell was trained on is L, whatever the scale of a config says."""
    made = config_of()
    made.model.vocabulary, made.train.steps, made.data.text_length = 258, 2, 9
    place = tiny.saved(tmp_path / "cell", tiny.model(made), made)
    asked = config_of(trained=L)
    asked.checkpoint = str(place)
    asked = start.laid(asked)
    with pytest.raises(UserError, match=r"evaluate.long.trained = 6, and config.checkpoint = .* texts of 9 tokens; "):
        start.check(asked, "x")
    asked.evaluate.long.trained = 9
    start.check(asked, "x")
