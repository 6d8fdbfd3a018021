"""Plants the faults of tests/faults one by one, and tells which test notices each: what the tests are worth.

python tests/mutate.py faults.jsonl                 all of them; hours. Those that the file has are done: it goes on
python tests/mutate.py faults.jsonl --only NAME ... some
python tests/mutate.py --list

Faults are planted in a clone of HEAD, never here. Each meets the fast tests of its room, up to the first that fails;
then those that none noticed meet the other fast tests. A test that fails without the fault too has noticed nothing.
"""

import argparse
import contextlib
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

from faults import FAULTS, Fault

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
SECONDS = 1800  # for the tests of a room; a fault may hang them
OF_THE_TEXT = ("tests/test_repository.py", "tests/test_faults.py", "tests/test_matrix.py")  # notice any change of it
ROOMS = {  # the longest that begins the name of a file, below lab/: its tests, in the order in which they run
    "cluster": ["tests/test_cluster.py"],
    "watch": ["tests/test_watch.py"],
    "remote/fetching": ["tests/data/test_fetched.py"],
    "remote": ["tests/test_remote.py"],
    "kernels": ["tests/kernels"],
    "model/streams/v": ["tests/model/test_streams.py"],
    "model/streams": ["tests/model/test_streams_beside.py", "tests/model/test_streams.py"],
    "model": ["tests/model"],
    "data": ["tests/data"],
    "train": ["tests/train"],
    "evaluate": ["tests/evaluate", "tests/study/run"],
    "decode": ["tests/decode"],
    "serve": ["tests/serve"],
    "study/define": ["tests/study/define"],
    "study/judge": ["tests/study/judge", "tests/study/report/test_residuals.py"],
    "study/report": ["tests/study/report"],
    "study": ["tests/study"],
}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=pathlib.Path, help="where results are kept, a line for each fault")
    parser.add_argument("--list", action="store_true", help="the faults, and nothing more")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="faults by name")
    asked = parser.parse_args(arguments)
    chosen = [fault for fault in FAULTS if not asked.only or fault.name in asked.only]
    if unknown := {*(asked.only or ())} - {fault.name for fault in chosen}:
        parser.error(f"no fault is named {', '.join(sorted(unknown))}; --list shows them")
    if asked.list:
        print("\n".join(f"{fault.name:36} lab/{fault.file}" for fault in chosen))
        return
    if asked.file is None:
        parser.error("name the file that keeps the results")
    with tempfile.TemporaryDirectory(prefix="lab-faults-") as scratch:
        clone = cloned(pathlib.Path(scratch))
        for tests in ("room", "others"):
            left = [fault for fault in chosen if wants(results(asked.file).get(fault.name), tests)]
            for place, fault in enumerate(left, 1):
                found = tried(fault, tests, clone)
                print(f"[{place}/{len(left)}] {line(found)}", flush=True)
                with asked.file.open("a") as file:
                    file.write(json.dumps(found) + "\n")
    table([found for name, found in results(asked.file).items() if name in {fault.name for fault in chosen}])


def wants(found: dict | None, tests: str) -> bool:
    """Whether a fault is yet to meet these tests, by its last result."""
    return found is None or (tests == "others" and found["tests"] == "room" and not found["test"])


def results(file: pathlib.Path) -> dict[str, dict]:
    lines = file.read_text().splitlines() if file.exists() else []
    return {found["fault"]: found for found in map(json.loads, lines)}


def cloned(scratch: pathlib.Path) -> pathlib.Path:
    """HEAD, with the programs that XLA has compiled here: it knows them by their text, so no fault spoils them."""
    clone = scratch / "lab"
    subprocess.run(["git", "clone", "--quiet", "--shared", REPOSITORY, clone], check=True)
    programs = pathlib.Path(".pytest_cache", "lab", "xla")
    (REPOSITORY / programs).mkdir(parents=True, exist_ok=True)
    (clone / programs).parent.mkdir(parents=True)
    (clone / programs).symlink_to(REPOSITORY / programs)
    return clone


def planted(text: str, fault: Fault) -> str:
    if text.count(fault.old) != 1:
        sys.exit(f"{fault.name}: its text is {text.count(fault.old)} times in lab/{fault.file}, not exactly once")
    return text.replace(fault.old, fault.new)


def tried(fault: Fault, tests: str, clone: pathlib.Path) -> dict:
    path, begun = clone / "lab" / fault.file, time.monotonic()
    before, first = path.read_text(), tests_of(fault.file, clone)
    others = ["tests", *(f"--ignore={test}" for test in (*first, *OF_THE_TEXT))]
    path.write_text(planted(before, fault))
    try:
        test = run(first if tests == "room" else others, clone)
    finally:
        path.write_text(before)
    seconds = round(time.monotonic() - begun)
    broken = test.startswith("tests/") and run([test], clone) != ""
    return dict(fault=fault.name, file=f"lab/{fault.file}", tests=tests, test=test, broken=broken, seconds=seconds)


def tests_of(file: str, repository: pathlib.Path) -> list[str]:
    """The files of a room's tests, those named like the file first."""
    room = max((room for room in ROOMS if file.startswith(room)), key=len)
    found = [path for test in ROOMS[room] for path in files(repository / test)]
    stem = pathlib.Path(file).stem
    return [path.relative_to(repository).as_posix() for path in sorted(found, key=lambda path: stem not in path.stem)]


def files(test: pathlib.Path) -> list[pathlib.Path]:
    return [test] if test.is_file() else sorted(test.rglob("test_*.py"))


def run(tests: list[str], clone: pathlib.Path) -> str:
    """The first test that fails; "" if none does."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-m",
        "not slow",
        "--tb=no",
        "-rfE",
        "-p",
        "no:cacheprovider",
        *tests,
    ]
    with tempfile.TemporaryDirectory() as cache:  # of data and programs, which a fault may spoil
        environment = os.environ | dict(LAB_CACHE=cache, COLUMNS="1000", PYTHONDONTWRITEBYTECODE="1")
        with contextlib.suppress(subprocess.TimeoutExpired):
            told = subprocess.run(
                command, cwd=clone, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False,
                stdin=subprocess.DEVNULL,
            )  # fmt: skip
            return noticed(told.stdout, told.returncode)
    return f"no end after {SECONDS} s"


def noticed(output: str, code: int) -> str:
    if code in (0, 5):  # all passed, or none were fast
        return ""
    found = re.search(r"^(?:FAILED|ERROR) (\S+?(?:\[.*?\])?)(?: - .*)?$", output, re.M)
    return found[1] if found else f"pytest ended with code {code}"


def line(found: dict) -> str:
    test = "FAILS WITHOUT IT: " * found["broken"] + (found["test"] or f"NOT NOTICED by {found['tests']}")
    return f"{found['fault']:36} {found['file']:34} {found['seconds']:5} s  {test}"


def table(found: list[dict]) -> None:
    print(*map(line, found), sep="\n")
    noticed = [one for one in found if one["test"] and not one["broken"]]
    print(f"{len(noticed)} of {len(found)} faults are noticed")


if __name__ == "__main__":
    main(sys.argv[1:])
