"""What an accelerator says of the lab: numbers, races, times, steps of a study. At most --budget seconds.

    python benchmarks/device_check.py --out DIRECTORY [--budget 540] [--stages env numerics ...] [--dry]

Every stage is a process of its own with a time limit (benchmarks/device_work.py), and writes a line of JSON for each
thing it has found, so that a kernel that crashes or hangs costs its own row and no other. What crashed is named and
left out when the stage begins again behind it. Later stages leave out implementations whose numbers were wrong. The
last thing printed is a table; check.json has everything.

--dry: tiny sizes on a CPU, with stand-ins for what only a GPU runs: does the script itself work?

env: versions, and the two ceilings: a product of matrices, a copy. numerics: every implementation and width against the
reference in float32, forward and backward; run again after other inputs, to the last bit (a result that moves is a
race, one that stays from the run before was never written). times: attention alone, on packs of the studies and on
masks of benchmarks/attention.py, calls queued back to back. torch: FlexAttention and SDPA on the same masks. train:
steps of rope_ablation:gpu on its own texts by implementation, tokens/s and share of the peak, and whether they learn
alike; of the 272M model on rows of 16k tokens; and the kernels of a step that take longest. decode:
benchmarks/decode.py, 64 branches behind 2,048 tokens. main: the study's own command, a few steps of one cell.

What is timed compiles at once, and then takes its turn alone.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from device_work import BEGUN, NUMERICS, TIMED, TRAINED, go_of, lines, write  # noqa: E402

RUNS = {
    "pallas_tpu": ("tpu",),
    "tiled": ("cpu", "gpu", "tpu"),
    **dict.fromkeys(("pallas_gpu", "pallas_triton", "cudnn", "tokamax"), ("gpu",)),
}
PREPARE = 120  # seconds, of all that compiles
LIMITS = {"env": 75, "numerics": PREPARE, "main": 150, "decode": 150} | dict.fromkeys(("times", "torch", "train"), 40)
TAKING_TURNS = ("times", "torch", "train")  # compile at once, are timed one after another
STAGES = ["env", "numerics", "times", "torch", "train", "decode", "main"]
SILENT = float(os.environ.get("CHECK_SILENT", 75))  # seconds without a line after which a process is taken to hang


def say(*words) -> None:
    print(f"[{time.monotonic() - BEGUN:6.1f}]", *words, flush=True)


class Stage:
    """A process of a stage, which writes lines to a file; started again behind what killed it."""

    def __init__(self, flags, stage: str, share: str = ""):
        self.name, self.flags = " ".join(filter(None, (stage, share))), flags
        self.stage, self.share, self.skip = stage, share, []
        self.path = flags.scratch / f"{re.sub('[ /]', '-', self.name)}.jsonl"
        self.log = self.path.with_suffix(".log")
        self.process, self.seen, self.heard, self.over = None, 0, time.monotonic(), False
        self.limit(LIMITS[stage] if stage not in TAKING_TURNS else PREPARE + 600)
        self.start()

    def limit(self, seconds: float) -> None:
        self.heard, longest = time.monotonic(), BEGUN + self.flags.budget - 5
        self.until = longest if self.flags.dry else min(time.monotonic() + seconds, longest)

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def ready(self) -> bool:
        """Whether it waits for its turn, or never will."""
        return not self.running() or any(x.get("what") == "ready" for x in lines(self.path))

    def start(self) -> None:
        command = [sys.executable, str(HERE / "device_work.py"), "--worker", self.stage, "--share", self.share,
                   "--lines", str(self.path), "--skip", json.dumps(self.skip),
                   *(["--dry"] if self.flags.dry else [])]  # fmt: skip
        with self.log.open("a") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                                            env=environment(self.flags))  # fmt: skip
        self.heard = time.monotonic()

    def running(self) -> bool:
        """Whether to go on waiting; ends what hangs, and starts again behind what died."""
        self.over = self.over or not self._goes_on()
        return not self.over

    def _goes_on(self) -> bool:
        found = lines(self.path)
        if len(found) > self.seen:
            self.seen, self.heard = len(found), time.monotonic()
        code = self.process.poll()
        out_of_time = time.monotonic() > self.until
        prepares = self.stage in TAKING_TURNS and not go_of(self.path).exists()
        hangs = time.monotonic() - self.heard > SILENT and not prepares
        if code is None and not (out_of_time or hangs):
            return True
        if code is None:
            self.stop()
        if code == 0:
            return False
        begun, done = ({json.dumps(x["id"]) for x in found if x.get("what") == what} for what in ("begin", "end"))
        why = "out of time" if out_of_time else "hangs" if hangs else f"died with {code}"
        for guilty in begun - done:
            if json.loads(guilty) not in self.skip:
                self.skip.append(json.loads(guilty))
                write(self.path, what="end", id=json.loads(guilty), error=why, tail=tail(self.log))
        say(self.name, why, *[f"in {x}" for x in self.skip[-1:]])
        if out_of_time or not begun - done or len(self.skip) > 6:
            return False
        self.skip += [json.loads(x) for x in done if json.loads(x) not in self.skip]
        self.start()
        return True


def tail(path: pathlib.Path) -> str:
    return path.read_text(errors="replace")[-1500:] if path.exists() else ""


def environment(flags) -> dict:
    cache = flags.scratch / "lab" / "xla"  # where lab.main keeps its own, too
    own = {
        "PYTHONUNBUFFERED": "1", "XLA_PYTHON_CLIENT_PREALLOCATE": "false", "LAB_CACHE": str(flags.scratch / "lab"),
        "JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
        "MPLBACKEND": "Agg", "TF_CPP_MIN_LOG_LEVEL": "2",
    }  # fmt: skip
    if flags.dry:
        own["JAX_PLATFORMS"] = "cpu"
    else:  # gemms are tuned once for all processes
        own["XLA_FLAGS"] = f"--xla_gpu_per_fusion_autotune_cache_dir={flags.scratch / 'autotune'}"
    return {**os.environ, **own}


def wait(stages: list[Stage], done=lambda stage: not stage.running(), seconds: float = 1e9) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until and not all([done(stage) for stage in stages]):  # noqa: C419  looks after each
        time.sleep(0.2)


def left(flags) -> float:
    return flags.budget - (time.monotonic() - BEGUN)


def main(flags) -> None:
    flags.scratch.mkdir(parents=True, exist_ok=True)
    (flags.scratch / "autotune").mkdir(exist_ok=True)
    platform, found = "cpu", []
    if "env" in flags.stages:
        env = Stage(flags, "env")
        wait([env])
        platform = next((x["platform"] for x in lines(env.path) if "platform" in x), "gpu")
    # compiles for minutes on the host, and numbers are not timed: both at once
    torch = [Stage(flags, "torch")] if "torch" in flags.stages else []
    here = lambda names: [name for name in names if runs(name.split()[0], platform, flags.dry)]  # noqa: E731
    if "numerics" in flags.stages:
        parts = [
            f"{name} {part}"
            for name in here(NUMERICS)
            for part in (("0/2", "1/2") if len(NUMERICS[name]) > 6 else ("0/1",))
        ]
        wait([Stage(flags, "numerics", part) for part in parts])
    results = [x for path in flags.scratch.glob("numerics-*.jsonl") for x in lines(path)]
    wrong = {
        x["id"][0]
        for x in results
        if x.get("what") == "end" and x["id"][1:] in ([64, 64, ""], [128, 128, ""]) and not x.get("ok")
    }
    if wrong:
        say("wrong at width 64 or 128, left out from here on:", *sorted(wrong))
    right = lambda names: [name for name in here(names) if name.split()[0] not in wrong]  # noqa: E731
    shares = {"times": right(TIMED), "train": right(TRAINED)}
    waiting = [Stage(flags, stage, share) for stage in shares if stage in flags.stages for share in shares[stage]]
    waiting += torch
    wait(waiting, Stage.ready, flags.budget if flags.dry else PREPARE)
    for stage in waiting:
        if stage.running():
            go_of(stage.path).touch()
            stage.limit(LIMITS[stage.stage])
            wait([stage])
    if "decode" in flags.stages and left(flags) > 30:
        wait([Stage(flags, "decode", "engine")])
    if "main" in flags.stages and left(flags) > 30:
        wait([Stage(flags, "main", best_of(flags))])
    for path in sorted(flags.scratch.glob("*.jsonl")):
        found += [{"stage": path.stem, **line} for line in lines(path)]
    flags.out.mkdir(parents=True, exist_ok=True)
    (flags.out / "check.json").write_text(json.dumps(found, indent=1))
    with (flags.out / "logs.txt").open("w") as file:
        for path in sorted(flags.scratch.glob("*.log")):
            file.write(f"=== {path.name}\n{path.read_text(errors='replace')[-200_000:]}\n")
    table(found)


def runs(name: str, platform: str, dry: bool) -> bool:
    """Whether an implementation has anything to say on this machine."""
    if name == "tokamax" and (dry or not importlib.util.find_spec("tokamax")):
        return False
    return dry or platform in RUNS[name]


def best_of(flags) -> str:
    """The implementation of the fastest step."""
    trained = [x for path in flags.scratch.glob("train-*.jsonl") for x in lines(path) if x.get("ms_per_step")]
    trained = [x for x in trained if "large" not in x["id"]]
    return min(trained, key=lambda x: x["ms_per_step"], default={"id": ["tiled"]})["id"][0]


def table(found: list[dict]) -> None:
    for line in found:
        if line["stage"] == "env":
            print(json.dumps({k: v for k, v in line.items() if k not in ("stage", "what", "id")}))
    print("\nnumerics: relative errors, then whether a second run is the same to the last bit")
    for line in (x for x in found if x["stage"].startswith("numerics") and x.get("what") == "end"):
        errors = " ".join(f"{k} {v:.1e}" for k, v in line.get("errors", {}).items())
        print(f"  {'ok   ' if line.get('ok') else 'WRONG'} {line['id']} {errors} same {line.get('same')} "
              f"{line.get('error', '')[:150]}")  # fmt: skip
    print("\nattention: ms forward / with backward; TFLOP/s of visible pairs; share of the peak")
    for line in (x for x in found if x["stage"].split("-")[0] in ("times", "torch") and x.get("what") == "end"):
        if "ms" in line:
            of = " ".join(f"{k} {v:.3f} ms {line['tflops'][k]:.0f} TF/s" for k, v in line["ms"].items())
            print(f"  {line['id']}: {of}")
        elif "error" in line:
            print(f"  {line['id']}: {line['error'][:160]}")
    print("\nsteps of a study")
    for line in (x for x in found if x.get("busiest")):
        print(f"  {line['id']}: of {line['ms_per_step']:.1f} ms a step")
        for name, milliseconds, calls in line["busiest"][:12]:
            print(f"    {milliseconds:8.3f} ms {calls:5.0f} x {name[:100]}")
    whole = "train", "main", "decode"
    for line in (x for x in found if x["stage"].split("-")[0] in whole and x.get("what") == "end"):
        print(" ", {k: v for k, v in line.items() if k not in ("stage", "what", "losses", "tail", "busiest")})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(os.environ.get("OUT", "check-out")))
    parser.add_argument("--scratch", type=pathlib.Path, help="of its processes; default: a new directory")
    parser.add_argument("--budget", type=float, default=540, help="seconds")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--dry", action="store_true", help="tiny sizes on a CPU")
    flags = parser.parse_args()
    flags.scratch = flags.scratch or pathlib.Path(tempfile.mkdtemp(prefix="device-check-"))
    main(flags)
