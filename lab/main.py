"""Runs a study: trains every cell, evaluates each under every condition, and reports as they end.

    python -m lab.main --config=configs/rope_ablation.py

Finished cells are never run again; an interrupted study goes on where it was. Exit codes: 0 all cells done; 1 some
cell failed, or the disk is full; 2 a mistake in what was asked, nothing was run; 75 stopped by SIGTERM or Ctrl-C with
everything saved: run the same command again.
"""

from lab import runtime

runtime.tune_allocator()  # before anything imports JAX

import functools  # noqa: E402
import logging  # noqa: E402
import pathlib  # noqa: E402
import shlex  # noqa: E402
import time  # noqa: E402

from lab import command  # noqa: E402

STOPPED = 75  # EX_TEMPFAIL: schedulers requeue it
REPORTING = 0.05  # share of the time that reports may take while runs go on


def main(argv: list[str]) -> int:
    parser = command.parser(__doc__)
    parser.add_argument("--workdir", type=pathlib.Path, help="where the study's files go (default: runs/<study>)")
    parser.add_argument(
        "--cells", default="1/1", metavar="I/N", help="only every N-th cell, from the I-th: for job arrays"
    )
    parser.add_argument("--retry-failed", action="store_true", help="run cells again that failed before")
    flags, config, overridden = command.parse(parser, argv)
    runtime.start(config)

    import jax

    from lab import report
    from lab.study.define import plan, resolve, tuning
    from lab.study.define.cell import Cell
    from lab.study.run import runs
    from lab.study.run import study as run
    from lab.study.run.progress import Display
    from lab.train.loop import Stopped

    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax tells every save, and twice what it raises
    counts = runtime.CompileCounts()
    cells = resolve.resolve(config, overridden)
    workdir = flags.workdir or pathlib.Path("runs") / config.study.name
    share = resolve.share(flags.cells)
    names = {cell.name for cell in cells[share]}
    first = jax.process_index() == 0

    def planned(cells: list[Cell]) -> list[runs.Run]:
        """Plans the cells, writes the plan down, and gives this program's share of their runs."""
        rows = plan.table(config, cells)
        every = runs.runs_of(cells, range(config.seed, config.seed + config.study.seeds), workdir)
        runs.check_devices(every)
        runs.check_hosts_agree(every)
        if first:
            line = shlex.join(["python", "-m", "lab.main", *argv])
            runs.write_plan(workdir, config, rows, every, [trial.describe() for trial in trials], line)
        return [r for r in every if r.cell.name in names]

    due = 0.0

    def rewrite_report(now: bool = False) -> None:
        """After a run, but for at most a share REPORTING of the time."""
        nonlocal due
        if first and (now or time.monotonic() >= due):
            begun = time.monotonic()
            report.rebuild(workdir)
            due = time.monotonic() + (time.monotonic() - begun) / REPORTING

    trials = tuning.trials(config, cells, workdir)
    ours = planned(tuning.tuned(cells, trials))
    tried = [trial.run for trial in trials if trial.cell in names]
    stop = runtime.stop_requests()
    with Display(len(tried) + len(ours), quiet=not first) as display:
        devices = f"{jax.device_count()} {jax.devices()[0].platform} devices"
        display.say(f"{config.study.name}: {len(tried) + len(ours)} runs on {devices}, in {workdir}")
        make = functools.partial(
            run.run_study, display=display, stop=stop, after_run=rewrite_report, retry_failed=flags.retry_failed
        )
        try:
            tuning_summary = make(runs.units_of(tried, config.study.vmap))
            if tried:
                ours = planned(tuning.tuned(cells, trials))
            summary = make(runs.units_of(ours, config.study.vmap))
        except Stopped as stopped:
            rewrite_report(now=True)
            display.say(f"stopped and saved at {stopped}; run the same command again to go on")
            return STOPPED
        if first:
            runs.note_look(workdir)
        display.say(f"compiled: {counts}, for {tuning_summary.new + summary.new} new runs")
        rewrite_report(now=True)
        display.say(f"{summary.done} of {len(ours)} runs done, {summary.failed} failed; open {workdir / 'report.html'}")
    return 1 if summary.failed else 0


if __name__ == "__main__":
    command.run(main)
