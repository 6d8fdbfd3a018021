"""What a study found, or several side by side.

python -m lab.report runs/rope_ablation             # rebuilds its tables, figures and pages
python -m lab.report s3://bucket/rope_ablation         # the same in an object store
python -m lab.report runs/a runs/b [--output DIR]   # writes comparison.md and comparison.html, here or to DIR
"""

from pathlib import Path

from lab import command, storage
from lab.errors import UserError
from lab.study import results


def rebuild(directory: str | Path) -> list[Path]:
    """Writes results.csv, timings.csv, mixing.csv and comparisons.csv where there is what they hold, figures/,
    report.md, report.html, a page for each cell and the TensorBoard events of figures and groups of a study, finished
    or not; returns the paths of the files a reader opens. Raises UserError where `directory` is not that of a study."""
    study = results.collect(directory)
    written = results.write_csv(study)
    # Drawing is imported late: matplotlib and scipy take longer to load than everything above takes to run.
    from lab.study.judge import evidence
    from lab.study.report import cell_page, page, sections, tensorboard

    findings = evidence.find(study)
    if findings:
        written.append(evidence.write_csv(study.directory / "comparisons.csv", findings.comparisons))
    parts = sections.make(study, findings)
    tensorboard.write_figures(
        study, [block for part in parts for block in part.blocks if isinstance(block, page.Chart)]
    )
    tensorboard.write_groups(study)
    written += page.write(study.directory, study.plan["study"], parts)
    cell_page.write(study, findings)
    return written


def compare(directories: list[str], output: str | Path) -> list[Path]:
    """Writes the pages of a comparison of studies into the directory `output`; returns their paths."""
    studies = [results.collect(directory) for directory in directories]
    from lab.study.report import compare, page

    return page.write(Path(output), compare.TITLE, compare.sections(studies), name="comparison")


def main(arguments: list[str] | None = None) -> None:
    parser = command.Parser(prog="python -m lab.report", description=__doc__)
    parser.add_argument("directories", nargs="+", help="of studies, such as runs/rope_ablation")
    parser.add_argument("--output", help="where the pages of a comparison go (default: here)")
    flags = parser.parse_args(arguments)
    directories = [str(storage.opened(directory)) for directory in flags.directories]
    if len(flags.directories) == 1 and flags.output:
        raise UserError(f"--output={flags.output} needs several studies: the report of one goes to its directory")
    several = len(flags.directories) > 1
    paths = compare(directories, flags.output or ".") if several else rebuild(directories[0])
    if not several:
        storage.flush(Path(directories[0]))
    for path in paths:
        print(storage.told(path))


if __name__ == "__main__":
    command.run(main)
