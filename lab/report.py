"""What a study found: python -m lab.report runs/rope_ablation rebuilds its tables, figures and pages."""

import argparse
import sys
from pathlib import Path

from lab.errors import UserError
from lab.study import results


def rebuild(directory: str | Path) -> list[Path]:
    """Writes results.csv, timings.csv, figures/, report.md and report.html of a study, finished or not; returns the
    paths of the files a reader opens. Raises UserError where `directory` is not the directory of a study."""
    study = results.collect(directory)
    tables = results.write_csv(study)
    # Drawing is imported late: matplotlib takes longer to load than everything above takes to run.
    from lab.study import page, sections

    return tables + page.write(study.directory, study.plan["study"], sections.make(study))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lab.report", description=__doc__)
    parser.add_argument("directory", help="of a study, such as runs/rope_ablation")
    try:
        for path in rebuild(parser.parse_args(arguments).directory):
            print(path)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
