"""The processes of benchmarks/device_check.py: one stage each, and a line of JSON for each thing it finds."""

# ruff: noqa: B023  what is defined in a loop is called in it

import argparse
import collections
import concurrent.futures
import contextlib
import importlib.metadata as metadata
import json
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
DATASHEET = {"H100": 989.4e12, "H200": 989.4e12, "A100": 312e12, "v5e": 197e12, "v5p": 459e12, "v6e": 918e12}
BEGUN, STAND_IN = time.monotonic(), contextlib.ExitStack()

NUMERICS = {  # implementation -> (K, V, what else)
    "pallas_gpu": [(64, 64, ""), (64, 64, "rotated"), (128, 128, ""), (64, 64, "capped"), (192, 128, ""),
                   (256, 256, ""), (128, 128, "rotated"), (192, 192, "")],
    "pallas_triton": [(64, 64, ""), (32, 32, ""), (16, 16, ""), (128, 128, ""), (64, 64, "step"), (64, 64, "forked"),
                      (128, 128, "forked"), (192, 128, "")],
    "cudnn": [(64, 64, ""), (128, 128, ""), (32, 32, ""), (16, 16, ""), (192, 128, ""), (256, 256, "")],
    "pallas_tpu": [(64, 64, ""), (128, 128, ""), (64, 64, "rotated"), (64, 64, "capped"), (192, 128, ""),
                   (64, 64, "step")],
    "tokamax": [(64, 64, ""), (128, 128, "")],
    "tiled": [(64, 64, "")],
}  # fmt: skip
TIMED = ("pallas_gpu", "pallas_triton", "pallas_tpu", "cudnn", "cudnn causal", "tokamax", "tiled")
TRAINED = ("pallas_gpu", "pallas_gpu large", "pallas_tpu", "pallas_tpu large", "cudnn", "pallas_triton", "tokamax",
           "cudnn large", "tiled")  # fmt: skip


def lines(path: pathlib.Path) -> list[dict]:
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):  # cut off when its process was killed
            found.append(json.loads(line))
    return found


def write(path: pathlib.Path, **record) -> None:
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def go_of(path: pathlib.Path) -> pathlib.Path:
    """The file whose presence says that it is the turn of the process that writes to `path`."""
    return path.with_suffix(".go")


class Notes:
    """Lines of this process: `with notes(id) as note:` says that a thing begins, and what came of it."""

    def __init__(self, flags):
        self.path, self.skip = pathlib.Path(flags.lines), json.loads(flags.skip)

    def turn(self) -> None:
        """Waits until nothing else is timed."""
        write(self.path, what="ready", at=time.time())
        heard = time.monotonic()
        while not go_of(self.path).exists():
            time.sleep(0.1)
            if time.monotonic() > heard + 20:
                heard = time.monotonic()
                write(self.path, what="beat")

    def wants(self, *id_) -> bool:
        return list(id_) not in self.skip

    @contextlib.contextmanager
    def __call__(self, *id_):
        note = {}
        write(self.path, what="begin", id=list(id_), at=time.time())
        if " ".join(map(str, id_)) == os.environ.get("CHECK_KILL"):  # to test the process above
            os.kill(os.getpid(), signal.SIGKILL)
        if " ".join(map(str, id_)) == os.environ.get("CHECK_HANG"):
            time.sleep(10_000)
        try:
            yield note
        except Exception as error:
            note |= {"error": f"{type(error).__name__}: {str(error)[:600]}", "ok": False}
        write(self.path, what="end", id=list(id_), at=time.time(), **note)


def prepare(flags):
    """jax and lab as this process needs them."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import jax

    from lab import kernels

    if flags.dry:
        stand_in(kernels)
    return jax, kernels


def stand_in(kernels) -> None:
    """On a CPU: what stands for each implementation."""
    import as_cudnn

    from lab.kernels import cudnn, pallas_triton, tiled

    cudnn._call, cudnn.OBSTACLE, cudnn.refusal = as_cudnn.call, None, lambda *_: None
    kernels.IMPLEMENTATIONS["cudnn"] = kernels.Implementation()
    kernels.IMPLEMENTATIONS["pallas_gpu"] = kernels.Implementation()
    sys.modules["lab.kernels.pallas_gpu"] = tiled
    pallas_triton.tile_sizes = lambda T, S: (32, 32)
    STAND_IN.enter_context(kernels.interpreted())


def worker_env(flags, notes) -> None:
    jax, _ = prepare(flags)
    import jax.numpy as jnp

    with notes("versions") as note:
        note["device"], note["platform"] = jax.devices()[0].device_kind, jax.devices()[0].platform
        for name in ("jax", "jaxlib", "jax-cuda13-plugin", "flax", "optax", "orbax-checkpoint", "grain", "torch",
                     "triton", "numpy", "nvidia-cudnn-cu13", "tokamax"):  # fmt: skip
            with contextlib.suppress(metadata.PackageNotFoundError):
                note[name] = metadata.version(name)
        with contextlib.suppress(Exception):
            from jax._src.lib import cuda_versions

            note["cudnn"], note["cuda"] = cuda_versions.cudnn_get_version(), cuda_versions.cuda_runtime_get_version()
        with contextlib.suppress(Exception):
            query = "--query-gpu=name,driver_version,clocks.sm,clocks.mem,power.limit"
            note["smi"] = subprocess.run(["nvidia-smi", query, "--format=csv,noheader"], capture_output=True,
                                         text=True).stdout.strip()  # fmt: skip
    with notes("ceilings") as note:
        n = 512 if flags.dry else 8192
        key = jax.random.split(jax.random.key(time.time_ns() % 2**31))
        a, b = (jax.random.normal(k, (n, n), jnp.bfloat16) for k in key)
        note["product_tflops"] = 2 * n**3 / seconds_of(jax.jit(jnp.matmul), (a, b)) / 1e12
        x = jnp.ones((2**20 if flags.dry else 2**30,), jnp.float32)
        note["copy_tb_s"] = 2 * x.nbytes / seconds_of(jax.jit(lambda x: x + 1), (x,)) / 1e12
        note["dispatch_us"] = 1e6 * seconds_of(jax.jit(lambda x: x + 1), (jnp.ones(8),), least=0.05)


def seconds_of(run, arguments, least: float = 0.1, rounds: int = 5) -> float:
    """The median of `rounds`, each of enough calls queued back to back to take `least` seconds."""
    import jax

    jax.block_until_ready(run(*arguments))
    begun = time.perf_counter()
    jax.block_until_ready(run(*arguments))
    once = time.perf_counter() - begun
    calls = max(1, min(200, round(least / max(once, 1e-6))))
    found = []
    for _ in range(rounds if once < 1 else 2):
        begun = time.perf_counter()
        for _ in range(calls):
            out = run(*arguments)
        jax.block_until_ready(out)
        found.append((time.perf_counter() - begun) / calls)
    return statistics.median(found)


def worker_numerics(flags, notes) -> None:
    prepare(flags)
    import numpy as np

    from lab.coordinates import Coordinates
    from lab.kernels import choice, rules, trial

    (name, part), rng = (
        flags.share.split(),
        np.random.default_rng(time.time_ns() % 2**32),
    )  # fresh inputs at every check
    first, every_nth = map(int, part.split("/"))
    if flags.dry:
        trial.SMALL = 48
    every = (rules.all_branches, rules.own_branch & rules.window(40), rules.causal)
    at = Coordinates.single(1, 1)  # small packs are drawn
    for K, V, extra in NUMERICS[name][: 2 if flags.dry else None][first::every_nth]:
        if not notes.wants(name, K, V, extra):
            continue
        with notes(name, K, V, extra) as note:
            step = extra in ("step", "forked")  # of decoding
            tokens, keys = (16, 2048) if step else (300, 300)
            begun, found = time.perf_counter(), []
            for rule in every if not extra and (K, V) == (64, 64) else every[:1]:
                problem = trial.Problem(
                    q=(2, tokens, 4, K), k=(2, keys, 2, K), v=(2, keys, 2, V), dtype="bfloat16", rule=rule,
                    scale=K**-0.5, softcap=2.0 if extra == "capped" else 0.0,
                    frequencies=K // 2 if extra == "rotated" else 0, training=not step,
                    of_lse=name not in choice.LIBRARIES, at=(at, at), forked=extra == "forked",
                )  # fmt: skip
                write(notes.path, what="beat")
                found.append(trial.numbers(problem, name, rng))
            outputs = {output for one in found for output in one["errors"]}
            note["errors"] = {
                output: max(one["errors"].get(output, 0.0) for one in found) for output in sorted(outputs)
            }
            note["same"] = all(one["same"] for one in found)
            right = all(one["errors"][output] <= most for one in found for output, most in one["allowed"].items())
            note["ok"] = right and (note["same"] or name == "cudnn")
            note["seconds"] = time.perf_counter() - begun


def cases(flags) -> dict:
    """name -> (rule, coordinates, H, G, K): packs of the studies, and masks of benchmarks/attention.py."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import numpy as np
    from attention import branches

    from configs import rope_ablation
    from lab import kernels
    from lab.coordinates import Coordinates
    from lab.data import nominal_coordinates
    from lab.kernels import rules

    def study(draw: str):
        config = rope_ablation.get_config("gpu")
        with config.unlocked():
            config.data.draw = draw
            if flags.dry:
                config.data.update(dict(text_length=8, texts_per_row=16, rows=2))
        return nominal_coordinates(config, config.data.rows)

    T = 256 if flags.dry else 16384
    few, four = (T // 4, 8, 3 * T // 32), (T // 8, 4, T // 32, 4)
    heads = 2 if flags.dry else 16
    found = {
        "study 1-15": ("all_branches", study("1-15"), 8, 2, 64),
        "study fixed1": ("all_branches", study("fixed1"), 8, 2, 64),
        f"causal {T}": ("causal", Coordinates.single(1, T), heads, heads, 128),
        f"causal {T}, width 64": ("causal", Coordinates.single(1, T), heads, heads, 64),
        f"own_branch {few}": ("own_branch", branches(*few), heads, heads, 64),
        f"own_branch, 4 x {four[:3]}": ("own_branch", branches(*four), heads, heads, 64),
    }
    arranged = {}
    for name, (rule, at, H, G, K) in found.items():
        order, share = kernels.arrange(at, [rules.parse(rule)], "tiled")
        at = at.map(lambda x, order=order: np.take_along_axis(np.asarray(x), order, axis=1))
        B, T = at.shape
        pairs = B * T * rules.mean_visible_keys(rules.parse(rule), at)
        arranged[name] = (rules.parse(rule), at, H, G, K, pairs, share)
    return arranged


def worker_times(flags, notes) -> None:
    jax, kernels = prepare(flags)
    import jax.numpy as jnp
    import numpy as np

    name, programs, todo = flags.share, {}, {}

    def program(rule, which: str):
        def forward(q, k, v, at, do, tiles):
            if name == "cudnn causal":
                chosen = None if flags.dry else "cudnn"
                return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=chosen)
            return kernels.attend(q, k, v, at, at, rule, implementation=name, tiles=tiles)

        def both(q, k, v, at, do, tiles):
            o, pull = jax.vjp(lambda q, k, v: forward(q, k, v, at, do, tiles), q, k, v)
            return o, *pull(do)

        return jax.jit(forward if which == "forward" else both)

    rng = np.random.default_rng(time.time_ns() % 2**32)
    for case, (rule, at, H, G, K, pairs, share) in cases(flags).items():
        if (name == "cudnn causal" and not case.startswith("causal")) or not notes.wants(name, case):
            continue
        if name == "tiled" and not case.startswith("study"):
            continue  # minutes
        if flags.dry and name == "pallas_triton" and not case.startswith("study"):
            continue  # interpreted: minutes
        B, T = at.shape
        normal = lambda *s: jnp.asarray(rng.normal(size=s), jnp.bfloat16)  # noqa: E731
        at = jax.tree.map(jnp.asarray, at)  # lists of tiles and masks are made once for all layers: not timed
        make = jax.jit(lambda at, rule=rule: kernels.plan_tiles(at, at, rule, name))
        arrays = (normal(B, T, H, K), normal(B, T, G, K), normal(B, T, G, K), at, normal(B, T, H, K),
                  None if name == "cudnn causal" else make(at))  # fmt: skip
        todo[case] = arrays, pairs * H * K, share, (rule, tuple((x.shape, str(x.dtype)) for x in arrays[:3]))
    with notes(name, "compiling") as note, concurrent.futures.ThreadPoolExecutor(8) as pool:
        begun = time.perf_counter()
        for arrays, _, _, key in todo.values():
            for which in ("forward", "both"):
                if (key, which) not in programs:
                    lowered = program(key[0], which).lower(*arrays)
                    programs[key, which] = pool.submit(lowered.compile)
        note["seconds_to_lower"] = time.perf_counter() - begun
    notes.turn()
    for case, (arrays, products, share, key) in todo.items():
        with notes(name, case) as note:
            note |= {"tiles": share, "ms": {}, "tflops": {}}
            for which, count in (("forward", 2), ("both", 7)):
                seconds = seconds_of(programs[key, which].result(), arrays)
                note["ms"][which], note["tflops"][which] = 1e3 * seconds, 2 * count * products / seconds / 1e12


def worker_torch(flags, notes) -> None:
    import numpy as np
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT), str(ROOT / "tests")]
    os.environ["JAX_PLATFORMS"] = "cpu"
    import torch_attention as ours

    device, dtype = ours.DEVICE, ours.DTYPE
    ready, texts = {}, {"all_branches": "all_branches", "causal": "causal", "own_branch": "own_branch"}
    from lab.kernels import rules

    by_rule = {rules.RULES[name]: name for name in texts}
    for case, (rule, at, H, G, K, pairs, _) in cases(flags).items():
        if case.startswith("own_branch,") or case.endswith("width 64"):
            continue
        at = {f: torch.tensor(np.asarray(getattr(at, f)), device=device) for f in ours.FIELDS}
        (B, T), text = at["index"].shape, by_rule[rule]
        q, k, v, do = (torch.randn(B, n, T, K, device=device, dtype=dtype, requires_grad=i < 3 and device == "cuda")
                       for i, n in enumerate((H, G, G, H)))  # fmt: skip

        def sees(b, h, i, j, at=at, text=text):
            return ours.visible(text, *({f: x[b, n] for f, x in at.items()} for n in (i, j)))

        def flex(q=q, k=k, v=v, sees=sees, B=B, T=T, made={}):  # noqa: B006
            if not made:
                made["mask"] = create_block_mask(sees, B, None, T, T, device=device)
                made["run"] = torch.compile(flex_attention)
            return made["run"](q, k, v, block_mask=made["mask"], enable_gqa=q.shape[1] != k.shape[1])

        def sdpa(q=q, k=k, v=v, at=at, text=text, made={}):  # noqa: B006
            if text == "causal":
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            if not made:
                rows = lambda n: {f: x[(slice(None), *n)] for f, x in at.items()}  # noqa: E731
                made["mask"] = ours.visible(text, rows((slice(None), None)), rows((None,)))[:, None]
            return torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=made["mask"], enable_gqa=q.shape[1] != k.shape[1])  # fmt: skip

        for peer, attend in (("flex", flex), ("sdpa", sdpa)):
            if not notes.wants(peer, "compiling " + case):
                continue
            with notes(peer, "compiling " + case):

                def run(which, attend=attend, q=q, k=k, v=v, do=do):
                    o = attend()
                    if which == "both":
                        torch.autograd.grad(o, (q, k, v), do)

                for which in ("forward",) if device == "cpu" else ("forward", "both"):
                    run(which)
                ready[peer, case] = run, pairs * H * K
    notes.turn()
    for (peer, case), (run, products) in ready.items():
        with notes(peer, case) as note:
            note |= {"ms": {}, "tflops": {}}
            for which, count in (("forward", 2), ("both", 7)):
                if device == "cpu" and which == "both":
                    continue
                times = []
                for _ in range(2 if flags.dry else 20):
                    if device == "cuda":
                        torch.cuda.synchronize()
                    begun = time.perf_counter()
                    for _ in range(5):
                        run(which)
                    if device == "cuda":
                        torch.cuda.synchronize()
                    times.append((time.perf_counter() - begun) / 5)
                seconds = statistics.median(times)
                note["ms"][which], note["tflops"][which] = 1e3 * seconds, 2 * count * products / seconds / 1e12


def study(flags, large: bool = False):
    """The config of rope_ablation:gpu; large: the 272M parameters of head_dim_ablation:paper on rows of 16k tokens."""
    from configs import head_dim_ablation, rope_ablation

    config = rope_ablation.get_config("cpu" if flags.dry else "gpu")
    config.data.draw = "1-15"
    if flags.dry:
        config.data.rows = 2
    elif large:
        theirs = head_dim_ablation.get_config("paper")
        config.model, config.run = theirs.model, theirs.run
        config.model.mixer.update(dict(heads=16, kv_heads=4, head_dim=64))
        config.data.update(dict(rows=1, texts_per_row=64))
    return config


def mfu(flops_per_second: float) -> float | None:
    """The share of what the data sheet of this device promises in bfloat16; None for one that is not listed."""
    import jax

    kind = jax.devices()[0].device_kind
    peak = next((peak for name, peak in DATASHEET.items() if name in kind), None)
    return peak and flops_per_second / peak


def worker_train(flags, notes) -> None:
    jax, _kernels = prepare(flags)
    import numpy as np

    from lab import data as lab_data
    from lab.kernels import rules
    from lab.model import accounting
    from lab.model import mesh as lab_mesh
    from lab.train.workload import Member, Workload

    name, _, large = flags.share.partition(" ")
    steps = {"tiled": 4}.get(name, 40) if not flags.dry else 4
    with notes(name, *([large] if large else []), "272M, 16k" if large else "rope_ablation:gpu") as note:
        config = study(flags, bool(large))
        config.run.implementation = name
        config.train.steps = max(steps, config.train.steps)
        begun = time.perf_counter()
        data = lab_data.open(config)
        note["seconds_for_data"] = round(time.perf_counter() - begun, 1)
        workload, mesh = Workload([Member(config, data.train)]), lab_mesh.make(config.run.mesh)
        state, batches = workload.initial_state(mesh), workload.batches(0)
        taken = [next(batches) for _ in range(steps)]
        inputs = [(workload.numbers(step), lab_mesh.place(batch, mesh)) for step, (batch, _) in enumerate(taken)]
        begun = time.perf_counter()
        run = workload.compile(state, *inputs[0], mesh)
        note["seconds_to_compile"] = round(time.perf_counter() - begun, 1)
        seen = [rules.mean_visible_keys(rules.parse(config.model.rule), taken[0][0].coordinates)]
        flops, sent = accounting.train_flops_per_token(state.model, seen), taken[0][1]
        notes.turn()
        losses, times, each, last = [], [], max(1, steps // 4), inputs[-2:]
        while inputs:  # the first of which warms up
            begun, now, inputs = time.perf_counter(), inputs[:each], inputs[each:]
            for numbers, placed in now:
                state, metrics = run(state, numbers, placed)
                losses.append(metrics.loss)
            jax.block_until_ready(losses)
            times.append((time.perf_counter() - begun) / len(now))
        losses, steady = [float(x) for x in losses], statistics.median(times[1:])
        tokens = config.data.rows * config.data.texts_per_row * config.data.text_length
        stats = jax.local_devices()[0].memory_stats() or {}
        note |= {
            "ms_per_step": 1e3 * steady, "tokens_per_second": tokens / steady, "flops_per_token": flops,
            "visible_keys": seen[0], "tiles": sent[0].tiles, "mfu_datasheet": mfu(flops * tokens / steady),
            "peak_gib": stats.get("peak_bytes_in_use", 0) / 2**30, "losses": losses, "last_loss": losses[-1],
            "ok": bool(np.isfinite(losses).all()),
        }  # fmt: skip
        if not flags.dry:
            trace = notes.path.with_suffix(".trace")
            with jax.profiler.trace(trace):
                for numbers, placed in last:
                    state, _ = run(state, numbers, placed)
                jax.block_until_ready(state)
            note["busiest"] = busiest(trace, len(last))


def busiest(trace: pathlib.Path, steps: int) -> list[tuple[str, float, float]]:
    """(kernel and operation, milliseconds a step, calls a step) of what ran on a GPU, the longest first."""
    import jax

    found = collections.defaultdict(list)
    for file in trace.rglob("*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
            for line in plane.lines if "GPU" in plane.name else ():
                for event in line.events if line.name.startswith("Stream") else ():
                    stats = dict(event.stats)
                    operation = str(stats.get("tf_op") or stats.get("name") or "")[-90:]
                    name = f"{event.name[:60]} {stats.get('hlo_op', '')} {operation}"
                    found[name].append(event.duration_ns / 1e6)
    rows = [(name, sum(times) / steps, len(times) / steps) for name, times in found.items()]
    return sorted(rows, key=lambda row: -row[1])[:150]


def worker_main(flags, notes) -> None:
    name = flags.share
    with notes(name, "lab.main") as note:
        sys.path[:0] = [str(ROOT)]
        scale, texts = ("cpu", 384) if flags.dry else ("gpu", 96)
        command = [sys.executable, "-m", "lab.main", f"--config=configs/rope_ablation.py:{scale}", "--cells=1/20",
                   "--config.train.steps=20", "--config.train.warmup=5", "--config.evaluate.loss.branches=(16,)",
                   f"--config.evaluate.loss.texts={texts}",
                   f"--config.run.implementation={'auto' if flags.dry else name}",
                   f"--workdir={pathlib.Path(flags.lines).parent / 'run'}"]  # fmt: skip
        note |= said_by(command, notes)


def worker_decode(flags, notes) -> None:
    with notes(flags.share, "benchmarks/decode.py") as note:
        shape = "--prefixes 64 --branches 2 --own 4 --dim 32 --heads 4 --layers 1" if flags.dry else (
            "--prefixes 2048 --branches 1 64 --dim 1024 --heads 16 --layers 8 --read 0"
        )  # fmt: skip
        out = pathlib.Path(flags.lines).parent / "decode"
        turns = f"--shares 4 --processes 1 --rounds 3 --out {out}"
        note |= said_by([sys.executable, str(ROOT / "benchmarks" / "decode.py"), *f"{shape} {turns}".split()], notes)
        if note["ok"]:  # True: some engine was refused the kernel by its trial
            note["tiled"] = "attention of the lab: pallas_triton\n" not in note["said"]


def said_by(command: list[str], notes) -> dict:
    """What came of a command, and the last that it said."""
    begun, path = time.perf_counter(), notes.path.with_suffix(".said")
    with path.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        while process.poll() is None:
            time.sleep(2)
            write(notes.path, what="beat")
    said = path.read_text()[-3000:]
    return {"code": process.returncode, "seconds": time.perf_counter() - begun, "ok": not process.returncode,
            "said": said}  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worker", required=True)
    parser.add_argument("--dry", action="store_true")
    for name, default in (("--share", ""), ("--lines", ""), ("--skip", "[]")):
        parser.add_argument(name, default=default)
    flags = parser.parse_args()
    globals()[f"worker_{flags.worker}"](flags, Notes(flags))
