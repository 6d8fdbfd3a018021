"""The LM Evaluation Harness on a model of the lab, where it is installed: a task made here, and one answer by hand."""

import json
import sys

import decoding
import jax
import numpy as np
import pytest
import tiny
import tokenizers as library
import variants

import lab
from lab import runtime
from lab.data import chat, tokenizers
from lab.data.tokenizers import Bytes
from lab.errors import UserError

pytest.importorskip("lm_eval")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from lab.decode.generate import generate
from lab.exchange import harness, lm_eval

LENGTH, EOS = 24, 256
QUESTIONS = [("two and two", ["four", "five", "six"]), ("ab", ["c", "cd"]), ("on and on and on", [" and", " end"])]
TASKS = {
    "choice": dict(output_type="multiple_choice", doc_to_text="{{question}}", doc_to_choice="{{choices}}",
                   doc_to_target=0, target_delimiter="", metric_list=[{"metric": "acc"}]),
    "rolling": dict(output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{text}}",
                    metric_list=[{"metric": "byte_perplexity"}]),
    "until": dict(output_type="generate_until", doc_to_text="{{question}}", doc_to_target="{{text}}",
                  generation_kwargs={"until": ["\n"], "max_gen_toks": 4}, metric_list=[{"metric": "exact_match"}]),
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return tiny.model(variants.config("default", **decoding.ALONE, model__vocabulary=258))


@pytest.fixture
def adapter(model, monkeypatch):
    monkeypatch.setattr(lab, "load", lambda path: (model, Bytes()))
    return harness.Lab("somewhere", batch_size=2, max_length=LENGTH, max_gen_toks=4)


def log_p(model, context: bytes, text: bytes) -> np.ndarray:
    """float64, of each byte of the text after the end of texts or the context, in one pass."""
    tokens = np.array([[*(list(context) or [EOS]), *text]])
    z = np.asarray(model(tokens), np.float64)[0]
    z -= np.log(np.exp(z).sum(-1, keepdims=True))
    places = np.arange(tokens.shape[1] - len(text), tokens.shape[1])
    return z[places - 1, tokens[0, places]]


def asked(kind: str, *arguments) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=each, idx=i) for i, each in enumerate(arguments)]


@pytest.mark.parametrize(("context", "continuation"), [("ab", "cd"), ("", "abc"), ("a " * 20, "end")])
def test_a_continuation_has_the_likelihood_of_the_full_pass(adapter, model, context, continuation):
    """Of a long context the end is kept; without one the text begins after the end of another."""
    ((found, _),) = adapter.loglikelihood(asked("loglikelihood", (context, continuation)), disable_tqdm=True)
    continuation = context[len(context.rstrip()) :] + continuation  # the harness moves spaces
    kept = context.rstrip().encode()[-(LENGTH + 1 - len(continuation)) :]
    np.testing.assert_allclose(found, log_p(model, kept, continuation.encode()).sum(), atol=1e-3)


def test_a_long_text_is_scored_token_by_token_once(adapter, model):
    """In windows that overlap as little as they can: 24 tokens after the end of a text, then 24 after the last."""
    text = b"one two three four five six seven eight"
    (found,) = adapter.loglikelihood_rolling(asked("loglikelihood_rolling", (text.decode(),)), disable_tqdm=True)
    rest = len(text) - LENGTH
    expected = log_p(model, b"", text[:LENGTH]).sum() + log_p(model, text[-LENGTH - 1 : -rest], text[-rest:]).sum()
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_generation_stops_at_any_of_its_strings(adapter, model):
    (whole,) = generate(model, [list(b"ab")], most_tokens=12, stop=[EOS], chunk=64)
    text = Bytes().decode(whole)
    settings = [{"until": [], "max_gen_toks": 12}, {"until": [text[2], "never"], "max_gen_toks": 12}]
    found = adapter.generate_until(asked("generate_until", *(("ab", each) for each in settings)), disable_tqdm=True)
    assert found == [text, text[: text.index(text[2])]]


def write_tasks(directory) -> None:
    """A file of each task, and their one file of rows."""
    lines = [{"question": q, "choices": choices, "text": q} for q, choices in QUESTIONS]
    (directory / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, task in TASKS.items():
        files = {"data_files": {"test": str(directory / "rows.jsonl")}}
        whole = {"task": name, "dataset_path": "json", "dataset_kwargs": files, "test_split": "test", **task}
        (directory / f"{name}.yaml").write_text(json.dumps(whole))  # JSON is YAML


def test_a_task_is_evaluated(model, monkeypatch, tmp_path):
    """Through the harness's own registry; accuracy and perplexity are those of the full pass."""
    monkeypatch.setattr(lab, "load", lambda path: (model, Bytes()))
    write_tasks(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    arguments = f"checkpoint=somewhere,max_length={LENGTH}"
    found = simple_evaluate(
        model="lab", model_args=arguments, tasks=[*TASKS], task_manager=manager, batch_size=2, bootstrap_iters=0
    )["results"]
    right = [
        np.argmax([log_p(model, q.encode(), choice.encode()).sum() for choice in choices]) == 0
        for q, choices in QUESTIONS
    ]
    np.testing.assert_allclose(found["choice"]["acc,none"], np.mean(right))
    nats = sum(log_p(model, b"", q.encode()).sum() for q, _ in QUESTIONS)
    expected = np.exp(-nats / sum(len(q) for q, _ in QUESTIONS))
    np.testing.assert_allclose(found["rolling"]["byte_perplexity,none"], expected, rtol=1e-4)
    assert found["until"]["exact_match,none"] == 0


def test_the_command_is_that_of_the_harness(model, monkeypatch, tmp_path, capsys):
    """A checkpoint may have a name that the harness would take apart."""
    name, opened = "cells/ratio=1.0,draw=1-3", []
    write_tasks(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(lab, "load", lambda path: opened.append(path) or (model, Bytes()))
    monkeypatch.setattr(runtime, "start_alone", lambda: None)
    monkeypatch.setattr(sys, "argv", ["lm_eval"])
    lm_eval.main(["--tasks", "choice", "--checkpoint", name, "--include_path", str(tmp_path), "--batch_size", "2"])
    assert "|choice|" in capsys.readouterr().out and opened == [name]


TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role }}:{{ m.content }}<end>{% endfor %}assistant:"


@pytest.fixture
def talking(tmp_path):
    """A tokenizer of letters with special tokens, and a chat template beside it."""
    names = ["<s>", "<end>", *map(chr, range(32, 127))]
    made = library.Tokenizer(library.models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="?"))
    made.pre_tokenizer = library.pre_tokenizers.Split(library.Regex("."), "isolated")
    made.add_special_tokens(["<s>", "<end>"])
    made.save(str(tmp_path / tokenizers.FILE))
    (tmp_path / chat.FILE).write_text(TEMPLATE)
    (tmp_path / chat.SETTINGS).write_text(json.dumps({"bos_token": "<s>"}))
    return tokenizers.load(tmp_path, "<end>")


def test_a_task_in_a_chat_template(model, talking, monkeypatch, tmp_path):
    """What the model reads is what the template writes, special tokens and all, once; an answer may be begun."""
    monkeypatch.setattr(lab, "load", lambda path: (model, talking))
    begun = dict(TASKS["choice"], gen_prefix="it is")
    monkeypatch.setitem(TASKS, "choice", begun)
    write_tasks(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    read = []
    monkeypatch.setattr(
        harness, "log_likelihoods", lambda model, pairs, rows: read.extend(pairs) or [(0.0, False)] * len(pairs)
    )
    simple_evaluate(
        model="lab", model_args="checkpoint=somewhere,add_bos_token=true", tasks=["choice"], batch_size=2,
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False), bootstrap_iters=0,
        apply_chat_template=True, system_instruction="Be so kind.",
    )  # fmt: skip
    ids = lambda text: [made + 2 - 32 for made in text.encode()]  # noqa: E731
    for question, choices in QUESTIONS:
        user = [*ids(f"user:{question}"), 1]
        context = [0, *ids("system:Be so kind."), 1, *user, *ids("assistant:it is")]
        for choice in choices:
            whole = [*context, *ids(choice)]
            assert whole in [[*before, *after] for before, after in read]


def test_a_template_that_is_not_there_or_chosen_by_name_is_refused(adapter, talking):
    with pytest.raises(UserError, match="no chat template came with the tokenizer 'bytes'; leave it out"):
        adapter.chat_template(True)
    adapter.tokens = talking
    with pytest.raises(UserError, match="apply_chat_template tools: no template is chosen by name"):
        adapter.chat_template("tools")
    assert not adapter.talks


@pytest.mark.parametrize(("settings", "says"), [
    ({"max_gen_toks": LENGTH}, f"max_gen_toks = {LENGTH} leaves no room for a prompt in max_length = {LENGTH}"),
    ({"beams": 3}, "a setting of generate_until = 'beams' is unknown"),
])  # fmt: skip
def test_settings_that_it_has_not_are_refused(adapter, settings, says):
    with pytest.raises(UserError, match=says):
        adapter.generate_until(asked("generate_until", ("ab", settings)), disable_tqdm=True)


def test_a_batch_is_a_number(monkeypatch):
    with pytest.raises(UserError, match="batch_size = 'auto' is no number of rows"):
        harness.Lab("somewhere", batch_size="auto")
    assert jax.devices()  # nothing was loaded
