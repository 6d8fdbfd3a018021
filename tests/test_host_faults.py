"""Two processes under faults and stops: each commit injects some of these; tests/host_faults.py injects any number."""

import host_faults
import matrix
import pytest
from host_faults import STEPS, Fault

pytestmark = pytest.mark.slow
SOME = 2  # of each study's faults, that a commit injects
FAULTS = [
    [
        Fault("shard missing", 1, "compiles", 0),
        Fault("stuck", 1, "trains", 5),
        Fault("killed", 1, "saves", 8),
        Fault("missing collective", 0, "trains", 11),
        Fault("checkpoint flipped", 1, "trains", 15),
        Fault("disk full", 1, "saves", 16),
        Fault("stopped", 0, "trains", 20),
        Fault("coordinator gone", 0, "asks", STEPS),
    ]
]
MORE = [[Fault("checkpoint truncated", 1, "trains", 10), Fault("clock skewed", 1, "trains", 12)]]
STOPS = [[Fault("asked to stop", number % 2, phase, step) for number, (phase, step) in enumerate(
    [("starts", 0), ("compiles", 0), ("trains", 6), ("saves", 12), ("asks", STEPS)]
)]]  # fmt: skip


@pytest.fixture(scope="module")
def injector(tmp_path_factory):
    made = host_faults.Injector(tmp_path_factory.mktemp("faults"))
    yield made
    made.server.close()


@pytest.fixture(scope="module")
def undisturbed(injector):
    first = injector.start(injector.place / "undisturbed")
    assert first["code"] == 0 and "launch/local.sh" not in first["err"], first["err"]
    found = host_faults.bits(injector.place / "undisturbed")
    assert len(found["losses"]) == STEPS and found["sums"] and found["answers"]
    return found


@pytest.mark.parametrize(
    "faults", [FAULTS, STOPS, pytest.param(MORE, marks=pytest.mark.whole)], ids=["faults", "stops", "more"]
)
def test_all_end_and_a_restart_gives_the_same_bits(injector, undisturbed, faults, request):
    """All end in time, the last line names the cause, the host and the step, and nothing that was saved is lost."""
    faults = [matrix.some(life, min(len(life), SOME), request.config) for life in faults]
    outcomes = host_faults.run(injector, faults, undisturbed, lambda outcome: None)
    assert len(outcomes) == sum(map(len, faults))
    for one in outcomes:
        assert not one["wrong"] and one["identical"], (one["kind"], one["phase"], one["wrong"], one["err"])
