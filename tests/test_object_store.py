"""A study in an object store whose server fails 5% of all requests: killed, damaged, divided, read; and its corpus.

In an environment of its own, which has s3fs and a server: make test-storage, in ten minutes or so.
"""

import json
import os
import pathlib
import signal
import socket
import sys

import commands
import jax
import numpy as np
import object_store
import pytest

import lab
import lab.data
from lab import command, storage
from lab.data import preparation, reading
from lab.errors import UserError
from lab.model import parameter
from lab.remote import store as stores
from lab.remote.mirror import SEAL

pytest.importorskip("moto")
s3fs = pytest.importorskip("s3fs")
pytestmark = pytest.mark.slow
SHARE, SEED = 0.05, 7
# The command with short times: what a killed program held is nobody's after 6 seconds.
MAIN = "from lab import main, command; from lab.remote import mirror; mirror.EXPIRES, mirror.EVERY = 6.0, 0.5; "
SLOWLY = "import time; from lab.study.run import log; step = log.Log.step; "  # steps that leave time to kill it
SLOWLY += "log.Log.step = lambda *record: (time.sleep(0.2), step(*record)); "


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def server(place):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with object_store.running(port, SHARE, SEED, place / "server.log") as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        patch.delenv("AWS_PROFILE", raising=False)
        files().mkdir(object_store.BUCKET)
        yield server
        counts = server.counts()
        print(f"\nthe server was asked {counts}")
        if counts["requests"] > 400:
            assert counts["not carried out"] > 5 and counts["answer lost"] > 5


def files():
    return s3fs.S3FileSystem(
        skip_instance_cache=True, use_listings_cache=False, config_kwargs={"retries": {"max_attempts": 8}}
    )


@pytest.fixture(scope="module")
def corpus(place):
    return commands.write_corpus(place / "corpus.jsonl")


def undisturbed(place, corpus, name: str, **cells) -> tuple[pathlib.Path, pathlib.Path]:
    """(the config, the directory on this machine) of a study that ran in peace."""
    study = commands.write_study(place / f"{name}.py", corpus, **cells)
    commands.finished("main", f"--config={study}", f"--workdir={place / name}", log=place / f"{name}-log")
    return study, place / name


@pytest.fixture(scope="module")
def one_cell(place, corpus):
    return undisturbed(place, corpus, "one", cells=commands.ONE_CELL)


@pytest.fixture(scope="module")
def four_cells(place, corpus):
    return undisturbed(place, corpus, "four")


def launched(study, url: str, log: pathlib.Path, first: str = "") -> commands.Process:
    """The command. first: what is done before."""
    arguments = f"[{f'--config={study}'!r}, {f'--workdir={url}'!r}]"
    return commands.Process([sys.executable, "-c", f"{MAIN}{first}import sys; sys.exit(main.main({arguments}))"], log)


def there(url: str) -> list[str]:
    """The names of all objects below a URL."""
    root = url.partition("://")[2]
    return [name.removeprefix(f"{root}/") for name in files().find(root)]


def fetched(url: str, to: pathlib.Path) -> pathlib.Path:
    """All of it, as it is."""
    source = files()
    for name in there(url):
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        source.get_file(f"{url}/{name}", str(to / name))
    return to


def sealed(url: str) -> list[int]:
    return sorted(
        int(name.split("/")[-2]) for name in there(url) if name.endswith(f"/{SEAL}") and "set_aside" not in name
    )


def test_killed_and_damaged_it_ends_as_if_nothing_had_been(place, server, one_cell):
    study, peaceful = one_cell
    url = f"s3://{object_store.BUCKET}/killed"
    killed = launched(study, url, place / "killed-log", SLOWLY)
    assert killed.until(lambda: len(found := sealed(url)) > 1 and found[-1] < commands.STEPS), killed.told()
    killed.signal(signal.SIGKILL)
    killed.wait()
    assert any("/.lease." in name for name in there(url))
    newest = sealed(url)[-1]
    damaged = [name for name in there(url) if f"checkpoints/{newest}/state/" in name and "/d/" in name]
    for name in damaged:
        content = bytearray(files().cat_file(f"{url}/{name}"))
        content[len(content) // 2] ^= 1
        files().pipe_file(f"{url}/{name}", bytes(content))
    again = launched(study, url, place / "again-log")
    assert again.wait() == 0, again.told()
    assert f"checkpoints/{newest} cannot be read" in again.err and "Traceback" not in again.err, again.told()
    aside = [name for name in there(url) if f"/set_aside/{newest}-1/state/" in name]
    assert len([name for name in aside if "/d/" in name]) == len(damaged)
    assert sealed(url)[-1] == commands.STEPS
    assert not any("/.lease." in name or name.startswith(".") for name in there(url))
    commands.same_results(fetched(url, place / "killed"), peaceful)


def test_two_programs_divide_the_runs(place, server, four_cells):
    study, peaceful = four_cells
    url = f"s3://{object_store.BUCKET}/divided"
    programs = [launched(study, url, place / f"divided-{number}") for number in range(2)]
    assert [program.wait() for program in programs] == [0, 0], [program.told() for program in programs]
    made = [program.out.count(": begins\n") for program in programs]
    assert sum(made) == 4 and min(made) > 0, made
    assert all("4 of 4 runs done, 0 failed" in program.out for program in programs)
    commands.same_results(fetched(url, place / "divided"), peaceful)


def test_it_is_read_as_if_it_were_here(place, server, one_cell):
    """Its report and a model, of a study that was made here and uploaded by another tool."""
    _, peaceful = one_cell
    url, to = f"s3://{object_store.BUCKET}/uploaded", files()
    for path in (path for path in peaceful.rglob("*") if path.is_file() and path.name != "results.csv"):
        to.put_file(str(path), f"{url}/{path.relative_to(peaceful).as_posix()}")
    told = commands.finished("report", url, log=place / "report-log")
    assert f"{url}/report.html" in told.out.splitlines()
    assert to.cat_file(f"{url}/results.csv") == (peaceful / "results.csv").read_bytes()
    (run,) = commands.runs(peaceful).values()
    for end in ("", "/seed-0", "/seed-0/checkpoints/30"):
        theirs, _ = lab.load(f"{url}/cells/{run.parent.name}{end}")
        ours, _ = lab.load(f"{run.parent}{end}")
        pairs = zip(*(jax.tree.leaves(parameter.split(model)[1]) for model in (ours, theirs)), strict=True)
        assert all(np.array_equal(one, other) for one, other in pairs), end
    with pytest.raises(UserError, match=r"has no checkpoint 35|does not exist"):
        lab.load(f"{url}/cells/{run.parent.name}/seed-0/checkpoints/35")
    with pytest.raises(UserError, match="is in no cell"):
        lab.load(f"{url}/nowhere")


PREPARE = "import functools, sys; from lab import prepare; from lab.data import preparation; "
PREPARE += "preparation.prepare = functools.partial(preparation.prepare, characters=1000); prepare.main(sys.argv[1:])"


def shards_in(url: str) -> list[str]:
    return [name for name in there(url) if name.startswith("train-")]


def test_a_killed_preparation_goes_on_in_a_bucket(place, server, corpus):
    """Twice, on other machines: nothing but the bucket is left. It is that of a directory then."""
    study = commands.write_study(place / "prepared.py", corpus)
    url, here = f"s3://{object_store.BUCKET}/corpora/killed", place / "killed-here"
    made = preparation.prepare(command.load_config(str(study)), here, 1, "", lambda *_: None, characters=1000)
    assert len(made["shards"]) > 20
    for number, enough in enumerate((3, 12, None)):
        words = [sys.executable, "-c", PREPARE, f"--config={study}", f"--out={url}", "--workers=2"]
        process = commands.Process(words, place / f"prepare-{number}", LAB_CACHE=str(place / f"machine-{number}"))
        if enough:
            assert process.until(lambda enough=enough: len(shards_in(url)) >= enough), process.told()
            process.signal(signal.SIGKILL)
            process.wait()
            assert "shards" not in json.loads(files().cat_file(f"{url}/manifest.json"))
        else:
            assert process.wait() == 0 and process.err.count("\n") <= 1, process.told()
    found = {path.relative_to(here).as_posix() for path in here.rglob("*") if path.is_file()} - {"parts/.lock"}
    assert {*there(url)} == found
    for name in found - {"manifest.json"}:
        assert files().cat_file(f"{url}/{name}") == (here / name).read_bytes(), name
    ours, theirs = (
        json.loads(files().cat_file(f"{url}/manifest.json")),
        json.loads((here / "manifest.json").read_text()),
    )
    assert ours.pop("command").endswith(f"--out={url}") and theirs.pop("command") == ""
    assert ours | {storage.SEAL: ""} == theirs | {storage.SEAL: ""}


READER = """
import hashlib, sys
import lab.data
from lab import command

config = command.load_config(sys.argv[1])
config.data.update(corpus="prepared", path=sys.argv[2], draw="1-3")
sums = hashlib.sha256()
for batch, info in lab.data.train_batches(config, lab.data.open(config).train):
    sums.update(batch.tokens.tobytes() + batch.coordinates.time.tobytes() + repr(info).encode())
print(sums.hexdigest())
"""


def test_shards_in_a_bucket_train_as_those_of_a_directory(place, server, corpus, one_cell):
    """Two processes of one machine fetch them at once, and a study finds them there. Then one is damaged."""
    study, peaceful = one_cell
    url, here = f"s3://{object_store.BUCKET}/corpora/texts", place / "texts"
    config = command.load_config(str(study))
    made = preparation.prepare(config, here, 1, "python -m lab.prepare ...", lambda *_: None, characters=2000)
    assert len(made["shards"]) > 10
    for path in (path for path in here.rglob("*") if path.is_file()):
        files().put_file(str(path), f"{url}/{path.relative_to(here).as_posix()}")
    cache = place / "cache"
    readers = [
        commands.Process([sys.executable, "-c", READER, study, path], place / f"reader-{number}", LAB_CACHE=str(cache))
        for number, path in enumerate((url, url, here))
    ]
    assert [reader.wait() for reader in readers] == [0, 0, 0], [reader.told() for reader in readers]
    assert len({reader.out for reader in readers}) == 1
    fetched = {path: path.stat().st_mtime_ns for path in (cache / "shards").glob("*.array_record")}
    assert fetched and all(reading.digest(path) == path.stem for path in fetched)
    assert not [path for path in (cache / "shards").iterdir() if path.is_dir()]
    words = f"--config={study}", "--config.data.corpus=prepared", f"--config.data.path={url}"
    commands.finished("main", *words, f"--workdir={place / 'read'}", log=place / "read-log", LAB_CACHE=str(cache))
    assert (place / "read" / "results.csv").read_bytes() == (peaceful / "results.csv").read_bytes()
    (ours,), (theirs,) = (commands.runs(each).values() for each in (place / "read", peaceful))
    assert commands.metrics(ours) == commands.metrics(theirs)
    assert all(path.stat().st_mtime_ns == time for path, time in fetched.items())
    (first, *_) = (shard["train"] for shard in made["shards"] if "train" in shard)
    content = bytearray(files().cat_file(f"{url}/{first['file']}"))
    content[len(content) // 2] ^= 1
    files().pipe_file(f"{url}/{first['file']}", bytes(content))
    again = *words, "--config.train.steps=50", f"--workdir={place / 'refused'}"
    refused = commands.finished("main", *again, log=place / "bad-log", code=2, LAB_CACHE=str(place / "other-cache"))
    assert refused.err.splitlines()[-1].startswith(
        f"lab: {url}/{first['file']} is damaged: it is not what was prepared"
    )
    assert "Traceback" not in refused.err
    for bucket, told in (("nowhere", "there is no bucket 'nowhere'"), (object_store.THEIRS, "is not ours to use")):
        config.data.update(corpus="prepared", path=f"s3://{bucket}/texts")
        with pytest.raises(UserError, match=rf"^s3://{bucket}/texts: .*{told}"):
            lab.data.open(config)
    config.data.path = f"s3://{object_store.BUCKET}/nothing"
    with pytest.raises(UserError, match=r"has no manifest\.json"):
        lab.data.open(config)


@pytest.mark.parametrize(
    ("bucket", "removed", "told"),
    [
        ("nowhere", (), "s3://nowhere/x: there is no bucket 'nowhere'; create it, or choose another"),
        (object_store.THEIRS, (), "s3://theirs/x: the bucket 'theirs' is not ours to use"),
        (
            object_store.BUCKET,
            ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"),
            "s3://bucket/x: there are no credentials; set AWS_ACCESS_KEY_ID",
        ),
    ],
)
def test_a_bucket_that_cannot_be_used_is_one_line(place, server, bucket, removed, told):
    environment = {"HOME": str(place)}
    with pytest.MonkeyPatch.context() as patch:
        for name in removed:
            patch.delenv(name)
        found = commands.finished("report", f"s3://{bucket}/x", log=place / "refused-log", code=2, **environment)
    assert found.err.startswith(told) and found.err.count("\n") == 1, found.told()


def test_a_server_that_is_not_there_is_one_line(server, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(stores, "TRIES", 1)
    stores._files.cache_clear()
    with pytest.raises(stores.Unreached, match="s3://bucket/y cannot be reached"):
        storage.opened("s3://bucket/y")
    stores._files.cache_clear()


def test_names_with_marks_of_patterns_are_names(server, place):
    mirror = storage.mirrored(f"s3://{object_store.BUCKET}/names")
    mirror.open()
    names = [f"cells/a=[1-3]*?,b={{x}} y#z-{os.getpid()}/config.json", "plan.json"]
    for name in names:
        (mirror.local / name).parent.mkdir(parents=True, exist_ok=True)
        (mirror.local / name).write_text("{}")
    mirror.flush()
    assert sorted(mirror.store.list()) == sorted(names)
    (mirror.local / names[0]).unlink()
    mirror.close()
    assert [*mirror.store.list()] == ["plan.json"]
