"""Prepares a corpus: its texts in shards, made by several processes; a command that was killed goes on.

Runs of documents are cut by their characters alone, so that the files are the same whatever the number of processes and
whatever was there before.
"""

import collections
import concurrent.futures
import contextlib
import functools
import multiprocessing
import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import filelock
from ml_collections import ConfigDict

from lab import storage
from lab.data import bytewise, cache, corpora, dataset, outgoing, reading, shards, sources, texts, tokenizers
from lab.data.corpora import Document
from lab.data.pipeline import follow_parent
from lab.data.shards import MANIFEST, PARTS, SPLITS
from lab.data.tokenizers import Tokenizer
from lab.errors import UserError, choose
from lab.storage import read_json, write_json

CHARACTERS = (
    2**26
)  # of the documents of a shard, or a document more; a process holds one such run, another waits for it
_FORMAT = 1  # of the files; a change makes another preparation
_CUT = ("text_length", "long_texts", "text_bytes")
_COUNTS = ("documents", "missing", "characters", "bytes")
_LOCK = ".lock"

Told = Callable[[dict, bool], None]


def prepare(
    config: ConfigDict, out: str | Path, workers: int, command: str, told: Told, characters: int = CHARACTERS
) -> dict:
    """Fills `out`, a directory here or in an object store, with the texts of config.data, tokenised, and gives its
    manifest.

    told: is called with what is told of each run of documents, in order, and whether its shards were there and whole.
    Of a streamed corpus no more is read than config.data.texts and the asks want, in whole runs. Raises UserError for
    what dataset.open refuses, for a directory that holds anything else, and where a process has died.
    """
    data = config.data
    choose("data.corpus", data.corpus, corpora.CORPORA)
    sources.check(config)
    if missing := dataset.unnamed(config):
        raise UserError(missing)
    corpus = corpora.open(data)
    tokenizer = tokenizers.open(data, corpus)
    dataset.check_vocabulary(config, tokenizer)
    if data.text_bytes:
        bytewise.check(tokenizer, data.text_bytes)
    cut = {name: data[name] for name in _CUT}
    wanted = dataset.most(config, corpus)
    about = dict(cut, format=_FORMAT, corpus=data.corpus, contents=corpus.fingerprint, characters=characters)
    about |= dict(eos=data.eos, tokenizer=tokenizer.fingerprint, texts=data.texts if corpus.streamed else 0)
    url = str(out) if storage.is_remote(out) else ""
    with outgoing.room(url) if url else _held(Path(out)) as here:
        there = _begin(here, out, about, command, data.tokenizer, tokenizer)
        if url:
            outgoing.put(here, url, MANIFEST, tokenizers.FILE)
        made, found, lost = [], Counter(), Counter()
        runs = (run for run in texts.chunks(corpus.read(), characters) if run)
        with _processes(workers) as submit:
            write = functools.partial(submit, _write, here, url, data.eos, cut)
            for one, kept in _made(runs, functools.partial(_kept, here, url), write, 2 * workers):
                made.append(one)
                found.update({name: one[name] for name in _COUNTS})
                found.update({split: one[split]["texts"] for split in SPLITS if split in one})
                lost.update(one["lost"])
                texts.check_lost(data.lossy, found | texts.told_of(lost), corpus.searched, tokenizer)
                told(one, kept)
                if None not in wanted and all(found[s] >= most for s, most in zip(SPLITS, wanted, strict=True)):
                    break
        if not any(found[split] for split in SPLITS):
            raise dataset.empty(corpus.searched)
        counts = {name: found[name] for name in _COUNTS} | texts.told_of(lost)
        manifest = _finish(here, there | {"searched": corpus.searched} | counts, made, shards.dtype_of(tokenizer))
        if url:
            outgoing.finish(here, url, manifest)
        return manifest


@contextlib.contextmanager
def _held(out: Path) -> Iterator[Path]:
    """Makes the directory, and keeps other commands out of it. Raises UserError, also where it holds anything else."""
    try:
        if out.is_dir() and not (out / MANIFEST).exists() and any(entry.name != PARTS for entry in out.iterdir()):
            raise outgoing.taken(out)
        (out / PARTS).mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(out / PARTS / _LOCK)
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise UserError(f"--out={out}: another command prepares it; wait for that, or choose another") from None
    except OSError as error:
        raise UserError(
            f"--out={out} cannot be used ({error.strerror or error}); choose a directory that can be written"
        ) from error
    try:
        yield out
    finally:
        lock.release()


def _begin(here: Path, out: str | Path, about: dict, command: str, name: str, tokenizer: Tokenizer) -> dict:
    """Says in the directory what is prepared there. Raises UserError where that is something else."""
    path = here / MANIFEST
    there = read_json(path) if path.exists() else {}
    if there:
        before = there.get("about", {})
        if differ := [field for field in about if before.get(field) != about[field]]:
            raise UserError(
                f"--out={out} holds another preparation: its {differ[0]} is {before.get(differ[0])!r}, and here it is "
                f"{about[differ[0]]!r}; choose another directory"
            )
    else:
        there = {"command": command, "about": about, "tokenizer": name}
        write_json(path, there)
    tokenizer.save(here)
    return {field: there[field] for field in ("command", "about", "tokenizer")}


@contextlib.contextmanager
def _processes(workers: int) -> Iterator[Callable[..., concurrent.futures.Future]]:
    """What does things elsewhere: in processes that end with this one; of a single worker, in a thread."""
    if workers == 1:
        pool = concurrent.futures.ThreadPoolExecutor(1)
    else:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        pool = concurrent.futures.ProcessPoolExecutor(workers, context, _start)
    others = multiprocessing.active_children()
    try:
        yield pool.submit
    except BaseException:
        for process in multiprocessing.active_children():
            if process not in others:
                process.terminate()  # else an interrupted command would wait for what it has begun
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _start() -> None:
    follow_parent()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # what ends the others, where one has died
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # every core has a process already


def _made(runs: Iterable[list[Document]], kept: Callable, write: Callable, most: int) -> Iterator[tuple[dict, bool]]:
    """What is told of each run, in order, and whether it was there before. So many runs are in memory at most."""
    waiting: collections.deque = collections.deque()
    for number, run in enumerate(runs):
        there = kept(number)
        # A stream may hold other documents than before.
        if there and [there["documents"], there["characters"]] != [len(run), sum(len(each.text) for each in run)]:
            there = None
        waiting.append(there or write(number, run))
        if len(waiting) >= most:
            yield _settled(waiting.popleft())
    yield from map(_settled, waiting)


def _settled(one: dict | concurrent.futures.Future) -> tuple[dict, bool]:
    if isinstance(one, dict):
        return one, True
    try:
        return one.result(), False
    except concurrent.futures.BrokenExecutor as error:
        raise UserError(
            "a process that prepares shards has died, for lack of memory perhaps; run the same command again, with "
            "fewer --workers: it goes on"
        ) from error


def _kept(here: Path, url: str, number: int) -> dict | None:
    return outgoing.kept(here, url, number) if url else shards.kept(here, number)


def _write(here: Path, url: str, eos: str, cut: dict, number: int, documents: list[Document]) -> dict:
    told = shards.write(here, number, documents, _tokenizer(here, eos), cut)
    if url:
        outgoing.put_run(here, url, number, told)
    return told


@functools.cache
def _tokenizer(out: Path, eos: str) -> Tokenizer:
    return tokenizers.load(out, eos)


def _finish(out: Path, manifest: dict, made: list[dict], dtype: str) -> dict:
    """Joins the lengths, removes what a killed command has left, and writes the manifest as the last."""
    manifest = manifest | {"dtype": dtype}
    for split in SPLITS:
        of_split = {number: one[split] for number, one in enumerate(made) if split in one}
        draft = out / f".{shards.lengths_of(split)}"
        with draft.open("wb") as joined:
            for number in of_split:
                with shards.lengths_of_part(out, split, number).open("rb") as part:
                    shutil.copyfileobj(part, joined)
        os.replace(draft, out / shards.lengths_of(split))
        told = {name: sum(shard[name] for shard in of_split.values()) for name in ("texts", "tokens")}
        if any("bytes" in shard for shard in of_split.values()):
            told["bytes"] = sum(shard["bytes"] for shard in of_split.values())
        digest = cache.digest(*(shard["contents"] for shard in of_split.values()))
        manifest[split] = told | {"digest": digest, "lengths": reading.digest(out / shards.lengths_of(split))}
    manifest["shards"] = [{split: one[split] for split in SPLITS if split in one} for one in made]
    _remove_others(out, len(made))
    write_json(out / MANIFEST, manifest)
    return manifest


def _remove_others(out: Path, count: int) -> None:
    """Drafts, and the shards of runs from `count` on, which no longer belong to the preparation."""
    for path in [*out.glob("[tv]*-*.array_record"), *(out / PARTS).glob("[0-9]*.*")]:
        if int(path.name.partition(".")[0].rpartition("-")[2]) >= count:
            path.unlink()
    for path in [*out.glob(".*"), *(out / PARTS).glob(".*")]:
        if path.name != _LOCK:
            path.unlink()
