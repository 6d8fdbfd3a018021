"""A preparation that is stopped goes on; whoever makes it, and however often it is stopped, its files are the same."""

import errno
import itertools
import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from shelves import STUDY, files_of, of_prepared, prepared, random, write_stories

import lab.data
from lab import prepare
from lab.data import preparation, reading, shards
from lab.errors import UserError


@pytest.fixture
def undisturbed(stories, tmp_path):
    """The files of a preparation that nothing stopped."""
    prepared(stories, tmp_path / "undisturbed")
    return files_of(tmp_path / "undisturbed")


def stopping_at(count):
    """Looks on, and stops at the run of that number."""
    numbers = itertools.count()

    def told(one, kept):
        if next(numbers) == count:
            raise KeyboardInterrupt

    return told


def test_a_stopped_one_goes_on_to_the_same_files(stories, tmp_path, undisturbed):
    out, begun = tmp_path / "out", 0
    for stop in (0, 3, 7):
        with pytest.raises(KeyboardInterrupt):
            prepared(stories, out, told=stopping_at(stop))
        with pytest.raises(UserError, match=r"is not finished; run its command again: python -m lab.prepare \.\.\."):
            lab.data.open(of_prepared(stories, out))
        begun = len([*out.glob("train-*.array_record")])
        assert begun > stop
    (out / ".train-00001.array_record").write_bytes(b"a draft that a killed command has left")
    (out / "parts" / ".00001.json.abcd").write_bytes(b"another")
    was_there = []
    prepared(stories, out, told=lambda one, kept: was_there.append(kept))
    assert was_there[:begun] == [True] * begun and not any(was_there[begun + 1 :])
    assert files_of(out) == undisturbed
    was_there.clear()
    prepared(stories, out, told=lambda one, kept: was_there.append(kept))
    assert all(was_there) and files_of(out) == undisturbed


@pytest.mark.parametrize("fault", ["flipped", "truncated", "missing", "lengths", "told"])
def test_what_is_damaged_is_made_again(stories, tmp_path, undisturbed, fault):
    out = tmp_path / "out"
    prepared(stories, out)
    path = out / {"lengths": "parts/00004.train", "told": "parts/00004.json"}.get(fault, "train-00004.array_record")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if fault == "missing":
        path.unlink()
    else:
        path.write_bytes(content[:-1] if fault == "truncated" else content)
    was_there = []
    prepared(stories, out, told=lambda one, kept: was_there.append(kept))
    assert [number for number, kept in enumerate(was_there) if not kept] == [4]
    assert files_of(out) == undisturbed


@pytest.mark.slow
def test_any_number_of_processes_makes_the_same_files(stories, tmp_path, undisturbed):
    prepared(stories, tmp_path / "two", workers=2)
    assert files_of(tmp_path / "two") == undisturbed


@pytest.mark.parametrize(
    "change",
    [dict(text_length=9), dict(tokenizer="bpe:300"), dict(long_texts="truncate"), dict(missing="skip")],
    ids=str,
)
def test_another_preparation_is_left_alone(stories, tmp_path, change):
    out = tmp_path / "out"
    prepared(stories, out)
    before = files_of(out)
    stories.data.update(change)
    stories.model.vocabulary = 300
    name = "contents" if "missing" in change else next(iter(change))
    with pytest.raises(UserError, match=rf"out holds another preparation: its {name} is .*; choose another directory"):
        prepared(stories, out)
    assert files_of(out) == before


def test_other_texts_are_another_preparation(stories, tmp_path):
    prepared(stories, tmp_path / "out")
    write_stories(tmp_path / "stories.jsonl", random())
    with pytest.raises(UserError, match="out holds another preparation: its contents is"):
        prepared(stories, tmp_path / "out")


def test_other_files_are_left_alone(stories, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years")
    with pytest.raises(UserError, match="out holds other files and no preparation; choose an empty or new directory"):
        prepared(stories, tmp_path / "out")
    assert [*files_of(tmp_path / "out")] == ["thesis.tex"]
    with pytest.raises(UserError, match=r"thesis.tex cannot be used \(.*\); choose a directory that can be written"):
        prepared(stories, tmp_path / "out" / "thesis.tex")


def test_two_commands_do_not_prepare_one_directory(stories, tmp_path):
    with (
        preparation._held(tmp_path / "out"),
        pytest.raises(UserError, match="another command prepares it; wait for that"),
    ):
        prepared(stories, tmp_path / "out")
    prepared(stories, tmp_path / "out")


BAD = [
    ('{"text": "good"}\n{"text": \n', r"stories.jsonl, line 2: not JSON"),
    ('{"text": "good"}\n{"body": "bad", "n": 1}\n', r"line 2: no field 'text' \(data.field\); it has: body, n"),
    ('{"text": ""}\n', "is empty: no text of at least 2 tokens"),
]


@pytest.mark.parametrize(("content", "told"), BAD, ids=["torn", "field", "empty"])
def test_bad_input_is_told_in_one_line(stories, tmp_path, content, told):
    (tmp_path / "stories.jsonl").write_text(content)
    with pytest.raises(UserError, match=told):
        prepared(stories, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (dict(corpus="csv"), "data.corpus = 'csv' is unknown; choose one of: stdlib, files"),
        (dict(corpus="induction", tokenizer="bytes"), "data.corpus = 'induction' is unknown"),
        (
            dict(corpus="prepared"),
            "'prepared' is tokenised already; choose one of: stdlib, files, jsonl, parquet, hugg",
        ),
        (dict(path=""), "data.path is empty"),
        (dict(long_texts="refuse"), r"line \d+ has \d+ tokens, over data.text_length = 4"),
        (dict(text_bytes=9), "data.long_texts = 'split' would cut by tokens"),
    ],
    ids=str,
)
def test_what_cannot_be_prepared_is_refused(stories, tmp_path, change, told):
    stories.data.update(change)
    with pytest.raises(UserError, match=told):
        prepared(stories, tmp_path / "out")


def test_lost_letters_are_refused_or_counted(stories, tmp_path):
    from tokenizers import Tokenizer, models

    Tokenizer(models.BPE({letter: n for n, letter in enumerate("abcdef </s>")}, [])).save(str(tmp_path / "few.json"))
    # Of a text that ends in spaces a loss may go unseen: tokens behind what a BPE drops say that they begin earlier.
    lines = [json.loads(line) for line in (tmp_path / "stories.jsonl").read_text().splitlines()]
    lines = [line | {"text": line["text"].rstrip()} for line in lines]
    (tmp_path / "stories.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    stories.data.tokenizer = str(tmp_path / "few.json")
    with pytest.raises(UserError, match=r"few.json' loses \d+ of \d+ characters .*set data.lossy to keep"):
        prepared(stories, tmp_path / "out")
    stories.data.lossy = "keep"
    made = prepared(stories, tmp_path / "out")
    assert made["lost"] == sum(line["text"].count(letter) for line in lines for letter in "ghßü€")
    config = of_prepared(stories, tmp_path / "out")
    lab.data.open(config)
    config.data.lossy = "refuse"
    with pytest.raises(UserError, match=r"set data.lossy to keep"):
        lab.data.open(config)


def test_a_stream_is_read_no_further_than_asked(stories, tmp_path, monkeypatch):
    def endless(path):
        for n in itertools.count():
            yield f"{path}, row {n}", {"text": f"{n} of a stream that never ends"}

    monkeypatch.setattr(reading, "huggingface", endless)
    stories.data.update(corpus="huggingface", path="name", texts=200)
    made = prepared(stories, tmp_path / "out")
    assert made["train"]["texts"] >= 200 and made["validation"]["texts"] >= 6
    before = sum(run.get("train", {"texts": 0})["texts"] for run in made["shards"][:-1])
    held_out = sum(run.get("validation", {"texts": 0})["texts"] for run in made["shards"][:-1])
    assert before < 200 or held_out < 6  # it stopped as soon as it could
    assert len(lab.data.open(of_prepared(stories, tmp_path / "out")).train) == 200
    numbers = {int(path.name[6:11]) for path in (tmp_path / "out").glob("train-*")}
    assert numbers == {*range(len(made["shards"]))}  # what was made ahead is gone
    again = prepared(stories, tmp_path / "again", workers=1)
    assert again == made


def test_a_shard_that_a_full_disk_cuts_is_none(stories, tmp_path, monkeypatch, undisturbed):
    """The writer tells of it at the latest when it is closed; nothing is left that would be taken for whole."""
    out, begin = tmp_path / "out", shards._ShardWriter.__init__

    def begin_on_a_full_disk(self, directory, split, number, dtype):
        begin(self, directory, split, number, dtype)
        if number == 2:
            self._draft.symlink_to("/dev/full")

    with monkeypatch.context() as patch:
        patch.setattr(shards._ShardWriter, "__init__", begin_on_a_full_disk)
        with pytest.raises(OSError, match=r"No space left on device: '.*-00002.array_record'") as found:
            prepared(stories, out)
    assert found.value.errno == errno.ENOSPC
    assert not [*out.glob("*-00002.*")] and not (out / "parts" / "00002.json").exists()
    prepared(stories, out)
    assert files_of(out) == undisturbed


def test_the_command_says_what_it_made(stories, tmp_path, capsys):
    (tmp_path / "study.py").write_text(STUDY.format(path=stories.data.path))
    prepare.main([f"--config={tmp_path / 'study.py'}", f"--out={tmp_path / 'out'}", "--workers=1"])
    told = capsys.readouterr().out
    assert "600 documents of" in told and f"--config.data.corpus=prepared --config.data.path={tmp_path}/out" in told
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["command"] == f"python -m lab.prepare --config={tmp_path}/study.py --out={tmp_path}/out"
    with pytest.raises(UserError, match="--workers = 0 is too few"):
        prepare.main([f"--config={tmp_path / 'study.py'}", f"--out={tmp_path / 'out'}", "--workers=0"])


KILLED = """
import pathlib, sys
from shelves import prepared
from lab.command import load_config

if __name__ == "__main__":
    prepared(load_config(sys.argv[1]), pathlib.Path(sys.argv[2]), workers=2)
"""


@pytest.mark.slow
def test_a_killed_one_leaves_no_processes_and_goes_on(stories, tmp_path):
    write_stories(tmp_path / "stories.jsonl", random(), 3000)
    (tmp_path / "study.py").write_text(STUDY.format(path=stories.data.path))
    (tmp_path / "program.py").write_text(KILLED)
    here = os.path.dirname(__file__)
    environment = os.environ | dict(PYTHONPATH=f"{os.path.dirname(os.path.dirname(here))}:{here}")
    out = tmp_path / "out"
    words = [sys.executable, tmp_path / "program.py", tmp_path / "study.py", out]
    program = subprocess.Popen(words, env=environment, cwd=tmp_path)
    while len([*out.glob("train-*")]) < 3 and program.poll() is None:
        time.sleep(0.01)
    children = psutil.Process(program.pid).children(recursive=True)
    program.send_signal(signal.SIGKILL)
    program.wait()
    assert children
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive and "shards" not in json.loads((out / "manifest.json").read_text())
    prepared(stories, out)
    prepared(stories, tmp_path / "undisturbed")
    assert files_of(out) == files_of(tmp_path / "undisturbed")
