"""Of tests/mutate.py, which plants faults: that each of them still can be planted, and how it reads what tests say."""

import ast

import commands
import mutate
import pytest
from faults import FAULTS

LAB = commands.REPOSITORY / "lab"


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_faults_can_be_planted(fault):
    before = (LAB / fault.file).read_text()
    after = mutate.planted(before, fault)
    assert ast.dump(ast.parse(after)) != ast.dump(ast.parse(before))
    assert mutate.tests_of(fault.file, commands.REPOSITORY)


def test_a_fault_whose_text_is_gone_or_twice_there_is_refused():
    fault = FAULTS[0]
    for text in ("", fault.old * 2):
        with pytest.raises(SystemExit, match=f"{fault.name}.*exactly once"):
            mutate.planted(text, fault)


def test_faults_have_names_of_their_own_and_every_room_has_some():
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 40
    assert {fault.file.split("/")[0] for fault in FAULTS} >= {"kernels", "model", "data", "train", "evaluate", "study"}


def test_what_pytest_says_is_read():
    assert (
        mutate.noticed("F\nFAILED tests/a.py::test_b[x - y] - AssertionError: 1\n1 failed", 1)
        == "tests/a.py::test_b[x - y]"
    )
    assert mutate.noticed("ERROR tests/a.py\n", 2) == "tests/a.py"
    assert mutate.noticed("3 passed", 0) == ""
    assert mutate.noticed("Fatal Python error: Aborted", 134) == "pytest ended with code 134"
