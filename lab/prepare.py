"""Tokenises a corpus into shards, on all cores, and writes a manifest of them.

    python -m lab.prepare --config=configs/rope_ablation.py:gpu --out=runs/texts
    python -m lab.main --config=configs/rope_ablation.py:gpu --config.data.corpus=prepared --config.data.path=runs/texts

The corpus, the tokenizer and how documents are cut are those of config.data. A command that was stopped goes on where
it was; one that is run again looks every shard over, and makes again what is damaged. What is made does not depend on
--workers. --out and config.data.path may be in an object store: s3://BUCKET/DIR, gs://BUCKET/DIR.
"""

import shlex
import signal
import sys
import time

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from lab import command, runtime
from lab.errors import UserError

SILENCE = 10.0  # seconds between lines where there is no terminal


class PreparedTexts:
    """Documents and tokens so far: a live line on a terminal, a line now and then elsewhere."""

    def __init__(self, name: str):
        self.console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
        self._live = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            TimeElapsedColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._name, self._task = name, self._live.add_task(f"{name}: reading the corpus", total=None)
        self._documents = self._tokens = self._shards = self._kept = self._fresh = 0
        self._begun = self._last_line = time.monotonic()

    def __enter__(self) -> "PreparedTexts":
        self._live.start()
        return self

    def __exit__(self, *error) -> None:
        self._live.stop()

    def made(self, told: dict, kept: bool) -> None:
        """A run of documents is in its shards; kept: it was there before."""
        shards = [told[split] for split in ("train", "validation") if split in told]
        self._documents += told["documents"]
        self._shards += len(shards)
        tokens = sum(shard["tokens"] for shard in shards)
        self._tokens, self._kept = self._tokens + tokens, self._kept + len(shards) * kept
        self._fresh += tokens * (not kept)
        now = time.monotonic()
        line = f"{self._name}: {self._shards} shards{f' ({self._kept} were there)' * bool(self._kept)}, " + (
            f"{self._documents:,} documents, {self._tokens:,} tokens, {self._fresh / (now - self._begun):,.0f} tokens/s"
        )
        self._live.update(self._task, description=line)
        if not self.console.is_terminal and now - self._last_line > SILENCE:
            self._last_line = now
            self.console.print(line)


def main(argv: list[str]) -> None:
    parser = command.parser(__doc__, "lab.prepare")
    parser.add_argument(
        "--out", required=True, help="a directory here or in an object store: a new one, or one to go on with"
    )
    parser.add_argument(
        "--workers", type=int, default=runtime.cores(), help="processes (%(default)s: one for each core)"
    )
    flags, config, _ = command.parse(parser, argv)
    if flags.workers < 1:
        raise UserError(f"--workers = {flags.workers} is too few; choose at least 1")
    begun = time.monotonic()

    from lab.data import preparation

    fields = [argument for argument in argv if argument.startswith("--config.")]
    ours = ["python", "-m", "lab.prepare", f"--config={flags.config}", *fields, f"--out={flags.out}"]
    with PreparedTexts(flags.out) as display:
        display.console.print(f"{flags.out}: reading {config.data.corpus} {config.data.path}".rstrip())
        made = preparation.prepare(config, flags.out, flags.workers, shlex.join(ours), display.made)
        train, validation = (
            f"{made[s]['texts']:,} {s} texts of {made[s]['tokens']:,} tokens" for s in preparation.SPLITS
        )
        display.console.print(
            f"{flags.out}: {made['documents']:,} documents of {made['bytes']:,} bytes in {len(made['shards'])} runs; "
            f"{train}, {validation}; {time.monotonic() - begun:.0f} s; "
            f"--config.data.corpus=prepared --config.data.path={flags.out} reads them"
        )


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # workers end too
    command.run(main)
