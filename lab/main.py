"""Runs a study: trains every cell, asks each what the config names, and reports as they end.

    python -m lab.main --config=configs/rope_ablation.py

What is trained is never trained again, and is asked only what is missing; an interrupted study goes on where it was.
Exit codes: 0 all cells done; 1 some cell failed, or a file cannot be read or written; 2 a mistake in what was asked;
75 stopped by SIGTERM or Ctrl-C with everything saved: run the same command again; 130 a second Ctrl-C, or one before
the first run; 69 of several processes, another one failed.
"""

from lab import runtime

runtime.tune_allocator()  # before anything imports JAX

import contextlib  # noqa: E402
import functools  # noqa: E402
import hashlib  # noqa: E402
import logging  # noqa: E402
import pathlib  # noqa: E402
import shlex  # noqa: E402
import signal  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable  # noqa: E402

from lab import cluster, command, storage, watch  # noqa: E402

STOPPED = watch.STOPPED
REPORTING = 0.05  # share of the time that reports may take while runs go on


class Reporter:
    """Rebuilds the report of a directory, after runs for at most a share REPORTING of the time."""

    def __init__(self, workdir: pathlib.Path, writes: bool, say: Callable[[str], None]):
        self._workdir, self._writes, self._say = workdir, writes, say
        self._due = 0.0

    def after_run(self) -> None:
        if time.monotonic() >= self._due:
            self.rebuild()

    def rebuild(self) -> None:
        if self._writes:
            from lab import report

            begun = time.monotonic()
            with watch.phase("reports"):
                self._guarded(storage.refresh)
                self._guarded(report.rebuild)
            self._due = time.monotonic() + (time.monotonic() - begun) / REPORTING

    def note_look(self) -> None:
        """Writes into the plan that the study can now be read, before its last report."""
        if self._writes:
            from lab.study.run import runs

            self._guarded(runs.note_look)

    def _guarded(self, make: Callable[[pathlib.Path], object]) -> None:
        """No error of a report ends a study that runs, unless the disk is full."""
        from lab.train.checkpoint import is_disk_full

        try:
            make(self._workdir)
        except Exception as error:
            if is_disk_full(error):
                raise
            said = " ".join(str(error).split())
            self._say(
                f"no report could be made ({type(error).__name__}: {said}); the runs go on, and python -m lab.report "
                f"{shlex.quote(storage.told(self._workdir))} makes it"
            )


def in_store(url: str, found: cluster.Cluster):
    """The copy of a study in an object store. Of several hosts the first one opens it, later, when they can agree on
    what it finds; all of them use the same copy."""
    if found.processes == 1:
        return storage.mirrored(url).open()
    name = hashlib.sha256(f"{url} {found.address}".encode()).hexdigest()[:16]
    return storage.mirrored(url, name, owner=found.process == 0)


def main(argv: list[str]) -> int:
    parser = command.parser(__doc__, "lab.main")
    parser.add_argument(
        "--workdir", help="where the study's files go, here or in an object store: s3://, gs:// (default: runs/<study>)"
    )
    parser.add_argument(
        "--cells", default="1/1", metavar="I/N", help="only every N-th cell, from the I-th: for job arrays"
    )
    parser.add_argument("--retry-failed", action="store_true", help="run cells again that failed before")
    parser.add_argument("--remake", action="store_true", help="make runs of other versions of jax again")
    flags, config, overridden = command.parse(parser, argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(STOPPED))  # until stop_requests: there is nothing to save yet
    found = runtime.start(config)

    import jax

    from lab.model import mesh
    from lab.study.define import resolve
    from lab.study.open import open
    from lab.study.run import hosts, places, runs
    from lab.study.run import study as run
    from lab.study.run.progress import Display
    from lab.train.loop import Stopped

    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax tells every save, and twice what it raises
    counts = runtime.CompileCounts()
    say = functools.partial(print, file=sys.stderr, flush=True)
    store = in_store(flags.workdir, found) if storage.is_remote(flags.workdir) else None
    workdir = store.local if store else None if flags.workdir is None else storage.home(flags.workdir)
    study = open(config, overridden, workdir, flags.remake).decide_attention(say)  # before a device is held
    hosts.meet("opening devices", config.run.join_timeout)
    runtime.open_devices()
    study = study.decide_mesh()
    config = study.config
    hosts.connect(mesh.make(config.run.mesh), config.run.join_timeout)
    if store and found.processes > 1:
        hosts.first(store.open)
        hosts.check_all_see(store.local)
    names = {cell.name for cell in study.cells[resolve.share(flags.cells)]}
    workdir, line = study.workdir, shlex.join(["python", "-m", "lab.main", *argv])
    first = jax.process_index() == 0
    replaced, held = [], contextlib.ExitStack()
    if store and first:
        held.callback(store.close)
    hosts.first(lambda: replaced.append(places.replaced(places.check(workdir, config), config)))
    tried = [trial.run for trial in study.trials if trial.cell in names]
    ours = [each for each in study.planned(line, held) if each.cell.name in names]
    stop = runtime.stop_requests()
    with held, Display(len(tried) + len(ours), quiet=not first) as display:
        reporter = Reporter(workdir, writes=first, say=display.say)
        rows = [cell.config.data.rows for cell in study.cells]
        display.say(runtime.described(found, study.mesh or mesh.told(mesh.make(config.run.mesh).shape), rows))
        devices = f"{jax.device_count()} {jax.devices()[0].platform} devices"
        display.say(f"{config.study.name}: {len(tried) + len(ours)} runs on {devices}, in {storage.told(workdir)}")
        for told in filter(None, (*replaced, runs.made_elsewhere(tried + ours))):
            display.say(told)
        make = functools.partial(
            run.run_study, display=display, stop=stop, after_run=reporter.after_run, retry_failed=flags.retry_failed
        )
        try:
            tuning_summary = make(runs.units_of(tried, config.study.vmap))
            if tried:
                watch.begin("", "plans", long=None)
                ours = [each for each in study.planned(line) if each.cell.name in names]
            summary = make(runs.units_of(ours, config.study.vmap))
        except Stopped as stopped:
            reporter.rebuild()
            display.say(f"stopped and saved at {stopped}; run the same command again to go on")
            return STOPPED
        watch.begin("", "ends", long=None)
        reporter.note_look()
        display.say(f"compiled: {counts}, for {tuning_summary.new + summary.new} new runs")
        reporter.rebuild()
        page = storage.told(workdir / "report.html")
        display.say(f"{summary.done} of {len(ours)} runs done, {summary.failed} failed; open {page}")
    return 1 if summary.failed else 0


if __name__ == "__main__":
    command.run(main)
