"""Files that disks, networks and people have changed: the right result or one line, no traceback, no other number.

HOSTILE=1000 tries so many of each file, and tells at the end what became of them.
"""

import collections
import gzip
import os
import pathlib
import shutil

import commands
import hostile
import jax
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import lab
import lab.config
from lab import command, main, report
from lab import data as lab_data
from lab.errors import UserError
from lab.study import results

EXAMPLES = int(os.environ.get("HOSTILE", 0))
TEXTS = [f"{a} {b} {c}" for a in ("river", "stone", "lamp") for b in ("winter", "paper") for c in range(40)]
STEPS = 10
COUNTS: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)  # of what happened, by test


def event(what: str) -> None:
    COUNTS[os.environ["PYTEST_CURRENT_TEST"].partition("::")[2].partition(" ")[0]][what] += 1


@pytest.fixture(scope="module", autouse=True)
def counts(request):
    yield
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        for test, counted in COUNTS.items() if EXAMPLES else ():
            told = ", ".join(f"{what} {count}" for what, count in counted.most_common())
            print(f"\n{test}: {counted.total()} tried; {told}")


def examples(few: int) -> settings:
    """So many, or as HOSTILE says."""
    return settings(max_examples=EXAMPLES or few, deadline=None, suppress_health_check=[*HealthCheck])


def outcome(action):
    """(what an action returns, None), or (None, the line that it ends with)."""
    try:
        found = action()
    except UserError as error:
        assert str(error) and "\n" not in str(error).strip(), str(error)
        event("refused in one line")
        return None, str(error)
    event("goes on")
    return found, None


# What a user gives.


def corpora(place: pathlib.Path) -> dict[str, pathlib.Path]:
    """By data.corpus, or what of it: the file of a sound corpus."""
    frame = pd.DataFrame({"text": TEXTS})
    frame.to_json(place / "a.jsonl", orient="records", lines=True)
    (place / "a.jsonl.gz").write_bytes(gzip.compress((place / "a.jsonl").read_bytes()))
    pq.write_table(pa.Table.from_pandas(frame), place / "a.parquet", row_group_size=50)
    (place / "a.txt").write_text("\n".join(TEXTS * 10))
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=270, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    )
    made.save(str(place / "tokenizer.json"))
    return {path.name: path for path in place.iterdir()}


def config_of(path: pathlib.Path, tokenizer: str = "bytes"):
    """A config whose texts are in `path`."""
    made = lab.config.branches(lab.config.base())
    corpus = {".txt": "files", ".parquet": "parquet"}.get(path.suffix, "jsonl")
    made.data.update(corpus=corpus, path=str(path), tokenizer=tokenizer, text_length=8, texts_per_row=4, draw="1-3")
    made.evaluate.loss.update(branches=(1, 2), texts=4, texts_per_row=4, rows=1)
    made.model.vocabulary = 512
    return made


def opened(config):
    """(the fingerprints, all tokens) of the data that a config names."""
    found = lab_data.open(config)
    tokens = [np.concatenate([split[i] for i in range(len(split))]) for split in (found.train, found.validation)]
    return (found.fingerprint, found.validation_fingerprint, found.tokenizer.fingerprint), np.concatenate(tokens)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet", "a.txt", "tokenizer.json"])
def test_what_is_given(name, tmp_path, monkeypatch):
    monkeypatch.setenv("LAB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "given").mkdir()
    files = corpora(tmp_path / "given")
    tokenizer = str(files["tokenizer.json"]) if name == "tokenizer.json" else "bytes"
    config = config_of(files["a.jsonl" if name == "tokenizer.json" else name], tokenizer)
    sound = files[name].read_bytes()
    assert len(opened(config)[1]) > 500

    @examples(25)
    @given(hostile.damages(sound))
    def tried(content):
        files[name].write_bytes(content)
        found, line = outcome(lambda: opened(config))
        if line is None:
            np.testing.assert_array_equal(opened(config)[1], found[1])
            assert found[1].min() >= 0 and found[1].max() < config.model.vocabulary

    tried()


def test_what_a_config_holds(tmp_path):
    place = tmp_path / "tiny.py"
    sound = commands.write_study(place, commands.write_corpus(tmp_path / "corpus.jsonl")).read_bytes()

    @examples(40)
    @given(hostile.damages(sound))
    def tried(content):
        place.write_bytes(content)
        outcome(lambda: command.parse(command.parser("", "lab"), [f"--config={place}"]))

    tried()


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:264"])
def test_what_is_cached(tokenizer, tmp_path, monkeypatch):
    """An entry that is damaged is made again."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("LAB_CACHE", str(cache))
    (tmp_path / "given").mkdir()
    config = config_of(corpora(tmp_path / "given")["a.jsonl"], tokenizer)
    names, tokens = opened(config)
    kept = {path: path.read_bytes() for path in sorted(cache.rglob("*")) if path.is_file()}
    assert len(kept) >= 5

    @examples(60)
    @given(st.data())
    def tried(data):
        shutil.rmtree(cache)
        for each, sound in kept.items():
            each.parent.mkdir(parents=True, exist_ok=True)
            each.write_bytes(sound)
        path = data.draw(st.sampled_from(sorted(kept)), "file")
        content = data.draw(st.none() | hostile.damages(kept[path]), "content")
        path.unlink() if content is None else path.write_bytes(content)
        again, found = opened(config)
        assert again == names
        np.testing.assert_array_equal(found, tokens)
        event(path.name.rpartition(".")[2])

    tried()


# What the lab leaves in the directory of a study, and reads back.

FINISHED = ("plan.json", "config.json", "identity.json", "result.json", "segments.json", "metrics.jsonl", "loss-", "")
BEGUN = ("plan.json", "config.json", "identity.json", "segments.json", "metrics.jsonl", "checkpoints")


class Study:
    """A study of one run, in this process."""

    def __init__(self, place: pathlib.Path):
        corpus = commands.write_corpus(place / "corpus.jsonl", 300)
        self.config = commands.write_study(
            place / "tiny.py", corpus, commands.ONE_CELL, sections=("curves",), steps=STEPS
        )
        self.work, self.sound = place / "work", place / "sound"
        self.run()
        shutil.copytree(self.work, self.sound)
        (self.run_directory,) = self.sound.glob("cells/*/seed-0")
        self.results = (self.sound / "results.csv").read_bytes()
        self.losses = self.logged(self.run_directory)
        self.weights = jax.device_get(jax.tree.leaves(lab.load(self.run_directory)[0]))

    def run(self) -> int:
        doubled = ("--config.data.rows=8", "--config.evaluate.loss.rows=8", "--config.evaluate.loss.texts=32")
        return main.main([f"--config={self.config}", f"--workdir={self.work}", *doubled])

    def logged(self, run: pathlib.Path) -> list:
        return [(line["step"], line["loss"], line["tokens"]) for line in results.metrics(run)]

    def files(self, name: str) -> list[pathlib.Path]:
        """Of the sound study, relative to it: those whose path has the name in it."""
        found = [path.relative_to(self.sound) for path in sorted(self.sound.rglob("*")) if path.is_file()]
        kept = [path for path in found if "tensorboard" not in path.parts and path.name != ".lock"]
        return [path for path in kept if name in path.as_posix()]

    def place(self, begun: bool) -> None:
        """A copy of the sound study, or of what it was halfway."""
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self.sound, self.work)
        if begun:
            run = self.work / self.run_directory.relative_to(self.sound)
            (run / "result.json").unlink()
            shutil.rmtree(run / "evaluations")
            shutil.rmtree(run / "checkpoints" / str(STEPS))
            lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
            (run / "metrics.jsonl").write_text("".join(lines[: STEPS // 2 + 1]))


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_NUM_CPU_DEVICES", "8")  # those that are there
        patch.setattr(main.runtime, "stop_requests", lambda: lambda step: False)
        yield Study(tmp_path_factory.mktemp("hostile"))


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("begun", [False, True], ids=["finished", "begun"])
def test_what_a_study_leaves(study, begun):
    """The command ends as if nothing had been, or in one line with every other file as it was."""

    @examples(6 if begun else 12)
    @given(st.data())
    def tried(data):
        study.place(begun)
        name = data.draw(st.sampled_from(BEGUN if begun else FINISHED), "kind")
        there = [path for path in study.files(name) if (study.work / path).exists()]
        path = data.draw(st.sampled_from(there), "file")
        content = data.draw(st.none() | hostile.damages((study.work / path).read_bytes()), "content")
        (study.work / path).unlink() if content is None else (study.work / path).write_bytes(content)
        before = {file: file.read_bytes() for file in study.work.rglob("*") if file.is_file() and file.name != ".lock"}
        event(path.name if "checkpoints" not in path.parts else "checkpoint")
        code, line = outcome(study.run)
        if line is not None:
            assert all(file.read_bytes() == held for file, held in before.items())
            return
        assert code == 0
        assert (study.work / "results.csv").read_bytes() == study.results
        (run,) = study.work.glob("cells/*/seed-0")
        logged = study.logged(run)
        assert logged == study.losses or (not begun and {*logged} < {*study.losses})

    tried()


@pytest.mark.slow
def test_what_is_read_alone(study):
    """A report and a model of a damaged study: what they were, or one line."""

    @examples(15)
    @given(st.data())
    def tried(data):
        study.place(False)
        kind = data.draw(st.sampled_from([*FINISHED[:-1], "checkpoints", "tokenizer.json"]), "kind")
        path = study.work / data.draw(st.sampled_from(study.files(kind)), "file")
        path.write_bytes(data.draw(hostile.damages(path.read_bytes()), "content"))
        if outcome(lambda: report.rebuild(study.work))[1] is None:
            rows = (study.work / "results.csv").read_bytes().splitlines()[1:]
            assert rows in ([], study.results.splitlines()[1:])
        loaded, line = outcome(lambda: lab.load(study.work / study.run_directory.relative_to(study.sound)))
        if line is None:
            for ours, theirs in zip(jax.device_get(jax.tree.leaves(loaded[0])), study.weights, strict=True):
                np.testing.assert_array_equal(ours, theirs)

    tried()
