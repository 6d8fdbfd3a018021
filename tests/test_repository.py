"""The repository itself: clean code, imports that run one way, short files, documents that tell the truth."""

import ast
import importlib
import pathlib
import re
import shlex
import subprocess
import sys

import commands
import pytest

import lab
from lab import command, convert, report, runtime, storage
from lab.serve import server

REPOSITORY = commands.REPOSITORY
SOURCES = sorted((REPOSITORY / "lab").rglob("*.py"))
TESTS = sorted((REPOSITORY / "tests").rglob("*.py"))
LONGEST = 400

# What a room of lab/ may import of it, beside itself. The commands at the top, and those in a room, may import all.
COMMANDS = ("lab/kernels/trial.py",)
BELOW = {
    "coordinates": set(),
    "errors": set(),
    "options": {"errors"},
    "cluster": {"errors"},
    "watch": {"errors"},
    "runtime": {"errors", "storage", "cluster", "watch"},
    "storage": {"errors", "remote"},
    "remote": {"errors"},
    "data": {"coordinates", "errors", "options", "storage"},
    "kernels": {"coordinates", "errors"},
    "model": {"coordinates", "errors", "options", "kernels"},
    "train": {"coordinates", "errors", "options", "storage", "kernels", "model", "data", "watch"},
    "evaluate": {"coordinates", "errors", "options", "kernels", "model", "data", "train", "decode"},
    "decode": {"coordinates", "errors", "kernels", "model", "data"},
    "serve": {"errors", "data", "decode"},
    "slice": {"errors", "kernels", "model", "train"},
    "exchange": {  # the last two: of what runs as a command
        "errors",
        "options",
        "storage",
        "config",
        "model",
        "data",
        "train",
        "decode",
        "command",
        "runtime",
    },
    "config": {"errors", "options", "model", "data", "train", "evaluate", "study"},  # of the study its settings alone
    "study": {
        "coordinates",
        "errors",
        "options",
        "config",
        "runtime",
        "storage",
        "kernels",
        "model",
        "data",
        "train",
        "evaluate",
        "exchange",
        "watch",
    },
}

# Of lab/study, in this order: none imports a later one, not in a function either.
STUDY = ("numbers", "measure", "evaluations", "results", "define", "judge", "report", "run", "open")


def shipped() -> list[pathlib.Path]:
    """Files that are tracked, or would be: whatever git does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        check=True,
        text=True,
    ).stdout
    return [path for name in listed.split("\0") if name and (path := REPOSITORY / name).is_file()]


def texts() -> dict[str, str]:
    found = {}
    for path in shipped():
        try:
            found[path.relative_to(REPOSITORY).as_posix()] = path.read_text("utf-8")
        except UnicodeDecodeError:
            continue  # a picture
    return found


@pytest.mark.parametrize("arguments", [("check",), ("format", "--check")], ids=" ".join)
def test_ruff_is_clean(arguments):
    told = subprocess.run(
        [sys.executable, "-m", "ruff", *arguments, "."], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert told.returncode == 0, told.stdout + told.stderr


def imported(path: pathlib.Path) -> set[str]:
    """The modules that a file imports, anywhere in it, by their full names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the room"
            found |= {f"{node.module}.{name.name}" for name in node.names}
    return found


def room(path: pathlib.Path) -> str:
    return path.relative_to(REPOSITORY / "lab").with_suffix("").parts[0]


@pytest.mark.parametrize("name", BELOW)
def test_imports_run_one_way(name):
    files = [path for path in SOURCES if room(path) == name and path.relative_to(REPOSITORY).as_posix() not in COMMANDS]
    assert files
    for path in files:
        rooms = {module.split(".")[1] for module in imported(path) if module.startswith("lab.")}
        assert rooms <= BELOW[name] | {name}, f"{path.relative_to(REPOSITORY)} imports {rooms - BELOW[name] - {name}}"


def place(module: str) -> int | None:
    """Of a module of lab.study, or of a name in it, in the order of its rooms; None outside of it."""
    parts = module.split(".")
    return STUDY.index(parts[2]) if parts[:2] == ["lab", "study"] and len(parts) > 2 else None


def test_the_rooms_of_a_study_import_one_way():
    folder = REPOSITORY / "lab" / "study"
    told = re.search(r"^Imports run one way: (.+?)\.", (folder / "__init__.py").read_text(), re.M)
    assert tuple(told[1].split(", ")) == STUDY
    files = [path for path in folder.rglob("*.py") if path != folder / "__init__.py"]
    assert {path.relative_to(folder).with_suffix("").parts[0] for path in files} == {*STUDY}
    for path in files:
        own = STUDY.index(path.relative_to(folder).with_suffix("").parts[0])
        for module in imported(path):
            assert (place(module) or 0) <= own, f"{path.relative_to(REPOSITORY)} imports {module}"


def test_the_config_takes_of_a_study_its_settings_alone():
    """The rooms of a study read the config, so what it takes of them must not."""
    lab = REPOSITORY / "lab"
    assert {name for name in imported(lab / "config.py") if ".study." in name} == {"lab.study.define.settings.STUDY"}
    assert all(name.startswith("lab.options.") for name in imported(lab / "study" / "define" / "settings.py"))


def class_names(path: pathlib.Path) -> list[str]:
    """Classes, and types at the top of a file that are named like them: Block = Heading | Text."""
    tree = ast.parse(path.read_text())
    found = [node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        found += [t.id for t in targets if isinstance(t, ast.Name) and re.fullmatch(r"([A-Z][a-z0-9]+)+", t.id)]
    return found


def test_no_two_classes_have_one_name():
    places: dict[str, list[str]] = {}
    for path in SOURCES:
        for name in class_names(path):
            places.setdefault(name, []).append(path.relative_to(REPOSITORY).as_posix())
    assert places.keys() >= {"Study", "Results", "Run", "Block"}
    assert not {name: files for name, files in places.items() if len(files) > 1}


def test_every_room_has_its_place():
    top = {path.stem for path in (REPOSITORY / "lab").glob("*.py")} - BELOW.keys() - {"__init__"}
    rooms = {room(path) for path in SOURCES if path.parent.name != "lab"}
    assert rooms <= BELOW.keys()
    assert top >= {"main", "plan", "report", "command"}
    for path in SOURCES:
        assert not {name for name in imported(path) if name.split(".")[0] == "configs"}, f"{path} imports a config"


@pytest.mark.parametrize("path", SOURCES + TESTS, ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_files_are_short(path):
    assert len(path.read_text().splitlines()) <= LONGEST


def test_nothing_names_a_machine():
    """Absolute paths, addresses and hosts of wherever this was written."""
    told = re.compile(
        r"(?<![\w.\-/:}])/(?:home|root|Users|work|workspace|tmp|mnt|data|scratch|private)/[\w.]"
        r"|\b(?!127\.0\.0\.1|0\.0\.0\.0)(?:\d{1,3}\.){3}\d{1,3}\b"
        r"|\b[\w-]+\.(?:internal|localdomain|lan)\b"
    )
    found = [
        f"{name}:{number}: {line.strip()[:120]}"
        for name, text in texts().items()
        if name != "tests/test_repository.py"
        for number, line in enumerate(text.splitlines(), 1)
        if told.search(line)
    ]
    assert not found, "\n".join(found)


def documented() -> list[tuple[str, str]]:
    """(file, command) for every `python -m lab.x ...` and `launch/....sh ... --config=` in documents and docstrings."""
    found = []
    for name, text in texts().items():
        if name.endswith((".md", ".sh", ".py")) and not name.startswith("tests/"):
            for line in text.splitlines():
                if command := re.match(
                    r"\s*(?:#\s+)?((?:python -m lab\.|launch/\S+\.sh [^`|\[]*--config=)[^`|]*)", line
                ):
                    found.append((name, re.split(r"\s{2,}#|\s+#", command[1])[0].strip()))
    return found


class Parsed(Exception):
    """The command line was understood."""


def understood_directory(directory: str):
    assert directory.startswith("runs/")
    raise Parsed


@pytest.mark.parametrize(("name", "line"), documented())
def test_documented_commands_parse(name, line, monkeypatch):
    words = shlex.split(re.sub(r"\[.*?\]", "", line))
    script = words[0].startswith("launch")
    module = "lab.main" if script else words[2]
    arguments = words[next(n for n, word in enumerate(words) if word.startswith("--config=")) if script else 3 :]
    understood = command.parse

    def stop_there(*given):
        understood(*given)
        raise Parsed

    monkeypatch.setattr(command, "parse", stop_there)
    monkeypatch.setattr(storage, "opened", lambda directory: re.sub("^s3://[^/]+", "runs", directory))
    monkeypatch.setattr(report, "rebuild", understood_directory)
    monkeypatch.setattr(convert, "convert", lambda way, source, out: understood_directory("runs/"))
    monkeypatch.setattr(runtime, "start_alone", lambda: None)
    monkeypatch.setattr(server, "bound", lambda host, port: None)
    monkeypatch.setattr(lab, "load", lambda directory, **_: understood_directory(directory))
    monkeypatch.setattr(report, "compare", lambda directories, output: understood_directory(directories[-1]))
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises(Parsed):
        importlib.import_module(module).main(arguments)


def test_the_readme_says_how_to_run_every_study():
    readme = (REPOSITORY / "README.md").read_text()
    assert {name for name, _ in documented()} >= {"README.md"}
    for config in (REPOSITORY / "configs").glob("*.py"):
        assert f"configs/{config.name}" in readme
    makefile = (REPOSITORY / "Makefile").read_text()
    for target in re.findall(r"^make (\w[\w-]*)|`make (\w[\w-]*)`", readme, re.M):
        assert re.search(rf"^{''.join(target)}:", makefile, re.M), f"README: make {''.join(target)}"


def test_links_lead_somewhere():
    for name, text in texts().items():
        if name.endswith(".md"):
            for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
                if "://" not in link:
                    assert (REPOSITORY / name).parent.joinpath(link).exists(), f"{name}: {link}"
