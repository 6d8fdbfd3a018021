"""The kernels compiled for real by Mosaic, with no TPU."""

import json
import subprocess
import sys

import elsewhere
import filelock
import jax.numpy as jnp
import pytest

from lab.kernels import mosaic_tpu, pallas_tpu

pytestmark = pytest.mark.slow

SMALLEST = 64 * 2**20  # bytes of VMEM of a core of any TPU since v4


@pytest.mark.long
@pytest.mark.parametrize(
    ("tpu", "options"),
    [("v6e", ["--quick"]), *(pytest.param(tpu, [], marks=pytest.mark.whole) for tpu in ("v5e", "v5p", "v6e"))],
)
def test_every_width_compiles_within_memory(tpu, options):
    environment = elsewhere.environment("tpu", elsewhere.libtpu())
    command = [sys.executable, elsewhere.ROOT / "benchmarks" / "compile_for_tpu.py", tpu, *options]
    with filelock.FileLock(elsewhere.ROOT / ".venv-tpu.lock"):  # one process at a time may load it
        made = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr[-3000:]
    found = [json.loads(line) for line in made.stdout.splitlines()]
    if options:
        assert [(each["K"], each["V"], each["queries"]) for each in found] == [(64, 64, 2048), (128, 128, 64)]
    else:
        assert {(each["K"], each["V"]) for each in found} == {(64, 64), (128, 128), (192, 128), (256, 256), (576, 512)}
        assert {each["dtype"] for each in found} == {"bfloat16", "float32"}
        assert {each["queries"] for each in found} == {2048, 2**17, 64, 200, 256}
    for each in found:
        step, backward = each["queries"] < each["keys"], {"attention_dq", "attention_dkv"}
        assert set(each["vmem"]) == {"attention_forward"} | (set() if step else backward), each
        most = pallas_tpu.STEP_VMEM if step else mosaic_tpu.VMEM
        assert all(0 < size <= most < SMALLEST for size in each["vmem"].values()), each
        cache = each["keys"] * each["G"] * (each["K"] + each["V"]) * jnp.dtype(each["dtype"]).itemsize
        if step and (each["K"] % 128 == 0 or tpu != "v5p"):  # where XLA lays other widths out anew
            assert each["temporaries"] < 0.5 * cache, each
        if each["keys"] == 2**17:
            assert each["temporaries"] < 20 * cache, each  # that of scores would be thousands of times as much


@pytest.mark.long
def test_a_training_step_is_planned_for_a_slice():
    """A whole command: attention's own kernels are in the step, its weights are gathered over fsdp and its products
    summed over tensor, and it makes at least the FLOPs of the model."""
    environment = elsewhere.environment("tpu", elsewhere.libtpu())
    command = [sys.executable, "-m", "lab.plan", "--config=configs/rope_ablation.py", "--topology=v5e:2x2", "--json"]
    command += [f"--config.run.{field}" for field in ("scan=true", "mesh.data=1", "mesh.fsdp=2", "mesh.tensor=2")]
    with filelock.FileLock(elsewhere.ROOT / ".venv-tpu.lock"):
        made = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=elsewhere.ROOT)
    assert made.returncode == 0, made.stderr[-3000:]
    (found,) = json.loads(made.stdout)["programs"]
    assert len(found["cells"]) == 10 and found["fits"] and found["unknown_loops"] == 0
    assert {("all-gather", "fsdp"), ("all-reduce", "tensor")} <= {(c["kind"], c["axes"]) for c in found["collectives"]}
    assert 1 <= found["flops"] / found["flops_model"] < 2
    assert 0 < found["bytes"]["held"] < found["bytes"]["total"] < 2**30
    assert "compiling rope_ratio=0.0" in made.stderr
