"""Trains one run of a study, or several as one vmapped program, and writes down the result."""

import contextlib
import hashlib
import json
import pathlib
import shutil
from collections.abc import Callable

import jax
from ml_collections import ConfigDict

from lab import model as lab_model
from lab import runtime, watch
from lab.errors import UserError
from lab.model import mesh as lab_mesh
from lab.model import parameter
from lab.storage import write_json
from lab.study import results
from lab.study.define import identity
from lab.study.run import segments
from lab.study.run import weights as learned
from lab.study.run.hosts import agreed
from lab.study.run.log import Log, Meter
from lab.study.run.progress import Display
from lab.study.run.runs import Run, Unit
from lab.train import compiled, loop, memory, partition
from lab.train.checkpoint import Checkpoints, Position
from lab.train.step import State
from lab.train.workload import Member, Record, Workload


def train(unit: Unit, display: Display, stop: Callable[[int], bool]) -> tuple[str, object]:
    """Trains the runs of a unit; returns a line about it, and the model where it is that of one run (else None)."""
    configs = [run.cell.seeded(run.seed) for run in unit]
    config, mesh = configs[0], lab_mesh.make(configs[0].run.mesh)
    if not config.train.steps:
        return _untrained(unit, configs, mesh)
    writes = jax.process_index() == 0
    logs = [Log(run, writes) for run in unit]
    meter = Meter(display, unit, config.run.log.every)

    here = segments.way(config, mesh, len(unit))

    def on_start(step: int) -> None:
        meter.start(step)
        for run in unit if writes and step < config.train.steps else ():
            if told := segments.begin(run.directory, step, here):
                display.say(f"{run.name} {told}")
        for log in logs:
            log.start(step)

    def on_step(records: list[Record]) -> None:
        rate = meter.step(records)
        for log, record in zip(logs, records, strict=True):
            log.step(record, rate)

    def on_checkpoint(step: int, state: State) -> None:
        for log, weights in zip(logs, learned.of_members(state.model.stream, len(unit)), strict=True):
            log.weights(step, weights)

    checkpoints = Checkpoints(checkpoint_directory(unit), config.run.checkpoint.keep)
    workload = Workload([Member(c, run.data.train) for c, run in zip(configs, unit, strict=True)])
    with contextlib.ExitStack() as closing, _failures_told():  # all of them, whichever fails
        for log in logs:
            closing.callback(log.close)
        closing.callback(checkpoints.close)
        logged = agreed([min(results.steps_logged(run.directory) for run in unit)])[0]
        checkpoints.take_back(logged, f"metrics.jsonl has no line of step {logged}, which is made again")
        callbacks = dict(on_start=on_start, on_step=on_step, on_checkpoint=on_checkpoint, stop=stop)
        trained = loop.train(workload, checkpoints, mesh, **callbacks)
        watch.begin(unit[0].name, "writes")
        weights = learned.of_members(trained.state.model.stream, len(unit))
        if workload.vmapped:
            _keep_members(unit, trained.state, config)
        if writes:
            for i, (run, log) in enumerate(zip(unit, logs, strict=True)):
                log.finish(weights[i])
                write_json(run.directory / "result.json", _result(run, configs[i], mesh, trained))
    if workload.vmapped and writes:
        drop_stack(unit)
    if workload.vmapped:
        return _told(trained), None
    return _told(trained), partition.whole(compiled.laid(trained.state.model, mesh))


@contextlib.contextmanager
def _failures_told():
    """What closes files and checkpoints behind an error may wait for other processes: they hear of it before."""
    try:
        yield
    except (loop.NonFinite, loop.Stopped):  # all meet them at once
        raise
    except Exception as error:
        watch.fails(error, unexpected=not isinstance(error, UserError))
        raise


def _untrained(unit: Unit, configs: list[ConfigDict], mesh) -> tuple[str, None]:
    """The results of runs that take no step: they are asked with the weights that they begin from."""
    for run, config in zip(unit, configs, strict=True) if jax.process_index() == 0 else ():
        checkpoint_directory((run,)).mkdir(exist_ok=True)  # there, and empty
        segments.begin(run.directory, 0, segments.way(config, mesh, len(unit)))
        nothing = loop.Trained(None, 0, 0.0, 0.0, 0, None)
        write_json(run.directory / "result.json", _result(run, config, mesh, nothing))
    return "", None


class LostLines(UserError):
    """The log of a run was damaged while it was trained."""

    exit_code = 1

    def __init__(self, run: Run, step: int):
        super().__init__(
            f"{run.directory / 'metrics.jsonl'} has lost the line of step {step}, so that its tokens cannot be "
            "counted; run the same command again: it makes that step again"
        )


def checkpoint_directory(unit: Unit) -> pathlib.Path:
    """A run's own; of a stack, one beside the cells, named by its members, until each has its own."""
    if len(unit) == 1:
        return unit[0].directory / "checkpoints"
    members = hashlib.sha256(json.dumps([(run.place, run.seed) for run in unit]).encode()).hexdigest()[:12]
    return unit[0].directory.parents[2] / "stacks" / members / "checkpoints"


def drop_stack(unit: Unit) -> None:
    """Deletes the checkpoints of a stack that nothing goes on from."""
    directory = checkpoint_directory(unit)
    if directory.exists():
        shutil.rmtree(directory)
    with contextlib.suppress(OSError):  # another stack is there, or what was set aside
        for above in directory.parents[:2]:
            above.rmdir()


def _keep_members(unit: Unit, states, config: ConfigDict) -> None:
    """The last checkpoint of each member of a stack, as a solo run leaves it."""
    for i, run in enumerate(unit):
        checkpoints = Checkpoints(run.directory / "checkpoints", config.run.checkpoint.keep)
        texts = config.train.steps * config.data.rows * config.data.texts_per_row
        checkpoints.save(Position(config.train.steps, texts), compiled.unstacked(states, i))
        checkpoints.wait()
        checkpoints.close()


def _told(trained: loop.Trained) -> str:
    if not trained.steps:
        return ""
    return (
        f"{trained.tokens / trained.seconds:,.0f} tokens/s, {trained.outside / trained.seconds:.1%} of "
        f"{trained.seconds:.1f} s outside the compiled step"
    )


def _result(run: Run, config: ConfigDict, mesh, trained: loop.Trained) -> dict:
    lines, logged = results.metrics(run.directory), results.steps_logged(run.directory)
    if logged < config.train.steps:
        raise LostLines(run, logged)
    hashes = "".join(line["text_hash"] for line in lines)
    return {
        "cell": run.cell.name,
        "identity": identity.name_of(run.identity),
        "seed": run.seed,
        "labels": run.cell.labels,
        "parameters": parameter.count(lab_model.abstract(config.model, config.run)),
        "tokens": sum(line["tokens"] for line in lines),
        "timings": [_train_timing(trained)],
        "environment": runtime.environment(mesh),
        "segments": segments.read(run.directory),
        "data": run.data.fingerprint,
        "text_hash": hashlib.sha256(hashes.encode()).hexdigest()[:16],
    }


def _train_timing(trained: loop.Trained) -> dict:
    """Of the steps made by the process that finished the run; a resumed run has made some before."""
    return {
        "phase": "train",
        "seconds": trained.seconds,
        "steps": trained.steps,
        "tokens_per_second": trained.tokens / trained.seconds if trained.steps else None,
        "peak_bytes": memory.peak(trained.executable) if trained.executable else None,
        "overhead_share": trained.outside / trained.seconds if trained.steps else None,
    }
