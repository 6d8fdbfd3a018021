"""How fast programs compile: that is all that tiny models cost, and optimising is most of it.

The whole lab is run once with programs that are optimised as usual: tests/test_smoke.py.
"""

import importlib.metadata
import os

# A pipeline of MLIR for each loop, and a module for each few of them: three quarters of what is left.
_FLAGS = " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
_GIVEN = os.environ.get("XLA_FLAGS", "").replace(_FLAGS, "")  # a worker of pytest has those of its session

USUAL = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0", "XLA_FLAGS": _GIVEN}
FAST = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "XLA_FLAGS": _GIVEN}
if importlib.metadata.version("jax").startswith("0.10."):  # later ones have no such flags, and compile faster
    FAST["XLA_FLAGS"] += _FLAGS
