"""Compiles the TPU attention kernels for TPUs that are not here, and prints the memory that they take.

    pip install "jax[tpu]"        # in an environment of its own: where libtpu is, JAX looks for a TPU
    python benchmarks/compile_for_tpu.py [v5e v5p v6e] [--quick]

For each TPU, heads over groups, widths, precision and numbers of queries and keys (few queries: a step of decoding as
many branches, forward only), a line of JSON: {"tpu", "H", "G", "K", "V", "dtype", "queries", "keys", "vmem": {kernel:
bytes}, "temporaries": bytes of HBM}.
"""

import argparse
import json
import os
import pathlib
import re
import sys

# A description of the machine to compile for is all that libtpu may look for.
os.environ.update(
    JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", TPU_ACCELERATOR_TYPE="v5litepod-4", TPU_WORKER_HOSTNAMES="localhost"
)
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding

from lab.coordinates import Coordinates
from lab.kernels import pallas_tpu, rules

TPUS = {"v5e": ("v5e:2x2", "TPU v5 lite"), "v5p": ("v5p:2x2x1", "TPU v5"), "v6e": ("v6e:2x2", "TPU v6 lite")}
# (H, G, K, V) of the published attention variants, MLA in absorbed form the last.
HEADS = ((8, 8, 64, 64), (8, 2, 128, 128), (8, 2, 192, 128), (8, 1, 256, 256), (16, 1, 576, 512))
STEPS = ((32, 8, 128, 128), (32, 8, 64, 64), (32, 32, 128, 128), HEADS[4])
CASES = [  # heads, precision, queries, keys
    *((heads, "bfloat16", 2048, 2048) for heads in HEADS),
    *((heads, "float32", 2048, 2048) for heads in (HEADS[0], HEADS[2])),
    (HEADS[0], "bfloat16", 2**17, 2**17),
    *((heads, "bfloat16", 64, 4096) for heads in STEPS),
    (STEPS[0], "bfloat16", 200, 4096),
    (STEPS[0], "float32", 256, 4096),
    ((32, 4, 128, 128), "bfloat16", 256, 4096),
    ((32, 8, 256, 256), "bfloat16", 256, 4096),
]
QUICK = (CASES[0], (STEPS[0], "bfloat16", 64, 4096))
RULE = rules.own_branch & rules.window(512)


def compiled(tpu: str, heads: tuple[int, int, int, int], dtype: str, queries: int, keys: int):
    """Forward and backward over a row; of a step only forward."""
    topology, kind = TPUS[tpu]
    sharding = SingleDeviceSharding(topologies.get_topology_desc(topology, platform="tpu").devices[0])
    here = lambda *shape, dtype=dtype: jax.ShapeDtypeStruct((1, *shape), dtype, sharding=sharding)  # noqa: E731
    H, G, K, V = heads
    at = [Coordinates(*(here(tokens, dtype=jnp.int32) for _ in range(4))) for tokens in (queries, keys)]

    def run(q, k, v, at, cotangents, frequencies_3F):
        def attend(q, k, v):
            return pallas_tpu.attend(q, k, v, *at, RULE, K**-0.5, 30.0, None, frequencies_3F, interpret=False)

        if queries < keys:
            return attend(q, k, v)
        outputs, pull = jax.vjp(attend, q, k, v)
        return outputs, pull(cotangents)

    arrays = here(queries, H, K), here(keys, G, K), here(keys, G, V)
    cotangents = here(queries, H, V), here(queries, H, dtype=jnp.float32)
    frequencies_3F = jax.ShapeDtypeStruct((3, 32), jnp.float32, sharding=sharding)
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=AbstractDevice(kind, 1, "tpu"))):
        return jax.jit(run).trace(*arrays, at, cotangents, frequencies_3F).lower(lowering_platforms=("tpu",)).compile()


def vmem(program) -> dict[str, int]:
    """Bytes of VMEM that each kernel of a program takes."""
    found = {}
    for line in program.as_text().splitlines():
        if 'custom_call_target="tpu_custom_call"' in line:
            name = re.search(r"attention_[a-z]+", line)[0]
            (used,) = re.findall(
                r'"used_scoped_memory_configs":\[{"memory_space":"1","offset":"0","size":"(\d+)"', line
            )
            found[name] = int(used)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tpus", nargs="*", choices=[[], *TPUS], help="what to compile for (default: all)")
    parser.add_argument("--quick", action="store_true", help="one width and one step of decoding")
    flags = parser.parse_args()
    for tpu in flags.tpus or TPUS:
        for heads, *case in QUICK if flags.quick else CASES:
            program = compiled(tpu, heads, *case)
            found = dict(
                zip(("tpu", "H", "G", "K", "V", "dtype", "queries", "keys"), (tpu, *heads, *case), strict=True)
            )
            found |= {"vmem": vmem(program), "temporaries": program.memory_analysis().temp_size_in_bytes}
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
