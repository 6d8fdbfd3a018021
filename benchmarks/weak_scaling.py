"""What it costs that several processes of one machine train as one: 2 and 4 of them, with the rows that one has alone.

    python benchmarks/weak_scaling.py [--quick] [--out weak_scaling.json]

Each process has one CPU device and is pinned to one core; where there are more processes than cores, several share one.
Three groups take turns, so that what is compared stands beside each other in time: one process alone; N processes that
know nothing of each other, at the same time on the same cores (what sharing cores and memory costs); and the same N as
one program (what coordination costs). All run the loop that studies run, on real batches, with checkpoints.

Printed, after each of its rows: a Markdown table of medians, in milliseconds. "Sums" are the collectives of a step, and
the bytes of all gradients; "all-reduce" is the sum of gradients by itself, without a step around it; "stop" is the
question after every step whether a stop was asked for; "rest" is what of coordination is neither: waiting for the
slowest process, mostly. "Save" is how long a step waits where a checkpoint is due.
"""

import argparse
import contextlib
import itertools
import json
import os
import pathlib
import re
import socket
import statistics
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from lab import runtime

runtime.tune_allocator()

import peers  # noqa: E402

PROCESSES = (2, 4)
# width, layers, heads, rows for each process, tokens of a row
MODELS = {"tiny": (64, 4, 4, 8, 128), "small": (256, 6, 8, 8, 256)}
WARM = 3  # first steps of a turn are not counted
REDUCTIONS = 20  # of a turn


def config_of(model: str, processes: int, steps: int):
    from lab import config as lab_config

    width, layers, heads, rows, tokens = MODELS[model]
    config = lab_config.base()
    config.model.update(dict(dim=width, layers=layers))
    config.model.mixer.update(dict(heads=heads, kv_heads=heads, head_dim=width // heads))
    config.model.feedforward.width = 8 * width // 3
    config.data.update(dict(text_length=tokens, rows=rows * processes))
    config.train.update(dict(steps=steps, warmup=2))
    config.run.checkpoint.every = steps // 2
    return config


class Timed:
    """Checkpoints that note for how long the loop waits for each."""

    def __init__(self, checkpoints):
        self._checkpoints, self.seconds = checkpoints, []

    def __getattr__(self, name):
        return getattr(self._checkpoints, name)

    def save(self, position, state) -> None:
        begun = time.perf_counter()
        self._checkpoints.save(position, state)
        if position.step:  # what is done once in a process is done then
            self.seconds.append(time.perf_counter() - begun)


def work(model: str, processes: int, steps: int, core: int) -> None:
    """One process of a group: answers what the benchmark asks."""
    os.sched_setaffinity(0, {core})
    answers = os.dup(1)
    os.dup2(2, 1)  # Gloo tells of its connections
    config = config_of(model, processes, steps)
    runtime.start(config)

    import jax
    import numpy as np
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from lab import data
    from lab.model import mesh as lab_mesh
    from lab.model import parameter
    from lab.study.run import hosts
    from lab.train import loop
    from lab.train.checkpoint import Checkpoints
    from lab.train.workload import Member, Workload

    mesh = lab_mesh.make(config.run.mesh)
    hosts.connect(mesh, 600)
    workload, stop = Workload([Member(config, data.open(config).train)]), runtime.stop_requests()

    def train(directory: str) -> dict:
        """Seconds of steps, of asking for a stop, and of waiting for checkpoints."""
        ended, asked = [], []

        def timed_stop(step: int) -> bool:
            begun = time.perf_counter()
            found = stop(step)
            asked.append(time.perf_counter() - begun)
            return found

        nothing = lambda *_: None  # noqa: E731
        checkpoints = Checkpoints(pathlib.Path(directory), keep=1)
        with contextlib.closing(checkpoints):
            timed = Timed(checkpoints)
            note = lambda records: ended.append(time.perf_counter())  # noqa: E731
            trained = loop.train(
                workload, timed, mesh, on_start=nothing, on_step=note, on_checkpoint=nothing, stop=timed_stop
            )
        spans = np.diff(ended)
        every = config.run.checkpoint.every  # such a step and the one behind it are not counted: `save` is, of its own
        due = [step for step in range(WARM, steps) if (step + 1) % every and step % every]
        text = trained.executable.as_text()
        return {
            "step": [float(spans[step - 1]) for step in due], "stop": asked[WARM:], "save": timed.seconds,
            "collectives": len(re.findall(r"= \S.* all-reduce(?:-start)?\(", text)),
            "tokens": trained.tokens // steps,
        }  # fmt: skip

    state = workload.initial_state(mesh)
    shapes = [w.shape for w in jax.tree.leaves(parameter.split(state.model)[1])]
    del state
    laid = NamedSharding(mesh, P("data"))
    arrays = [jax.make_array_from_process_local_data(laid, np.ones((1, *shape), np.float32)) for shape in shapes]
    summed = jax.jit(lambda xs: [x.sum(0) for x in xs], out_shardings=NamedSharding(mesh, P()))

    def reduce() -> dict:
        """Seconds of summing arrays of the gradient's shapes over the processes."""
        found = []
        for _ in range(REDUCTIONS):
            begun = time.perf_counter()
            jax.block_until_ready(summed(arrays))
            found.append(time.perf_counter() - begun)
        return {"reduce": found[WARM:], "bytes": 4 * sum(int(np.prod(shape)) for shape in shapes)}

    os.dup2(answers, 1)
    # JAX ends a process when all of them end, so all are told to leave before one is waited for.
    peers.answer({"train": train, "reduce": reduce, "leave": jax.distributed.shutdown})


class Group:
    """Processes that are asked at the same time. coordinated: as one program."""

    def __init__(self, model: str, processes: int, steps: int, coordinated: bool):
        cores = sorted(os.sched_getaffinity(0))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        theirs = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
        clean = {name: value for name, value in os.environ.items() if name not in theirs}
        clean |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
        self._peers = []
        for process in range(processes):
            arguments = model, processes if coordinated else 1, steps, cores[process % len(cores)]
            joined = dict(zip(theirs, (address, str(processes), str(process)), strict=True)) if coordinated else {}
            command = [sys.executable, __file__, "--work", *map(str, arguments)]
            self._peers.append(peers.Peer(command, clean | joined))

    def ask(self, do: str, requests: list[dict]) -> list[dict]:
        """What as many of the processes as there are requests answer, all asked at once."""
        asked = self._peers[: len(requests)]
        for peer, request in zip(asked, requests, strict=True):
            peer.begin(do, **request)
        return [peer.end() for peer in asked]

    def close(self) -> None:
        with contextlib.suppress(RuntimeError):
            self.ask("leave", [{}] * len(self._peers))
        for peer in self._peers:
            peer.close()


def measure(model: str, processes: int, rounds: int, steps: int) -> dict:
    """Medians in seconds of what the groups take, in turns; a first turn warms up."""
    found: dict[str, list[float]] = {}
    with contextlib.ExitStack() as closing, tempfile.TemporaryDirectory() as place:
        groups = {
            name: Group(model, processes, steps, name == "coordinated") for name in ("independent", "coordinated")
        }
        for group in groups.values():
            closing.callback(group.close)
        turns = ("alone", "independent", 1), *((name, name, processes) for name in groups)
        for turn in range(rounds + 1):
            for name, group, asked in turns:
                print(f"{model}, {processes} processes, turn {turn} of {rounds}: {name}", file=sys.stderr, flush=True)
                where = [f"{place}/{name}-{turn}" + ("" if name == "coordinated" else f"-{n}") for n in range(asked)]
                answers = groups[group].ask("train", [{"directory": directory} for directory in where])
                for what in ("step", "stop", "save") if turn else ():
                    found.setdefault(f"{name} {what}", []).extend(s for answer in answers for s in answer[what])
            reduced = groups["coordinated"].ask("reduce", [{}] * processes)
            if turn:
                found.setdefault("reduce", []).extend(s for answer in reduced for s in answer["reduce"])
    medians = {what: statistics.median(seconds) for what, seconds in found.items()}
    about = {"tokens_of_a_step": answers[0]["tokens"], "collectives": answers[0]["collectives"]}
    return {"model": model, "processes": processes, **about, "bytes": reduced[0]["bytes"], "seconds": medians}


HEADER = (
    *("model", "processes", "alone", "independent", "coordinated", "coordination", "of a step", "sums"),
    *("all-reduce", "stop", "rest", "save, independent", "save, coordinated"),
)


def table(rows: list[dict]) -> str:
    """Markdown, in milliseconds."""
    lines = ["| " + " | ".join(HEADER) + " |", "|---|" + "--:|" * (len(HEADER) - 1)]
    for row in rows:
        of = {what: 1000 * seconds for what, seconds in row["seconds"].items()}
        alone, apart, together = (of[f"{name} step"] for name in ("alone", "independent", "coordinated"))
        costs, reduce, stop = together - apart, of["reduce"], of["coordinated stop"]
        cells = [row["model"], str(row["processes"]), f"{alone:.1f}", f"{apart:.1f}", f"{together:.1f}", f"{costs:.1f}"]
        cells += [
            f"{costs / together:.0%}",
            f"{row['collectives']} of {row['bytes'] / 1e6:.1f} MB",
            f"{reduce:.1f}",
            f"{stop:.2f}",
            f"{costs - reduce - stop:.1f}",
        ]
        cells += [f"{of['independent save']:.0f}", f"{of['coordinated save']:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only whether it runs: the tiny model, two processes")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each group")
    parser.add_argument("--steps", type=int, default=40, help="of a turn; checkpoints: in its middle, at its end")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("weak_scaling.json"), help="the medians")
    parser.add_argument("--work", nargs=4, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.work:
        work(flags.work[0], *map(int, flags.work[1:]))
        return
    if flags.steps < 4 * WARM:
        parser.error(f"--steps {flags.steps} leaves no step to count: give at least {4 * WARM}")
    models, counts = (["tiny"], PROCESSES[:1]) if flags.quick else (list(MODELS), PROCESSES)
    rounds, steps = (1, 4 * WARM) if flags.quick else (flags.rounds, flags.steps)
    found = {"cores": runtime.cores(), "rounds": rounds, "steps": steps, "rows": []}
    for model, processes in itertools.product(models, counts):
        found["rows"].append(measure(model, processes, rounds, steps))
        flags.out.write_text(json.dumps(found, indent=1) + "\n")
        print(table(found["rows"]), flush=True)


if __name__ == "__main__":
    main()
