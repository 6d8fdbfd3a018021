"""benchmarks/device_check.py on a CPU: stand-ins for what only a GPU runs, and a worker that is killed."""

import json
import os
import subprocess
import sys

import commands
import pytest

pytestmark = pytest.mark.slow


@pytest.mark.long
@pytest.mark.parametrize("stages", [
    ("env", "numerics"), pytest.param(("env", "numerics", "times", "train", "main", "decode"), marks=pytest.mark.whole)
])  # fmt: skip
def test_a_dry_run_says_all_and_a_worker_that_is_killed_costs_its_own_row(tmp_path, stages):
    script = commands.REPOSITORY / "benchmarks" / "device_check.py"
    sizes = ["--out", tmp_path / "out", "--scratch", tmp_path / "scratch", "--budget", "1500", "--dry"]
    kill = {"CHECK_KILL": "cudnn 64 64 ", "CHECK_SILENT": "300", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, script, *sizes, "--stages", *stages]
    run = subprocess.run(command, cwd=tmp_path, env=os.environ | kill, capture_output=True, text=True)
    assert not run.returncode, run.stdout + run.stderr
    found = json.loads((tmp_path / "out" / "check.json").read_text())
    ends = {(x["stage"].split("-")[0], *x["id"]): x for x in found if x.get("what") == "end"}
    assert "died with -9" in ends.pop(("numerics", "cudnn", 64, 64, ""))["error"]
    assert ends["numerics", "cudnn", 128, 128, ""]["ok"] and ends["numerics", "tiled", 64, 64, ""]["ok"]
    assert not [x for x in ends.values() if x.get("error")]
    assert {key[0] for key in ends} >= {*stages}
    steps = [x for key, x in ends.items() if key[0] == "train"]
    assert all(x["ok"] and x["tokens_per_second"] > 0 for x in steps)
    assert all(x["ok"] for key, x in ends.items() if key[0] in ("main", "decode"))
    assert "steps of a study" in run.stdout
