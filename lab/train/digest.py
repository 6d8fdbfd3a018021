"""A digest of what a jaxpr computes: of its outputs as functions of its inputs, whatever it is called and written like.

The digest of a value is one of the primitive that made it, that primitive's params, and the digests of its operands. So
the names of variables, the order of independent equations, common subexpressions and equations that nothing reads do
not count. Calls (jit, custom derivatives, remat) are seen through, and so are primitives that only say where a value
lies. Literals and constants count by dtype, shape and bytes, other avals by dtype and shape.

What does count, although it may compute the same: the order of a sum of more than two, since its rounding differs; and
the order of what a loop reads from outside, which is that of first use.
"""

import dataclasses
import enum
import functools
import hashlib
from collections.abc import Sequence

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal
from jax.interpreters.partial_eval import dce_jaxpr

# Equations that compute what the jaxpr in this param does. A rule of derivation is a closure; once a program is
# differentiated, what the rule did is in its equations.
CALLS = {
    "jit": "jaxpr", "closed_call": "call_jaxpr", "call": "call_jaxpr", "remat2": "jaxpr", "checkpoint": "jaxpr",
    "custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr", "custom_vmap_call": "call",
}  # fmt: skip

# Equations whose outputs are their operands.
IDENTITIES = {
    "copy", "device_put", "layout_constraint", "name", "optimization_barrier", "sharding_constraint", "stop_gradient",
}  # fmt: skip

COMMUTATIVE = {"add", "add_any", "and", "eq", "max", "min", "mul", "ne", "or", "xor"}  # to the last bit

SPLITS = {"ft_in", "ft_out"}  # params that say how many operands a scan takes from outside, carries and runs over

# Params that say how or where an equation runs, or what it is called.
IGNORED = {
    "_split_transpose", "debug_info", "linear", "mesh", "name", "name_and_src_info", "out_sharding", "out_shardings",
    "sharding", "unroll", "weak_type",
}  # fmt: skip


def digest(closed: ClosedJaxpr, inputs: Sequence | None = None) -> str:
    """32 hex digits. inputs: what each input is known by, a string or a number; None: its position.

    Inputs that nothing reads do not count. Equations with effects count all, in their order. Raises TypeError for a
    param that has no description of its own.
    """
    jaxpr, used = dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    names = range(len(used)) if inputs is None else inputs
    return _Digester().closed(jaxpr, closed.consts, [name for name, u in zip(names, used, strict=True) if u])


def _hashed(description) -> str:
    """Of nested tuples and lists of strings and numbers."""
    return hashlib.blake2b(repr(description).encode(), digest_size=16).hexdigest()


class _Digester:
    """Digests values in the order of equations, and each nested jaxpr once."""

    def __init__(self):
        self.nested: dict[int, tuple] = {}  # id -> (jaxpr, digest): held, so that no other takes its id
        self.world = ""  # what equations with effects have done so far: each reads it and leaves another

    def closed(self, jaxpr: Jaxpr, consts, names: Sequence) -> str:
        """Of a jaxpr on its own, inputs known by `names`."""
        outer, self.world = self.world, ""
        operands = [_hashed(("input", name, _aval(v.aval))) for name, v in zip(names, jaxpr.invars, strict=True)]
        outputs = self.outputs(jaxpr, consts, operands)
        found, self.world = _hashed((outputs, self.world)), outer
        return found

    def outputs(self, jaxpr: Jaxpr, consts, operands: list[str]) -> list[str]:
        """Of each output, given the digests of the inputs."""
        constants = [_hashed(_constant(value)) for value in consts]
        known = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*constants, *operands), strict=True))

        def read(atom) -> str:
            return _hashed(_constant(atom.val, atom.aval.dtype)) if isinstance(atom, Literal) else known[atom]

        for equation in jaxpr.eqns:
            known.update(
                zip(equation.outvars, self.equation(equation, [read(v) for v in equation.invars]), strict=True)
            )
        return [read(v) for v in jaxpr.outvars]

    def equation(self, equation: JaxprEqn, operands: list[str]) -> list[str]:
        name, params = equation.primitive.name, equation.params
        if name in CALLS:
            return self.outputs(*_opened(params[CALLS[name]]), operands)
        if name in IDENTITIES or _keeps_dtype(equation):
            return operands
        if name in COMMUTATIVE:
            operands = sorted(operands)
        told = [(key, self.param(name, key, params[key])) for key in sorted(params) if key not in IGNORED]
        found = _hashed((name, told, operands, self.world if equation.effects else ""))
        if equation.effects:
            self.world = found
        count = len(equation.outvars)
        return [found] if count == 1 else [f"{found}:{i}" for i in range(count)]

    def param(self, primitive: str, key: str, value):
        """A description of a param that is the same in every process, of strings, numbers, tuples and lists."""
        again = functools.partial(self.param, primitive, key)
        if key in SPLITS:
            return [len(part) for part in value.unpack()]
        if isinstance(value, enum.Enum):
            return str(value)
        if value is None or isinstance(value, bool | int | float | complex | str | bytes):
            return value
        if isinstance(value, ClosedJaxpr | Jaxpr):
            return self.jaxpr(value)
        if isinstance(value, tuple | list):
            return [again(part) for part in value]
        if isinstance(value, dict | frozenset | set):
            parts = value.items() if isinstance(value, dict) else value
            return sorted((again(part) for part in parts), key=repr)
        if isinstance(value, np.ndarray | np.generic | jax.Array):
            return _constant(value)
        if isinstance(value, np.dtype) or (isinstance(value, type) and issubclass(value, np.generic)):
            return str(np.dtype(value))
        if isinstance(value, functools.partial):
            return [again(part) for part in (value.func, value.args, value.keywords)]
        if hasattr(value, "shape") and hasattr(value, "dtype"):
            return _aval(value)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value) if f.name not in IGNORED]
            return [type(value).__qualname__, *((field, again(part)) for field, part in fields)]
        if hasattr(value, "__qualname__"):
            return value.__qualname__  # a function: what it closes over is not known
        text = repr(value)
        if " at 0x" in text:
            raise TypeError(f"the param {key!r} of {primitive!r} has no description that lasts: {text}")
        return text

    def jaxpr(self, jaxpr) -> str:
        if id(jaxpr) not in self.nested:
            inner, consts = _opened(jaxpr)
            self.nested[id(jaxpr)] = jaxpr, self.closed(inner, consts, range(len(inner.invars)))
        return self.nested[id(jaxpr)][1]


def _opened(jaxpr) -> tuple:
    """(jaxpr, constants) of one that is closed or open."""
    return getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())


def _keeps_dtype(equation: JaxprEqn) -> bool:
    """Whether it only makes a weak type strong."""
    is_cast = equation.primitive.name == "convert_element_type"
    return is_cast and equation.invars[0].aval.dtype == equation.outvars[0].aval.dtype


def _aval(aval) -> tuple:
    aval = getattr(aval, "inner_aval", aval)  # of a reference
    return str(getattr(aval, "dtype", type(aval).__name__)), getattr(aval, "shape", ())


def _constant(value, dtype=None) -> tuple:
    if isinstance(value, jax.Array) and jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
        return str(value.dtype), *_constant(jax.random.key_data(value))
    array = np.asarray(value, dtype)
    return str(array.dtype), array.shape, array.tobytes()
