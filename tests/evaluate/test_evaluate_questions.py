"""Questions over passages: branches answer what one by one does, costs are counted, the right sample is taken."""

import functools
import itertools
import json
import math
import types

import pytest
import tiny

import lab.config
from lab.data import tokenizers
from lab.data.questions import Paragraph, Question
from lab.data.tokenizers import Symbols
from lab.decode.sampling import Sampling
from lab.errors import UserError
from lab.evaluate import asks, conditions, questions
from lab.evaluate.asks import ask
from lab.evaluate.questions import Decoding, Form, Sample, answered, choose
from lab.model import mesh as lab_mesh
from lab.train import compiled, loop

ALONE = dict(model__rule="own_branch", model__position__ratio=0.0, model__position__unselected="time")
SYMBOLS = 26
never = lambda: None  # noqa: E731


def config_of(**overrides):
    """Of two passages of 4 facts, asked 3 questions each."""
    made = lab.config.base()
    made.model.update(tiny.config(**{name: value for name, value in overrides.items() if "__" in name}).model)
    made.data.update(dict(corpus="passage", text_length=50, rows=2))
    made.data.probe.update(dict(difficulty="2-4", symbols=SYMBOLS, questions=4))
    made.evaluate.loss = ask("difficulty", difficulties=(2, 4), texts=4, rows=2)
    fields = dict(facts=4, passages=2, questions=3, most_tokens=4)
    lab.config.add_ask(made, "answers", "facts", **fields)
    made.model.vocabulary = 2 + SYMBOLS
    return made


@functools.cache
def case(**overrides):
    config = config_of(**overrides)
    form = questions.of_facts(config, config.evaluate.answers, Symbols(28))
    return tiny.model(config), Symbols(28), form, config.evaluate.answers


def test_branches_that_see_themselves_alone_answer_to_the_token_what_one_by_one_does():
    *whole, asked = case(**ALONE)
    plain, branches = (answered(*whole, asked, name, never) for name in ("one_by_one", "branches"))
    assert plain.documents == branches.documents and len({*itertools.chain(*plain.documents["answers"])}) > 1
    assert (plain.tokens, plain.generated) == (branches.tokens, branches.generated)
    assert plain.loss == pytest.approx(branches.loss, rel=1e-5)


def test_costs_are_what_is_read_and_drawn():
    """Of a passage of P tokens and questions of one, without an end: P + 1 + 3 tokens are read of each by itself, as
    the last of 4 is given to no model. A passage takes a step but for its last token, which takes another."""
    model, tokenizer, form, asked = case(**ALONE)
    form = form._replace(stop=frozenset())
    P = len(form.paragraphs[0].context.split())
    assert P == 50 - 3 * 5
    plain, branches, vote = (
        answered(model, tokenizer, form, asked, name, never) for name in ("one_by_one", "branches", "vote-2")
    )
    assert plain.further == dict(f1=plain.further["f1"], questions=6, generated=24, processed=6 * (P + 4), steps=6 * 6)
    assert branches.further | dict(f1=0) == dict(f1=0, questions=6, generated=24, processed=2 * (P + 12), steps=2 * 6)
    assert vote.further | dict(f1=0) == dict(f1=0, questions=6, generated=48, processed=6 * (P + 8), steps=6 * 6)
    assert plain.tokens == branches.tokens == vote.tokens == 24


class Scripted:
    """In the place of a decoder: samples of a question by its text."""

    def __init__(self, model, tokenizer, form, ask, lanes, told):
        self.steps = self.generated = 0
        self.engine = types.SimpleNamespace(read=0)
        self.script = model

    def __call__(self, paragraph, texts, sampling, stream):
        if len({*texts}) == 1:
            return self.script[texts[0]][: len(texts)]
        return [self.script[text][0] for text in texts]


SCRIPT = {
    "river?": [Sample("the Rhine", (-0.1,)), Sample("Nile", (-2.0, -1.0)), Sample("The Nile.", (-1.0, -1.5))],
    "sea?": [Sample("Red", (-1.0,)), Sample("red sea", (-0.5,)), Sample("black", (-0.7, -0.1))],
}
FORM = Form([Paragraph("", (Question("river?", ("Nile",)), Question("sea?", ("the Red Sea", "Erythra"))))], frozenset())


@pytest.mark.parametrize(("name", "taken", "right", "f1"), [
    ("one_by_one", ["the Rhine", "Red"], 0.0, (0 + 2 / 3) / 2),
    ("branches", ["the Rhine", "Red"], 0.0, (0 + 2 / 3) / 2),
    ("vote-1", ["the Rhine", "Red"], 0.0, (0 + 2 / 3) / 2),
    ("vote-2", ["the Rhine", "Red"], 0.0, (0 + 2 / 3) / 2),  # ties
    ("vote-3", ["Nile", "Red"], 0.5, (1 + 2 / 3) / 2),
    ("best-of-2", ["the Rhine", "red sea"], 0.5, (0 + 1) / 2),
    ("best-of-3", ["the Rhine", "black"], 0.0, 0.0),  # -0.4 is the mean of black's
])  # fmt: skip
def test_the_answer_that_a_method_takes_is_scored(name, taken, right, f1, monkeypatch):
    monkeypatch.setattr(questions, "Decoder", Scripted)
    asked = ask("squad", squad="x")
    found = answered(SCRIPT, None, FORM, asked, name, never)
    assert found.documents["answers"] == [taken] and found.accuracy == right
    assert found.further["f1"] == pytest.approx(f1)
    chosen = [next(a for a in SCRIPT[q] if a.text == text) for q, text in zip(("river?", "sea?"), taken, strict=True)]
    assert (found.loss * found.tokens, found.tokens) == (
        pytest.approx(-sum(sum(a.log_p) for a in chosen)),
        sum(len(a.log_p) for a in chosen),
    )


def test_an_empty_answer_is_never_the_likeliest():
    samples = [Sample("", ()), Sample("x", (-9.0,))]
    assert choose(Decoding("best-of", 2), samples).text == "x" and samples[0].mean == -math.inf
    assert choose(Decoding("best-of", 1), samples[:1]).text == ""


def test_samples_are_those_of_their_question_and_number():
    """Whatever else is asked, and however many there are: the first of eight is that of one."""
    model, tokenizer, form, asked = case(**ALONE)
    decoder = questions.Decoder(model, tokenizer, form, asked, 3, never)
    (one, other), hot = form.paragraphs, Sampling(temperature=2.0)
    text = one.questions[0].text
    several = decoder(one, [text] * 3, hot, 5)
    assert len({answer.text for answer in several}) > 1
    decoder(other, [text] * 2, hot, 6)
    again = decoder(one, [text], hot, 5)
    assert again[0].text == several[0].text and decoder(one, [text] * 3, hot, 5) == several
    assert [a.text for a in decoder(one, [text] * 3, hot, 6)] != [a.text for a in several]


def test_one_question_that_is_asked_again_draws_other_samples():
    model, tokenizer, form, asked = case(**ALONE)
    one = form.paragraphs[0]
    again = form._replace(paragraphs=[one._replace(questions=one.questions[:1] * 3)] * 2)
    hot = asked.copy_and_resolve_references()
    hot.temperature = 3.0
    found = answered(model, tokenizer, again, hot, "vote-1", never).documents["answers"]
    assert len({*itertools.chain(*found)}) > 3
    assert found == answered(model, tokenizer, again, hot, "best-of-1", never).documents["answers"]


def test_a_string_ends_an_answer_and_is_no_part_of_it():
    model, tokenizer, form, asked = case(**ALONE)
    one = form.paragraphs[0]
    text = one.questions[0].text

    def answer(**ends) -> Sample:
        asked_of = questions.Decoder(model, tokenizer, form._replace(stop=frozenset(), **ends), asked, 1, never)
        return asked_of(one, [text], Sampling(), 0)[0]

    whole = answer()
    words = whole.text.split()
    found = answer(stops=(f" {words[1]}",))
    assert len(words) == len(whole.log_p) == 4
    assert found == Sample(words[0], whole.log_p[:1])


def test_paragraphs_of_a_file_are_asked_as_text(tmp_path):
    qas = [{"question": " Who? ", "answers": [{"text": "ab"}]}, {"question": "Me?", "is_impossible": True}]
    paragraphs = [{"context": "No one asks.", "qas": []}, {"context": "It is ab.", "qas": qas}]
    path = tmp_path / "squad.json"
    path.write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    asked = ask("squad", squad=str(path), passages=1)
    form = questions.of_file(None, asked, tokenizers.Bytes())
    who, me = Question("Question: Who?\nAnswer:", ("ab",)), Question("Question: Me?\nAnswer:", ("",))
    assert form == Form([Paragraph("It is ab.\n", (who, me))], frozenset({256}), ("\n",))
    asked.questions = 1
    assert questions.of_file(None, asked, tokenizers.Bytes()).paragraphs[0].questions == (who,)
    questions.ready(asked, "evaluate.q", None, None)
    asked.passages = 2
    with pytest.raises(
        UserError, match=r"evaluate\.q\.passages = 2, and .*squad\.json has 1 paragraphs with questions"
    ):
        questions.ready(asked, "evaluate.q", None, None)
    config = lab.config.base()
    lab.config.add_ask(config, "q", "squad")
    with pytest.raises(UserError, match=r"evaluate\.q\.squad is empty; name a JSON file"):
        asks.check(config)


@pytest.mark.slow
def test_a_condition_has_what_a_row_and_a_timing_need():
    config = config_of(**ALONE)
    config.evaluate.answers.methods = ("vote-2", "branches")
    model, tokenizer, form, asked = case(**ALONE)
    mesh = lab_mesh.make(config.run.mesh)
    options = dict(done=1, stop=lambda: False, tokenizer=tokenizer)
    (found,) = conditions.evaluate(config, "answers", compiled.laid(model, mesh), None, mesh, **options)
    same = answered(model, tokenizer, form, asked, "branches", never)
    assert (found.value, found.accuracy, found.tokens, found.further) == (
        "branches", same.accuracy, same.tokens, same.further,
    )  # fmt: skip
    assert found.loss == pytest.approx(same.loss, rel=1e-5) and found.documents == same.documents
    assert found.read == same.generated and found.seconds > 0 and found.executable is None
    with pytest.raises(loop.Stopped, match="the ask answers"):
        list(conditions.evaluate(config, "answers", model, None, mesh, **options | dict(stop=lambda: True)))


@pytest.mark.parametrize(("fields", "told"), [
    ({"methods": ()}, "evaluate.answers.methods is empty"),
    ({"methods": ("vote-0",)}, "a method in evaluate.answers.methods = 'vote-0' is unknown; choose one_by_one, "),
    ({"methods": ("vote",)}, "methods = 'vote' is unknown"),
    ({"methods": ("branches", "branches")}, "has a value twice"),
    ({"facts": 8}, "facts = 8 with questions = 3 take 55 tokens, over data.text_length = 50; choose fewer"),
    ({"facts": 7}, "evaluate.answers.facts = 7 needs 28 symbols, over data.probe.symbols = 26"),
    ({"temperature": 1e-6}, "evaluate.answers: temperature = 1e-06 is not valid; choose 0, which is greedy"),
    ({"squad": "x"}, "evaluate.answers.squad = 'x' means nothing beside evaluate.answers.kind = 'facts'"),
    ({"kind": "squad", "facts": 8}, "evaluate.answers.kind = 'squad' asks nothing of data.corpus = 'passage'; choose"),
])  # fmt: skip
def test_what_cannot_be_asked_is_refused_by_name(fields, told):
    config = config_of()
    asks.check(config)
    config.evaluate.answers.update(fields)
    with pytest.raises(UserError) as refusal:
        asks.check(config)
    assert told in str(refusal.value)
