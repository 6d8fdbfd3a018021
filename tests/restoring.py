"""Restores a checkpoint as one of two processes of two devices; prints the bytes that it read, that it holds, and those
of all weights and moments. tests/test_several_processes.py runs it.

restoring.py DIRECTORY ADDRESS NUMBER
"""

import json
import sys

import jax
import tensorstore
import tiny

from lab.model import mesh as lab_mesh
from lab.train import checkpoint, compiled
from lab.train.step import Program

PROGRAM = Program("adamw", "declared", 1)


def config():
    """Twenty megabytes of weights and moments."""
    return tiny.config(model__dim=256, model__feedforward__width=1024, run__mesh__fsdp=-1, run__mesh__data=1)


def bytes_read() -> int:
    found = tensorstore.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return sum(value["value"] for metric in found for value in metric["values"])


def main(directory: str, address: str, number: str) -> None:
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(address, 2, int(number))
    mesh = lab_mesh.make(config().run.mesh)
    like = compiled.emptied(compiled.initial_state(config(), PROGRAM, mesh))
    checkpoints = checkpoint.Checkpoints(directory, keep=1)
    before = bytes_read()
    _, state = checkpoints.restore(like)
    read = bytes_read() - before
    arrays = [x for x in jax.tree.leaves(checkpoint._saved(state)) if x.ndim]
    held = sum(shard.data.nbytes for x in arrays for shard in x.addressable_shards)
    print(json.dumps({"read": read, "held": held, "whole": sum(x.nbytes for x in arrays)}))
    checkpoints.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
