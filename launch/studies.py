#!/usr/bin/env python
"""Runs the lab's own studies at :cpu, and writes what they found to docs/studies, a page for each.

    python launch/studies.py                             # all of them; stopped, the same command goes on
    python launch/studies.py rope_ablation:cpu           # some
    python launch/studies.py --pages                     # runs nothing: the pages of what is there, or of some

A study runs in runs/studies/<name>. docs/studies/README.md has a line for each, also for those that were not run. What
was written by hand about a study, docs/studies/notes/<name>.md, is part of its page.
"""

import argparse
import pathlib
import re
import shutil
import subprocess
import sys
from collections.abc import Collection

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from lab.errors import UserError, choose
from lab.study import results

STUDIES = (
    "rope_ablation:cpu", "branch_decoding:cpu", "head_dim_ablation:cpu", "attention_ablation:cpu",
    "attention_ablation:cpu-factorial",
    "attention_ablation:cpu-rotate", "muon_ablation:cpu", "probes:cpu", "residual_ablation:cpu-confirm",
    "residual_ablation:cpu-v1", "residual_ablation:cpu-v2", "residual_ablation:cpu-v3", "residual_ablation:cpu-v4",
    "residual_ablation:cpu-beyond", "residual_ablation:cpu-sanity", "attention_ablation:cpu-flops",
    "attention_ablation:cpu-beyond", "attention_ablation:cpu-beyond-flops", "stability_ablation:cpu",
    "width_transfer:cpu", "optimizer_ablation:cpu", "vocabulary_ablation:cpu", "scaling_ladder:cpu",
    "architecture_ablation:cpu", "architecture_ablation:cpu-activation", "architecture_ablation:cpu-gated",
    "architecture_ablation:cpu-block", "architecture_ablation:cpu-position", "architecture_ablation:cpu-stability",
    "architecture_ablation:cpu-heads", "architecture_ablation:cpu-masks", "architecture_ablation:cpu-named",
    "hyperparameter_ablation:cpu", "hyperparameter_ablation:cpu-heads", "hyperparameter_ablation:cpu-aspect",
    "hyperparameter_ablation:cpu-regularisation", "hyperparameter_ablation:cpu-repeated",
    "hyperparameter_ablation:cpu-batch", "hyperparameter_ablation:cpu-recall", "length_extrapolation:cpu",
    "finetune_rope:cpu",
    "branch_positions:cpu", "branch_positions:cpu-drawn",
    "branch_finetune:cpu", "branch_finetune:cpu-untuned",
    "branch_tasks:cpu",
)  # fmt: skip
FLAGS = {  # of a study that is asked more than its config says
    "rope_ablation:cpu": (
        "--config.study.calibrate=4",
        "--config.study.calibrate_cell=rope_ratio=1.0,train_branch=1-15",
    ),
}
CELLS_OF = {"branch_decoding:cpu": "rope_ablation:cpu"}  # of a study that asks the cells of another
UPON = {  # of a study that goes on from the first cell of another, which is run before it
    "finetune_rope:cpu": "architecture_ablation:cpu",
    "branch_finetune:cpu": "branch_finetune:cpu-base",
    "branch_finetune:cpu-untuned": "branch_finetune:cpu-base",
}
ROOT = pathlib.Path(__file__).resolve().parents[1]
RUNS, PAGES = ROOT / "runs" / "studies", ROOT / "docs" / "studies"
HEADER = """\
# What the lab's own studies found

Each at `:cpu`, on two cores and Python's own sources: small models, so that an effect here is a hint at what a larger
one may show. `make studies` runs what is not done, and writes these pages. Tokens/s were measured while the machine did
other work, too: what options cost alone is in [options.md](../options.md). What each method of a residual stream does
and costs: [streams.md](streams.md).

| study | question | answer |
|:--|:--|:--|
"""


def directory(study: str) -> str:
    """Of runs and pages: rope_ablation-cpu."""
    return study.replace(":", "-")


def run(study: str) -> int:
    """The exit code of the study's command, which goes on where it was."""
    name, _, scale = study.partition(":")
    flags = f"--config=configs/{name}.py:{scale}", f"--workdir={RUNS / directory(study)}", *FLAGS.get(study, ())
    if study in UPON:
        if code := run(UPON[study]):
            return code
        base = RUNS / directory(UPON[study])
        flags += (f"--config.checkpoint={base / results.collect(base).plan['cells'][0]['directory']}",)
    print(f"== {study}", flush=True)
    share_cells(study)
    return subprocess.run([sys.executable, "-m", "lab.main", *flags], cwd=ROOT).returncode


def share_cells(study: str) -> None:
    """Lets a study find the cells of another, where these are, so that it trains none of them."""
    there, here = (RUNS / directory(name) / "cells" for name in (CELLS_OF.get(study, study), study))
    if any(there.glob("*/identity.json")) and not here.exists():
        here.parent.mkdir(parents=True, exist_ok=True)
        here.symlink_to(there, target_is_directory=True)


def write_page(study: str, before: str | None) -> str:
    """Writes the page of a study that was begun, with its figures; returns its line of the index.

    A page whose runs are not on this machine stays as it is, and so does its line, `before`.
    """
    from lab import report
    from lab.study.judge import documents, evidence
    from lab.study.report import headline, lengths

    work, name = RUNS / directory(study), directory(study)
    by_hand = PAGES / "notes" / f"{name}.md"
    notes = f"\n## Notes\n\n{by_hand.read_text()}" if by_hand.exists() else ""
    if not (work / "plan.json").exists():
        if before and "| | not run" not in before:
            return before
        not_run = f"not run: `python launch/studies.py {study}`"
        if not notes:
            return f"| `{study}` | | {not_run} |"
        (PAGES / f"{name}.md").write_text(f"# {study}\n\nThis version was {not_run}. Of an earlier one:\n{notes}")
        return f"| [{study}]({name}.md) | | {not_run}; notes on an earlier version |"
    report.rebuild(work)
    found = results.collect(work)
    figures = PAGES / "figures" / name
    shutil.rmtree(figures, ignore_errors=True)
    page = re.sub(r"\[([^\]]+)\]\(cells/[^)]*\)", r"\1", (work / "report.md").read_text())  # pages that stay behind
    for figure in dict.fromkeys(re.findall(r"\]\(figures/([^)]+)\)", page)):
        figures.mkdir(parents=True, exist_ok=True)
        shutil.copy(work / "figures" / figure, figures / figure)
    page = page.replace("](figures/", f"](figures/{name}/").replace(f"{ROOT}/", "")
    (PAGES / f"{name}.md").write_text(page + notes)
    answer = headline.answer(found, evidence.find(found))
    if len(found.plan["cells"]) == 1 and documents.methods(found):  # what is compared are the methods of its asks
        answer = " ".join([piece.text for piece in lengths.answer(found)] or [answer])
    answer = answer.replace("|", r"\|")
    return f"| [{study}]({name}.md) | {found.plan['question']} | {answer} {headline.progress(found)} |"


def write_pages(studies: Collection[str]) -> None:
    """The pages of these, and their lines of the index."""
    PAGES.mkdir(parents=True, exist_ok=True)
    index = PAGES / "README.md"
    text = index.read_text() if index.exists() else ""
    before = {study: line for line in text.splitlines() for study in re.findall(r"^\| (?:\[|`)([\w:-]+)[\]`]", line)}
    stays = {study: line for study, line in before.items() if study not in studies}
    lines = [stays.get(study) or write_page(study, before.get(study)) for study in STUDIES]
    index.write_text(HEADER + "\n".join(lines) + "\n")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="*", help=f"of: {', '.join(STUDIES)} (default: all)")
    parser.add_argument("--pages", action="store_true", help="run nothing, write the pages of what is there")
    flags = parser.parse_args(arguments)
    try:
        for study in flags.studies:
            choose("a study", study, STUDIES)
        if flags.pages:
            write_pages(flags.studies or STUDIES)
            return 0
        for study in flags.studies or STUDIES:
            code = run(study)
            write_pages([study])
            if code not in (0, 1):  # 1: some of its runs failed, and its page says which
                return code
    except UserError as error:
        print(f"studies: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
