"""Compiles attention kernels and whole training steps for an H100 that is not here, and prints what they take.

    pip install "jax[cuda13]" -r requirements.txt   # in an environment of its own
    python benchmarks/compile_for_gpu.py kernels [--quick]
    python benchmarks/compile_for_gpu.py steps [configs/rope_ablation.py:gpu ...] [--implementations pallas_gpu cudnn]
                                              [--microbatches 1]
    python benchmarks/compile_for_gpu.py decode [configs/rope_ablation.py:gpu ...] [--branches 64] [--length 8192]
                                              [--implementations pallas_triton tiled]

kernels: for each implementation and widths a line of JSON: {"implementation", "K", "V", "pairs": that rotate inside,
"softcap", "kernels": {name: {"registers", "spilled": bytes, "serialised": products that wait for each other}},
"temporaries": bytes of the device}.
steps: for each config and implementation {"config", "cell", "implementation", "bytes": of the device that a step takes,
"kernels": that a step starts, "attention": how often which of our own, "host_waits": how often it waits for a number of
the device to know what is next}, or {..., "error"} of one that does not compile.
decode: the same of the engine's programs under own_branch, in bfloat16: "step", of one row with so many branches, and
"prefill" of 64 tokens.
"""

import argparse
import collections
import contextlib
import json
import os
import pathlib
import re
import sys
import tempfile

os.environ.update(JAX_PLATFORMS="cpu", MOSAIC_GPU_DUMP_PTXAS="1")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import (
    AbstractDevice,
    AbstractMesh,
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
    SingleDeviceSharding,
)

from lab.coordinates import Coordinates
from lab.kernels import cudnn, pallas_gpu, pallas_triton, rules

# What a compiler asks about the card; NVIDIA's data sheet and the CUDA occupancy tables.
H100 = """
gpu_device_info {
  name: "NVIDIA H100 80GB HBM3" device_vendor: "NVIDIA Corporation"
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  memory_bandwidth: 3352320000000 device_memory_size: 84942979072 l2_cache_size: 52428800 device_address_bits: 64
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
KIND = AbstractDevice("NVIDIA H100 80GB HBM3", 1, "gpu")
CASES = [  # implementation, K, V, pairs that rotate inside, softcap
    *(("pallas_gpu", K, V, 0, None) for K, V in ((64, 64), (128, 128), (192, 128), (256, 256))),
    ("pallas_gpu", 64, 64, 32, None),  # wider ones rotate before: their kernels are those above
    ("pallas_gpu", 64, 64, 0, 30.0),
    *(("pallas_triton", K, V, 0, None) for K, V in ((32, 32), (64, 64), (128, 128))),  # of which ptxas tells nothing
]
QUICK = (CASES[0], CASES[1])
STEPS = ("configs/rope_ablation.py:gpu", "configs/head_dim_ablation.py:paper")
KERNELS = {"fusion", "custom-call", "copy", "sort", "scatter", "gather", "reduce", "dynamic-update-slice", "transpose",
           "broadcast", "iota", "pad", "concatenate", "convert", "select", "rng-bit-generator", "dot"}  # fmt: skip


def device():
    return topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x1").devices[0]


@contextlib.contextmanager
def overheard():
    """What is written to stdout within, by libraries too, as a list of one text once it is over."""
    told, before = [], os.dup(1)
    with tempfile.TemporaryFile("w+") as file:
        sys.stdout.flush()
        os.dup2(file.fileno(), 1)
        try:
            yield told
        finally:
            os.dup2(before, 1)
            os.close(before)
            file.seek(0)
            told.append(file.read())


def compiled(name: str, K: int, V: int, pairs: int, softcap: float | None):
    """Forward and backward over a row of 2,048 tokens, 8 heads over 2 groups."""
    here = SingleDeviceSharding(device())
    shape = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct((1, 2048, *shape), dtype, sharding=here)  # noqa: E731
    at = Coordinates(*[shape(dtype=jnp.int32)] * 4)
    frequencies = jax.ShapeDtypeStruct((3, pairs), jnp.float32, sharding=here) if pairs else None
    options = {"interpret": False} if name == "pallas_triton" else {}
    module = {"pallas_gpu": pallas_gpu, "pallas_triton": pallas_triton}[name]

    def run(q, k, v, at, cotangents, frequencies):
        def attend(q, k, v):
            given = {**options, **({"frequencies_3F": frequencies} if pairs else {})}
            return module.attend(q, k, v, at, at, rules.all_branches, K**-0.5, softcap, **given)

        outputs, pull = jax.vjp(attend, q, k, v)
        return outputs, pull(cotangents)

    arrays = shape(8, K), shape(2, K), shape(2, V)
    cotangents = shape(8, V), shape(8, dtype=jnp.float32)
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=KIND)):
        return jax.jit(run).trace(*arrays, at, cotangents, frequencies).lower(lowering_platforms=("cuda",)).compile()


def resources(told: str) -> dict[str, dict]:
    """Of each kernel: what ptxas says that it takes."""
    found, name = {}, None
    serialised = re.findall(r"wgmma\S* instructions are serialized.*?'(\w+)'", told)
    for line in told.replace("\0", "").splitlines():
        if entry := re.match(r"ptxas info\s*: Compiling entry function '(\w+)'", line):
            name = entry[1]
            found[name] = {"registers": 0, "spilled": 0, "serialised": serialised.count(name)}
        elif spilled := re.match(r"ptxas\s+\.\s.* (\d+) bytes spill stores", line):
            found[name]["spilled"] = int(spilled[1])
        elif used := re.match(r"ptxas info\s*: Used (\d+) registers", line):
            found[name]["registers"] = int(used[1])
    return found


def kernels(cases) -> None:
    for name, *case in cases:
        with overheard() as told:
            program = compiled(name, *case)
        row = dict(zip(("implementation", "K", "V", "pairs", "softcap"), (name, *case), strict=True))
        row |= {"kernels": resources(told[0]), "temporaries": program.memory_analysis().temp_size_in_bytes}
        print(json.dumps(row), flush=True)


def over(configs, implementations, rows) -> None:
    """Prints what `rows` of a config and an implementation says, of the last cell of each study."""
    from lab.command import load_config
    from lab.study.open import open

    jax.default_backend = lambda: "gpu"  # what is compiled runs there
    cudnn.OBSTACLE = cudnn.OBSTACLE if cudnn.fused is None or hasattr(cudnn.fused, "should_export_dbias") else None
    for path in configs:
        cell = open(load_config(path), path, []).cells[-1]
        for name in implementations:
            about = {"config": path, "cell": cell.name, "implementation": name}
            try:
                for row in rows(cell.config, name):
                    print(json.dumps(about | row), flush=True)
            except Exception as error:  # one that does not compile costs its own line
                print(json.dumps(about | {"error": f"{type(error).__name__}: {str(error)[:300]}"}), flush=True)


def of_step(config, implementation: str, microbatches: int = 1) -> dict:
    """Memory, kernels and host waits of a training step, all on one device."""
    from lab.model import mesh as lab_mesh
    from lab.train import canonical, compiled, memory, optimizer
    from lab.train.step import Program

    config = config.copy_and_resolve_references()
    config.run.update(dict(implementation=implementation, microbatches=microbatches))
    names = lab_mesh.AXES
    mesh = Mesh(np.array([device()]).reshape((1,) * len(names)), names, axis_types=(AxisType.Auto,) * len(names))
    here = NamedSharding(mesh, PartitionSpec())
    placed = lambda tree: jax.tree.map(  # noqa: E731
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), tree
    )
    numbers = placed(jax.tree.map(np.asarray, optimizer.numbers_by_step(config.train)(0)))  # computed here
    with jax.set_mesh(mesh):
        state = placed(jax.eval_shape(lambda: canonical._initial_state(config, jax.random.key(0))))
        batch = placed(canonical.abstract_batch(config))
        traced = compiled._train.trace(state, numbers, batch, program=Program.of(config))
        with overheard():
            program = traced.lower(lowering_platforms=("cuda",)).compile(compiler_options=compiled.OPTIONS["gpu"])
    return {"bytes": memory.needed(program), **counted(program.as_text())}


def of_engine(config, implementation: str, branches: int, length: int):
    """Memory, kernels and host waits of each program of an engine with one row."""
    from lab import model as lab_model
    from lab.decode import forest, programs
    from lab.train import memory

    config = config.copy_and_resolve_references()
    config.run.update(dict(implementation=implementation))
    config.model.update(dict(rule="own_branch", compute="bfloat16"))
    place = SingleDeviceSharding(device())
    placed = lambda tree: jax.tree.map(  # noqa: E731
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree
    )
    length, page, _ = forest.row_of(length, branches, forest.PAGE)
    model = placed(jax.eval_shape(lambda: lab_model.build(config.model, jax.random.key(0), config.run).apart()))
    state = placed(jax.eval_shape(lambda model: programs.empty(model, 1, length, branches), model))
    given = lambda T: placed(programs.Given(1, T).packed)  # noqa: E731
    nodes = branches + length // page
    limits = placed(np.zeros((1, nodes, nodes), np.int32))
    flat, draws = programs.Flat.of(model), placed(programs.Draws(1, branches).packed)
    for what, traced in (
        ("step", lambda: programs.decode.trace(flat, state, given(branches), limits, draws, alternatives=0)),
        ("prefill", lambda: programs.prefill.trace(flat, state, given(forest.PAGE), limits)),
    ):
        with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=KIND)), overheard():
            program = traced().lower(lowering_platforms=("cuda",)).compile()
        yield {"program": what, "bytes": memory.needed(program), **counted(program.as_text())}


def counted(hlo: str) -> dict:
    """Kernels that a program starts, our own of attention by name, and how often it waits for the host: at each turn of
    a loop whose length, and at each branch whose choice, is on the device. A loop of unknown length counts once."""
    computations: dict[str, list[str]] = {}
    entry = lines = None
    for line in hlo.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) (?:\(.*)?.*{$", line):
            lines = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif line.startswith("  ") and lines is not None:
            lines.append(line)

    def within(name: str) -> collections.Counter:
        found = collections.Counter()
        for line in computations.get(name, ()):
            operation = re.search(r"= .*? ([a-z][\w\-]*)\(", line)
            kind = operation[1] if operation else ""
            if kind in KERNELS:
                found["kernels"] += 1
                if ours := re.search(r"/(\w+_kernel)/", line) if kind == "custom-call" else None:
                    found[ours[1]] += 1
            elif kind == "while":
                turns = re.search(r'"known_trip_count":{"n":"(\d+)"}', line)
                inside = [within(re.search(rf"{part}=%?([\w.\-]+)", line)[1]) for part in ("condition", "body")]
                for key, times in sum(inside, collections.Counter()).items():
                    found[key] += times * (int(turns[1]) if turns else 1)
                found["waits"] += 0 if turns else 1
            elif kind == "conditional":
                found["waits"] += 1
            elif kind in ("call", "async-start") and (called := re.search(r"(?:to_apply|calls)=%?([\w.\-]+)", line)):
                found += within(called[1])
        return found

    found = within(entry)
    kernels, waits = found.pop("kernels", 0), found.pop("waits", 0)
    return {"kernels": kernels, "attention": dict(found), "host_waits": waits}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("kernels", "steps", "decode"))
    parser.add_argument("configs", nargs="*", help=f"of steps and decode (default: {' '.join(STEPS)})")
    parser.add_argument("--quick", action="store_true", help="the two commonest widths")
    parser.add_argument("--implementations", nargs="*", help="of attention in steps and decode")
    parser.add_argument("--microbatches", type=int, default=1, help="of a step, as run.microbatches")
    parser.add_argument("--branches", type=int, default=64, help="of the row of an engine")
    parser.add_argument("--length", type=int, default=8192, help="slots of the row of an engine")
    flags = parser.parse_args()
    if flags.what == "kernels":
        kernels(QUICK if flags.quick else CASES)
    elif flags.what == "steps":
        rows = lambda config, name: [of_step(config, name, flags.microbatches)]  # noqa: E731
        over(flags.configs or STEPS, flags.implementations or ("cudnn", "pallas_gpu"), rows)
    else:
        rows = lambda config, name: of_engine(config, name, flags.branches, flags.length)  # noqa: E731
        over(flags.configs or STEPS[:1], flags.implementations or ("pallas_triton", "tiled"), rows)


if __name__ == "__main__":
    main()
