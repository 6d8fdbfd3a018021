"""One implementation of attention tried on this machine: is it right, does it repeat itself, how fast is it?

    python -m lab.kernels.trial --config=configs/rope_ablation.py:gpu     # the table of all that can run here

A trial is a process of its own, since a kernel may crash or hang: lab.kernels.choice starts this module with a file of
problems and a name, and reads a line of JSON whenever more is known. Numbers first, on small packs against the
reference in float32, with padding; then whether the same inputs, with others between, give the same bits; then the time
on the study's own shapes, with a few numbers of what came out there, which other implementations must share.
"""

import dataclasses
import hashlib
import json
import pathlib
import pickle
import statistics
import sys
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from lab import kernels
from lab.coordinates import Coordinates
from lab.errors import UserError
from lab.kernels import reference, rules
from lab.kernels.rotary import rotate, rotation
from lab.kernels.rules import Rule

SMALL = 200  # tokens of a row of the packs that numbers are compared on: more than a tile, and no multiple of one
PACKS = 3
NODES = 6  # of texts that fork and join
# |found - reference| / |reference| that is allowed; an implementation in 16 bits rounds probabilities before it sums.
ALLOWED = {
    "16 bits": {"o": 8e-3, "lse": 2e-3, "dq": 1.2e-2, "dk": 1.2e-2, "dv": 1.2e-2, "df": 3e-2},
    "32 bits": {"o": 1e-3, "lse": 1e-3, "dq": 2e-3, "dk": 2e-3, "dv": 2e-3, "df": 1e-2},
}
ROUNDS, LEAST = 5, 0.05  # timed rounds, each of calls that take so many seconds together


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """Attention as a study calls it, on one device.

    Shapes [rows, tokens, heads, width] of queries, keys and values; frequencies: pairs of queries that the kernel may
    rotate, 0 for none. training: with gradients; of_lse: with that of the log normaliser. at: NumPy coordinates of a
    batch, of queries and of keys; free: whether tokens may be put in another order. calls: how often it is made.
    forked: whether it has limits, as where texts fork and join.
    """

    q: tuple[int, int, int, int]
    k: tuple[int, int, int, int]
    v: tuple[int, int, int, int]
    dtype: str
    rule: Rule
    scale: float
    softcap: float
    frequencies: int
    training: bool
    of_lse: bool
    at: tuple[Coordinates, Coordinates]
    free: bool = True
    calls: int = 1
    forked: bool = False

    def program(self) -> str:
        """What two problems share that one program computes."""
        of_batches = ("at", "free", "calls")
        return " ".join(repr(getattr(self, x.name)) for x in dataclasses.fields(self) if x.name not in of_batches)

    def key(self) -> str:
        """What two problems share that are one."""
        at = hashlib.sha256(b"".join(np.ascontiguousarray(x).tobytes() for x in jax.tree.leaves(self.at)))
        return " ".join([self.program(), repr(self.free), at.hexdigest()])

    def __str__(self) -> str:
        rows, tokens, heads, width = self.q
        wide = f"{width}" if width == self.v[3] else f"{width}/{self.v[3]}"
        passes = "training" if self.training else "forward"
        return f"{rows} x {tokens}, {heads} heads over {self.k[2]} of {wide}, {self.dtype}, {passes}"


def draw(problem: Problem, rng: np.random.Generator, at, shapes) -> tuple:
    """(q, k, v, coordinates, frequencies, cotangents of (o, lse))"""
    q, k, v = (jnp.asarray(rng.normal(size=shape), problem.dtype) for shape in shapes)
    frequencies = rng.normal(size=(3, problem.frequencies)) / 10 if problem.frequencies else None
    do = jnp.asarray(rng.normal(size=(*shapes[0][:3], shapes[2][3])), problem.dtype)
    dlse = jnp.asarray(rng.normal(size=shapes[0][:3]), jnp.float32)
    return q, k, v, at, None if frequencies is None else jnp.asarray(frequencies, jnp.float32), (do, dlse)


def program(problem: Problem, name: str) -> Callable:
    """(q, k, v, at, frequencies, cotangents, tiles, limits) -> {"o", "lse"} and, in training, {"dq", "dk", "dv"} and,
    of frequencies, "df". tiles: what layers share, or None. limits: of a problem that is forked."""
    key = problem.program(), name
    if key not in _programs:
        _programs[key] = _program(problem, name)
    return _programs[key]


_programs: dict[tuple[str, str], Callable] = {}


def _program(problem: Problem, name: str) -> Callable:
    def attend(q, k, v, frequencies, at, tiles, limits):
        if name == "reference":
            q = q if frequencies is None else rotate(q, rotation(at[0], frequencies))
            rule = rules.forked(problem.rule) if problem.forked else problem.rule
            return reference.attend(q, k, v, *at, rule, problem.scale, problem.softcap, limits=limits)
        options = dict(scale=problem.scale, softcap=problem.softcap, return_lse=True, frequencies_3F=frequencies)
        options |= dict(tiles=tiles, limits=limits)
        return kernels.attend(q, k, v, *at, problem.rule, implementation=name, **options)

    def run(q, k, v, at, frequencies, cotangents, tiles=None, limits=None):
        if not problem.training:
            o, lse = attend(q, k, v, frequencies, at, tiles, limits)
            return {"o": o, "lse": lse}
        call = lambda q, k, v, frequencies: attend(q, k, v, frequencies, at, tiles, limits)  # noqa: E731
        if problem.of_lse:
            (o, lse), pull = jax.vjp(call, q, k, v, frequencies)
            gradients = pull(cotangents)
        else:
            o, pull, lse = jax.vjp(call, q, k, v, frequencies, has_aux=True)
            gradients = pull(cotangents[0])
        found = {"o": o, "lse": lse} | dict(zip(("dq", "dk", "dv", "df"), gradients, strict=True))
        return {key: x for key, x in found.items() if x is not None}

    # A search for the fastest products in float32 would take longer than all the rest of a trial.
    unhurried = name == "reference" and jax.default_backend() == "gpu"
    return jax.jit(run, compiler_options={"xla_gpu_autotune_level": 0} if unhurried else None)


def packs(rng: np.random.Generator, rows: int, tokens: int) -> Coordinates:
    """Groups of branches after a prompt, padding between and behind them, and a token that nobody sees, itself too."""
    draw = lambda low, high: rng.integers(low, high, (rows, tokens)).astype(np.int32)  # noqa: E731
    segment = np.sort(draw(0, 3), axis=1)
    padding = draw(0, 8) == 0
    index = np.broadcast_to(np.arange(tokens, dtype=np.int32), (rows, tokens))
    return Coordinates(np.where(padding, -1, segment), draw(0, 4), index // 4, index.copy())


def forks(rng: np.random.Generator, at: Coordinates) -> tuple[Coordinates, np.ndarray]:
    """The same tokens as those of nodes, and limits of these of every kind."""
    rows, tokens = at.shape
    node = rng.integers(0, NODES, at.shape).astype(np.int32)
    kinds = [rules.HIDDEN, -1, tokens // 8, rules.ENDLESS]
    return dataclasses.replace(at, node=node), rng.choice(kinds, (rows, NODES, NODES)).astype(np.int32)


def errors(found: dict, expected: dict) -> dict[str, float]:
    """Relative ones of every output; infinite where one is finite and the other is not."""
    told = {}
    for name, x in expected.items():
        a, b = np.asarray(found[name], np.float64), np.asarray(x, np.float64)
        if (np.isfinite(a) != np.isfinite(b)).any():
            told[name] = float("inf")
            continue
        a, b = (np.where(np.isfinite(b), y, 0) for y in (a, b))
        told[name] = float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-6))
    return told


def numbers(problem: Problem, name: str, rng: np.random.Generator) -> dict:
    """{"errors", "allowed", "same"} on small packs."""
    ours, theirs = program(problem, name), jax.default_matmul_precision("highest")(program(problem, "reference"))
    rows, tokens = 2, min(SMALL, problem.q[1])
    keys = tokens * problem.k[1] // problem.q[1]
    shapes = [(rows, n, *shape[2:]) for n, shape in ((tokens, problem.q), (keys, problem.k), (keys, problem.v))]
    worst, same, before = {}, True, None
    for _ in range(PACKS):
        of_keys, limits = packs(rng, rows, keys), None
        if problem.forked:
            of_keys, limits = forks(rng, of_keys)
        of_queries = of_keys.map(lambda x: np.ascontiguousarray(x[:, -tokens:]))
        inputs = *draw(problem, rng, (of_queries, of_keys), shapes), None, limits
        found = jax.device_get(ours(*inputs))
        full = jax.tree.map(lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, inputs)
        for key, error in errors(found, jax.device_get(theirs(*full))).items():
            worst[key] = max(worst.get(key, 0.0), error)
        if before is not None:  # the inputs before these, after these
            again = jax.device_get(ours(*before[0]))
            same = same and all(np.array_equal(again[key], x, equal_nan=True) for key, x in before[1].items())
        before = inputs, found
    allowed = ALLOWED["32 bits" if jnp.dtype(problem.dtype).itemsize > 2 else "16 bits"]
    return {"errors": worst, "allowed": {key: allowed[key] for key in worst}, "same": same}


def arranged(problem: Problem, name: str) -> tuple[Coordinates, Coordinates]:
    """The coordinates in the order that an implementation would be given them in."""
    of_queries, of_keys = problem.at
    if of_queries.shape == of_keys.shape:
        order, _ = kernels.arrange(of_keys, [problem.rule], name, problem.free)
        of_queries = of_keys = of_keys.map(lambda x: np.take_along_axis(x, order, axis=1))
    return jax.tree.map(jnp.asarray, (of_queries, of_keys))


def timed(problem: Problem, name: str) -> dict:
    """{"seconds": median of a call, "sums": a few numbers of what came out} on the study's own shapes."""
    rng = np.random.default_rng(0)  # the same for every implementation
    at = arranged(problem, name)
    tiles = jax.jit(lambda at: kernels.plan_tiles(*at, problem.rule, name))(at)  # once for all layers: not timed
    inputs = *draw(problem, rng, at, (problem.q, problem.k, problem.v)), tiles
    run = program(problem, name)
    found = jax.block_until_ready(run(*inputs))
    sums = {}
    for key, x in found.items():
        x = jnp.where(jnp.isfinite(x), x, 0).astype(jnp.float32).ravel()
        waves = jnp.cos(jnp.arange(x.size, dtype=jnp.float32) * 0.7)
        sums[key] = [float(jnp.linalg.norm(x)), float(x @ waves / jnp.linalg.norm(waves)) * x.size**0.5]  # of one size
    begun = time.perf_counter()
    jax.block_until_ready(run(*inputs))
    calls = max(1, min(100, round(LEAST / max(time.perf_counter() - begun, 1e-6))))
    rounds = []
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        for _ in range(calls):
            found = run(*inputs)
        jax.block_until_ready(found)
        rounds.append((time.perf_counter() - begun) / calls)
    return {"seconds": statistics.median(rounds), "sums": sums}


def tried(problems: list[Problem], name: str) -> Iterator[dict]:
    """What becomes known, step by step, of an implementation: numbers of all problems first, then times."""
    known: dict[str, dict] = {}
    for place, problem in enumerate(problems):
        yield {"problem": place, "begins": "numbers"}
        if problem.program() not in known:
            known[problem.program()] = numbers(problem, name, np.random.default_rng())
        yield {"problem": place, **known[problem.program()]}
    for place, problem in enumerate(problems):
        yield {"problem": place, "begins": "time"}
        yield {"problem": place, **timed(problem, name)}


def work(path: pathlib.Path, name: str) -> None:
    """Tries one implementation, in this process."""
    with path.open("rb") as file:
        problems = pickle.load(file)
    say = lambda **line: print(json.dumps(line), flush=True)  # noqa: E731
    try:
        for line in tried(problems, name):
            say(**line)
    except UserError as error:
        say(refused=str(error))
    except Exception as error:  # of a compiler, of a device: whatever it is, this implementation is not taken
        said = (str(error).strip().splitlines() or [""])[0]
        say(refused=f"{type(error).__name__}: {said[:300]}")


def main(argv: list[str]) -> None:
    """Tries all that can run here on what a study asks of attention. A command, which may import all."""
    from lab import command
    from lab.study.open import open
    from lab.study.run import attention

    _, config, overridden = command.parse(command.parser(__doc__, "lab.kernels.trial"), argv)
    attention.show(open(config, overridden).cells)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--problems"]:
        work(pathlib.Path(sys.argv[2]), sys.argv[3])
    else:
        from lab import command

        command.run(main)
