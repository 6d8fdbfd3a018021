"""Kernels for Hopper GPUs, a training step with each implementation that a study may take, and the programs of an
engine, compiled for real by ptxas and XLA, with no GPU."""

import json
import subprocess
import sys

import elsewhere
import jax
import pytest

from lab.decode import attention

pytestmark = pytest.mark.slow
SCRIPT = elsewhere.ROOT / "benchmarks" / "compile_for_gpu.py"


def compiled(environment: dict[str, str], *arguments) -> list[dict]:
    command = [sys.executable, SCRIPT, *arguments]
    made = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr[-3000:]
    return [json.loads(line) for line in made.stdout.splitlines()]


@pytest.mark.long
@pytest.mark.parametrize("options", [["--quick"], pytest.param([], marks=pytest.mark.whole)], ids=str)
def test_products_wait_for_nothing_and_sums_stay_in_registers(options):
    ptxas = elsewhere.environment("ptxas", "--no-deps", *elsewhere.PTXAS)
    found = [each for each in compiled(ptxas, "kernels", *options) if each["implementation"] == "pallas_gpu"]
    assert {(each["K"], each["V"]) for each in found} >= {(64, 64), (128, 128)}
    for each in found:
        assert each["kernels"], each
        for name, takes in each["kernels"].items():
            assert 0 < takes["registers"] <= 255 and not takes["serialised"] and not takes["spilled"], (each, name)
    if options:
        assert set(found[0]["kernels"]) == {"forward_kernel_mosaic_gpu_kernel", "dq_kernel_mosaic_gpu_kernel",
                                            "dkv_kernel_mosaic_gpu_kernel"}  # fmt: skip


@pytest.mark.whole
def test_no_step_waits_for_the_host():
    implementations = ["pallas_gpu", "pallas_triton", *(["cudnn"] if jax.__version_info__ >= (0, 11, 1) else [])]
    cuda = elsewhere.environment("cuda", f"jax[cuda13]=={jax.__version__}")
    found = compiled(cuda, "steps", "configs/rope_ablation.py:gpu", "--implementations", *implementations)
    assert [each["implementation"] for each in found] == implementations
    for each in found:
        assert not each.get("error") and each["host_waits"] == 0 and each["kernels"] < 1000, each
        assert each["bytes"] < 8e9, each
        # No kernel of a layer is started again, neither for the backward pass nor to keep its output.
        assert {*each["attention"].values()} <= {8}, each
    assert {*found[0]["attention"]} == {"forward_kernel", "dq_kernel", "dkv_kernel"}


@pytest.mark.whole
def test_an_engine_waits_for_the_host_only_to_know_what_sampling_asks():
    cuda = elsewhere.environment("cuda", f"jax[cuda13]=={jax.__version__}")
    found = {(each["implementation"], each["program"]): each for each in compiled(cuda, "decode")}
    waits = {key: each["host_waits"] for key, each in found.items()}
    assert waits[attention.KERNEL, "step"] == 3 and waits[attention.KERNEL, "prefill"] == 0, waits
    assert waits["tiled", "step"] > 30 and waits["tiled", "prefill"] > 10, waits
    assert all(each["kernels"] < 500 for key, each in found.items() if key[0] == attention.KERNEL), found
