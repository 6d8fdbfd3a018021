"""The command that continues prompts: what it reads and writes, and one line for a user's mistake."""

import io
import json
import pathlib
import sys

import decoding
import pytest
import tiny
import variants
from rich.console import Console

import lab
from lab import command, generate, runtime
from lab.data import tokenizers
from lab.data.tokenizers import Bytes
from lab.decode import show
from lab.decode.generate import generate as tokens_of
from lab.decode.text import Passage
from lab.errors import UserError
from lab.exchange import lm_eval

CHECKPOINTS = pathlib.Path(__file__).parent / "exchange" / "reference_checkpoints"


@pytest.fixture(scope="module")
def model():
    return tiny.model(variants.config("default", **decoding.ALONE, model__vocabulary=258))


@pytest.fixture
def run(model, monkeypatch, capsys):
    """The command on a model of bytes: (code, standard output, standard error)."""

    def load(path, model=(), apart=False):
        assert path == "somewhere"
        loaded.append((model, apart))
        return of_bytes, Bytes()

    def run(*arguments: str, stdin: bytes | None = b"") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["generate", "somewhere", *arguments])
        monkeypatch.setattr(sys, "stdin", None if stdin is None else io.TextIOWrapper(io.BytesIO(stdin)))
        with pytest.raises(SystemExit) as ended:
            command.run(generate.main)
        return ended.value.code or 0, *capsys.readouterr()

    of_bytes, loaded = model, []
    monkeypatch.setattr(lab, "load", load)
    monkeypatch.setattr(runtime, "start_alone", lambda: None)
    run.loaded = loaded
    return run


def test_a_prompt_is_continued_as_its_tokens_are(run, model):
    code, out, err = run("--prompt", "ab", "--max-tokens", "6")
    (expected,) = tokens_of(model, [list(b"ab")], most_tokens=6, stop=[256])
    assert (code, out, err) == (0, Bytes().decode(expected) + "\n", "")


@pytest.mark.slow  # two programs more
def test_lines_of_json_are_read_and_written(run, tmp_path):
    """Settings of a line stand over those of the command; answers carry the prompt and the id."""
    lines = [
        {"prompt": "ab", "id": 7, "max_tokens": 4},
        {"prompt": "x", "branches": 2, "temperature": 1.5, "seed": 3},
        {"prompt": "", "begin": ["one", "two"]},
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    code, out, _ = run("--file", str(path), "--json", "--max-tokens", "6")
    answers = {answer["prompt"]: answer for answer in map(json.loads, out.splitlines())}
    assert code == 0 and answers.keys() == {"ab", "x", ""} and answers["ab"]["id"] == 7
    assert [len(answers[line["prompt"]]["branches"]) for line in lines] == [1, 2, 2]
    assert {found["ended"] for answer in answers.values() for found in answer["branches"]} <= {"length", "stop"}
    again = run("--json", "--jsonl", "--max-tokens", "6", stdin=path.read_bytes())
    assert sorted(again[1].splitlines()) == sorted(out.splitlines())


def test_text_of_standard_input_is_one_prompt(run):
    _, out, _ = run("--json", "--max-tokens", "2", stdin=b"two\nlines\n")
    (answer,) = map(json.loads, out.splitlines())
    assert answer["prompt"] == "two\nlines\n"


def test_a_stop_string_is_not_written(run):
    code, whole, _ = run("--prompt", "ab", "--max-tokens", "6")
    code, out, _ = run("--prompt", "ab", "--max-tokens", "6", "--stop", whole[2:4])
    assert code == 0 and out == whole[: whole.index(whole[2:4])] + "\n"


def test_a_rule_is_laid_over_the_model(run):
    """Without one, branches of a model of single texts are kept apart."""
    for rule in (("--rule", "causal"), ()):
        run("--prompt", "ab", "--max-tokens", "1", *rule)
    assert run.loaded == [((("rule", "causal"),), False), ((), True)]


JSONL = ("--jsonl", "--json")


@pytest.mark.parametrize(("arguments", "stdin", "says"), [
    (JSONL, b'{"prompt": "a"}\n{"prompt": "a"', "standard input, line 2: no JSON: "),
    (JSONL, b'\n{"text": "a"}', 'standard input, line 2: no object with a text under "prompt"'),
    (JSONL, b'{"prompt": "a", "top_q": 1}', "line 1: a setting = 'top_q' is unknown (did you mean 'top_p'?)"),
    (JSONL, b'{"prompt": "a", "top_k": "many"}', "line 1: top_k = 'many' is no int; the default is 0"),
    (JSONL, b'{"prompt": "a", "stop": 3}', "line 1: stop = 3 is neither a text nor a list of texts"),
    (JSONL, b'{"prompt": "a"}\n{"prompt": ""}', "line 2: the prompt is empty"),
    (JSONL, b'{"prompt": "a", "branches": 257}', "line 1: branches = 257 is not within the budget; choose 0 to 256"),
    (JSONL, b"\xff", "- is not UTF-8 at byte 0"),
    ((), b"a" * 2**17, "standard input: a prompt of 131072 tokens and 1 x 128 to generate need 131328 slots"),
    (JSONL, b"\n", "there is no prompt"),
    ((), None, "standard input is closed; give a prompt with --prompt or --file"),
    (("--file", "no/such.jsonl"), b"", "cannot read no/such.jsonl: No such file"),
    (("--prompt", "a", "--top-k", "x"), b"", "argument --top-k: invalid int value: 'x'"),
    (("--prompt", "a", "--top-q", "1"), b"", "unrecognized arguments: --top-q 1"),
    (("--prompt", "a", "--branches", "2", "--begin", "b"), b"", "branches = 2 and 1 texts in begin; leave one out"),
    (("--prompt", "a", "--stop", ""), b"", "stop = '' would end a text at once"),
    (("--prompt", "a", "--top-p", "2"), b"", "top_p = 2.0 is not valid"),
    (("--prompt", "a", "--temperature", "1e-38"), b"", "temperature = 1e-38 is not valid"),
    (("--prompt", "a", "--max-tokens", "2000"), b"", "need 2048 slots, over 1024"),
    (("--prompt", "a", "--max-tokens", "0"), b"", "max_tokens = 0 generates nothing; choose at least 1"),
    (JSONL, b'{"prompt": "a", "max_tokens": -1}', "line 1: max_tokens = -1 generates nothing; choose at least 1"),
    (("--prompt", "a", "--chat"), b"", "--chat: no chat template came with the tokenizer 'bytes'; leave it out"),
])  # fmt: skip
def test_a_mistake_is_one_line(run, monkeypatch, arguments, stdin, says):
    monkeypatch.setattr(generate, "LONGEST", 2**10)
    monkeypatch.setattr(generate, "ROWS", 1)
    code, out, err = run(*arguments, stdin=stdin)
    assert code == 2 and out == "" and err.startswith("lab: ") and err.count("\n") == 1 and says in err


def test_a_message_stands_in_the_chat_template(monkeypatch):
    """Which says what begins it; any token that ends a model's turn ends it."""
    flags = generate.parse(["somewhere", "--prompt", "w5", "--chat", "--begin", "w6"])
    (one,) = generate.prompts(flags)
    tokenizer = tokenizers.load(CHECKPOINTS / "qwen3")
    tokenizer.bos = 1
    monkeypatch.setattr(tokenizers.Json, "ends", (2, 7))
    asked = generate.request(one, tokenizer, flags.chat)
    assert (asked["prompt"], asked["texts"], asked["stop"]) == ([1, 5, 2], [[6]], (2, 7))
    plain = generate.request(one, tokenizer)
    assert (plain["prompt"], plain["texts"], plain["stop"]) == ([1, 5], [[6]], (2,))


def test_an_interrupted_stream_keeps_what_was_finished(run, monkeypatch):
    def interrupted(engine, tokenizer, stops):
        yield Passage(0, 1, "done", "stop")
        yield Passage(1, 1, "half", "")
        raise KeyboardInterrupt

    monkeypatch.setattr("lab.decode.text.transcribed", interrupted)
    code, out, err = run("--prompt", "a", "--prompt", "b", "--json")
    assert code == 130 and json.loads(out) == {
        "prompt": "a",
        "branches": [{"branch": 1, "text": "done", "ended": "stop"}],
    }
    assert err == "\nlab: interrupted: 1 of 2 prompts were finished\n"


def test_a_terminal_has_a_panel_for_each_branch():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=90, height=30, legacy_windows=False)
    pieces = [Passage(0, 1, "on", ""), Passage(0, 2, "two\n[bold]", "stop"), Passage(0, 1, "e", "length")]
    show.as_panels(iter(pieces), show.Answers([range(1, 3)]), console)
    last = out.getvalue()
    assert "prompt 1, branch 1: length" in last and "prompt 1, branch 2: stop" in last and "[bold]" in last
    assert last.index("prompt 1, branch 1 ") < last.index("prompt 1, branch 1: length")  # it was there before its end


def test_several_texts_stand_under_headings():
    out, answers = io.StringIO(), show.Answers([[1], [1, 2]])
    pieces = [Passage(1, 2, "b", "stop"), Passage(0, 1, "c", "stop"), Passage(1, 1, "a", "length")]
    show.as_text(iter(pieces), answers, out)
    assert out.getvalue() == "--- prompt 1, branch 1\nc\n--- prompt 2, branch 1\na\n--- prompt 2, branch 2\nb\n"


def test_the_harness_has_to_be_installed(monkeypatch):
    for name in ("lm_eval", "lm_eval.__main__"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r"lm_eval is not installed.*: pip install -r"):
        lm_eval.main(["--tasks", "hellaswag"])
