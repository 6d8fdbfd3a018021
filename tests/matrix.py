"""Which variant keeps which contract is a matrix too large for every run: each commit runs another sample of it.

A test marked `matrix("variant")` is a contract, and each value of its argument `variant` is a row that owes it. Its
fast parameters always run, its slow ones are drawn: one of every contract at least, and something of one row in six.
Tests marked `whole` are in no sample. Of those marked `long`, half a minute and more each, a commit runs half.
"""

import collections
import pathlib
import random
import subprocess

import pytest

ONE_IN = 48  # of a contract's slow tests
FEWEST = 1
ROWS = 6  # of as many, one owes something at every commit


def pytest_addoption(parser):
    parser.addoption("--matrix", choices=("sample", "all"), default="sample", help="which contracts variants meet")
    parser.addoption("--matrix-seed", type=int, help="of the sample; by default that of the commit")


def pytest_sessionstart(session):
    """Not pytest_report_header, which is silent under -q."""
    terminal = session.config.pluginmanager.get_plugin("terminalreporter")
    if terminal and session.config.option.matrix == "sample":
        terminal.write_line(f"matrix: the sample of --matrix-seed={seed(session.config)}; --matrix=all runs all of it")


@pytest.hookimpl(tryfirst=True)  # before -m and -k take tests away, so that fast and slow runs draw alike
def pytest_collection_modifyitems(config, items):
    if config.option.matrix == "all":
        return
    marked = lambda name: [item for item in items if item.get_closest_marker(name) and not is_whole(item)]  # noqa: E731
    in_matrix = {item.nodeid: item for item in marked("matrix") if is_slow(item)}
    drawn = sample([(test, contract(item), row(item)) for test, item in in_matrix.items()], seed(config))
    long = sorted(item.nodeid for item in marked("long"))
    drawn.update(some(long, -(-len(long) // 2), config))
    sampled = {*in_matrix, *long}
    kept = {item for item in items if item.nodeid in drawn or not (item.nodeid in sampled or is_whole(item))}
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


def is_slow(item) -> bool:
    return item.get_closest_marker("slow") is not None


def is_whole(item) -> bool:
    return item.get_closest_marker("whole") is not None


def contract(item) -> str:
    return item.nodeid.partition("[")[0]


def row(item) -> str:
    return str(item.callspec.params[item.get_closest_marker("matrix").args[0]])


def sample(tests: list[tuple[str, str, str]], seed: int) -> set[str]:
    """Some of the tests, each given with its contract and its row, in any order."""
    drawn, of_contract, of_row = set(), collections.defaultdict(list), collections.defaultdict(list)
    for test, contract, row in sorted(tests, key=lambda each: random.Random(f"{seed} {each[0]}").random()):
        of_contract[contract].append(test)
        of_row[row].append(test)
    for owed in of_contract.values():
        drawn.update(owed[: max(FEWEST, len(owed) // ONE_IN)])
    of_commit = (owed for row, owed in of_row.items() if random.Random(f"{seed} {row}").randrange(ROWS) == 0)
    drawn.update(owed[0] for owed in of_commit if drawn.isdisjoint(owed))
    return drawn


def some(of: list, count: int, config) -> list:
    """So many of these, in their order, drawn from the commit; all of them with --matrix=all."""
    places = range(len(of))
    kept = places if config.option.matrix == "all" else random.Random(seed(config)).sample(places, count)
    return [of[place] for place in sorted(kept)]


def seed(config) -> int:
    """Drawn from the commit; 0 where there is none."""
    if config.option.matrix_seed is not None:
        return config.option.matrix_seed
    command = ["git", "-C", pathlib.Path(__file__).parent, "rev-parse", "HEAD"]
    try:
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout[:8], 16)
    except (OSError, subprocess.CalledProcessError):
        return 0
