"""Opens a Hugging Face checkpoint, or writes one.

    python -m lab.convert from-hf DIR_OR_NAME OUT    # OUT is opened by lab.load, like the directory of a cell
    python -m lab.convert to-hf CKPT OUT             # of a cell, a seed, a checkpoint; OUT is opened by transformers
    python -m lab.convert to-peft RUN OUT            # of a run that trained adapters; OUT is opened by peft

Llama 2, 3 and 3.1, Qwen2.5, Qwen3, Mistral, Gemma 2 and the text of Gemma 3. Weights are streamed, so that a model may
be larger than memory; OUT appears whole or not at all.
"""

import signal
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from lab import command

SILENCE = 10.0  # seconds between lines where there is no terminal


class WrittenBytes:
    """Bytes written, of how many: a live bar on a terminal, a line now and then elsewhere."""

    def __init__(self, name: str):
        self.console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
        columns = BarColumn(bar_width=24), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
        self._live = Progress(
            TextColumn("{task.description}", markup=False),
            *columns,
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._name, self._task = name, self._live.add_task(name, total=None)
        self._written, self._total, self._last_line = 0, 0, time.monotonic()

    def __enter__(self) -> "WrittenBytes":
        self._live.start()
        return self

    def __exit__(self, *error) -> None:
        self._live.stop()

    def begin(self, total: int) -> None:
        """So many bytes are to be written."""
        self._total = total
        self._live.update(self._task, total=total)

    def wrote(self, size: int) -> None:
        self._written += size
        self._live.update(self._task, advance=size)
        if not self.console.is_terminal and time.monotonic() - self._last_line > SILENCE:
            self._last_line = time.monotonic()
            self.console.print(f"{self._name}: {self._written / 1e6:,.0f} of {self._total / 1e6:,.0f} MB")


def main(argv: list[str]) -> None:
    parser = command.Parser(prog="python -m lab.convert", description=__doc__)
    ways = parser.add_subparsers(dest="way", required=True)
    read = ways.add_parser("from-hf", help="a Hugging Face model, to be opened by lab.load")
    read.add_argument("source", metavar="DIR_OR_NAME", help="a directory, or a name on the hub")
    write = ways.add_parser("to-hf", help="a checkpoint of the lab, to be opened by transformers")
    write.add_argument("source", metavar="CKPT", type=Path, help="of a cell, one of its seeds, or one checkpoint")
    adapters = ways.add_parser("to-peft", help="the adapters of a run of the lab, to be opened by peft upon its base")
    adapters.add_argument("source", metavar="RUN", type=Path, help="of a run with model.lora.rank above 0")
    for way in (read, write, adapters):
        way.add_argument("out", metavar="OUT", type=Path, help="a directory that is not there yet")
    flags = parser.parse_args(argv)
    convert(flags.way, flags.source, flags.out)


def convert(way: str, source: str | Path, out: Path) -> None:
    """Does what the command says. Raises UserError."""
    import jax

    jax.config.update("jax_platforms", "cpu")  # nothing is computed

    from lab.exchange import exporting, importing, peft
    from lab.model import parameter

    with WrittenBytes(f"{way} {source}") as display:
        if way == "from-hf":
            config = importing.from_hf(importing.locate(str(source)), out, display.begin, display.wrote)
            from lab import model as lab_model

            count = f"{parameter.count(lab_model.abstract(config.model)):,} parameters"
            display.console.print(f'{out}: {count}; lab.load("{out}") opens it')
        elif way == "to-peft":
            made = peft.to_peft(source, out)
            display.console.print(f"{out}: rank {made['r']}, of {', '.join(made['target_modules'])}")
        else:
            made = exporting.to_hf(source, out, display.begin, display.wrote, display.console.print)
            display.console.print(f"{out}: model_type {made['model_type']}, {made['torch_dtype']}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # drafts are removed on the way out
    command.run(main)
