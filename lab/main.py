"""Runs a study: trains every cell, evaluates each under every condition, and reports after each of them.

    python -m lab.main --config=configs/rope_ablation.py

Finished cells are never run again; an interrupted study goes on where it was. Exit codes: 0 all cells done; 1 some
cell failed, or the disk is full; 2 a mistake in what was asked, nothing was run; 75 stopped by SIGTERM or Ctrl-C with
everything saved: run the same command again.
"""

from lab import runtime

runtime.tune_allocator()  # before anything imports JAX

import logging  # noqa: E402
import pathlib  # noqa: E402
import shlex  # noqa: E402

from lab import command  # noqa: E402

STOPPED = 75  # EX_TEMPFAIL: schedulers requeue it


def main(argv: list[str]) -> int:
    parser = command.parser(__doc__)
    parser.add_argument("--workdir", type=pathlib.Path, help="where the study's files go (default: runs/<study>)")
    parser.add_argument("--retry-failed", action="store_true", help="run cells again that failed before")
    flags, config, overridden = command.parse(parser, argv)
    runtime.start(config)

    import jax

    from lab import report
    from lab.study import cells as study_cells
    from lab.study import plan, run
    from lab.study.progress import Display
    from lab.train.loop import Stopped

    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax tells every save
    counts = runtime.CompileCounts()
    cells = study_cells.resolve(config, overridden)
    rows = plan.table(config, cells)
    workdir = flags.workdir or pathlib.Path("runs") / config.study.name
    runs = run.runs_of(cells, config.study.seeds, workdir)
    run.check_hosts_agree(runs)
    first = jax.process_index() == 0
    if first:
        run.write_plan(workdir, config, rows, runs, shlex.join(["python", "-m", "lab.main", *argv]))
    stop = runtime.stop_requests()

    def rewrite_report() -> None:
        if first:
            report.rebuild(workdir)

    with Display(len(runs), quiet=not first) as display:
        devices = f"{jax.device_count()} {jax.devices()[0].platform} devices"
        display.say(f"{config.study.name}: {len(runs)} runs on {devices}, in {workdir}")
        try:
            summary = run.run_study(
                runs, display=display, stop=stop, after_run=rewrite_report, retry_failed=flags.retry_failed
            )
        except Stopped as stopped:
            display.say(f"stopped and saved at {stopped}; run the same command again to go on")
            return STOPPED
        compiled = ", ".join(
            f"{name} {counts.counts[name]} ({counts.seconds[name]:.1f} s)" for name in ("train_step", "evaluation_step")
        )
        display.say(f"compiled: {compiled}, for {summary.new} new runs")
        rewrite_report()
        display.say(f"{summary.done} of {len(runs)} runs done, {summary.failed} failed; open {workdir / 'report.html'}")
    return 1 if summary.failed else 0


if __name__ == "__main__":
    command.run(main)
