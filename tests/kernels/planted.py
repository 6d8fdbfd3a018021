"""`python planted.py --problems FILE NAME`: a trial of an implementation that fails in its own way."""

import os
import pathlib
import signal
import sys
import time
import types

import jax
import jax.numpy as jnp

from lab import kernels
from lab.kernels import reference, trial


def right(*arguments):
    return reference.attend(*arguments)


def wrong(*arguments):
    o, lse = reference.attend(*arguments)
    return 1.05 * o, lse


def wrong_backward(*arguments):
    o, lse = reference.attend(*arguments)
    return o + 0.1 * (o - jax.lax.stop_gradient(o)), lse


def wrong_when_large(*arguments):
    return wrong(*arguments) if arguments[0].shape[1] > trial.SMALL else right(*arguments)


def restless(*arguments):
    o, lse = reference.attend(*arguments)
    noise = lambda: jnp.float32(time.time_ns() % 1000 * 1e-9).reshape(())  # noqa: E731
    return o + jax.pure_callback(noise, jax.ShapeDtypeStruct((), jnp.float32)).astype(o.dtype), lse


def slow(*arguments):
    o, lse = reference.attend(*arguments)

    def wait():
        time.sleep(0.2)
        return jnp.float32(0)

    return o + jax.pure_callback(wait, jax.ShapeDtypeStruct((), jnp.float32)).astype(o.dtype), lse


def crashing(*arguments):
    print("about to crash", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)


def hanging(*arguments):
    time.sleep(1000)


def out_of_memory(*arguments):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 17179869184 bytes.")


def refusing(*arguments):
    raise kernels.UserError("attention implementation 'refusing' takes no heads of that width")


PLANTED = (
    *(right, wrong, wrong_backward, wrong_when_large, restless, slow, crashing, hanging, out_of_memory, refusing),
)
NAMES = [each.__name__ for each in PLANTED]

if __name__ == "__main__":
    for attend in PLANTED:
        module = types.ModuleType(f"lab.kernels.{attend.__name__}")
        module.attend = attend
        sys.modules[module.__name__] = module
        kernels.IMPLEMENTATIONS[attend.__name__] = kernels.Implementation()
    trial.work(pathlib.Path(sys.argv[2]), sys.argv[3])
