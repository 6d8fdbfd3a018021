"""What a run tells: metrics.jsonl, TensorBoard and the display while it trains, mixing.csv at its end."""

import json
import time
from collections.abc import Mapping

from lab.storage import sealed, write_atomically
from lab.study import results
from lab.study.judge import spikes
from lab.study.report.layout import panel_rows
from lab.study.run import weights as learned
from lab.study.run.progress import Display
from lab.study.run.runs import Run, Unit
from lab.train.workload import Record


class Meter:
    """Feeds the display: of a stack, its first member's loss and the throughput of all."""

    def __init__(self, display: Display, unit: Unit, every: int):
        self._display, self._every = display, every
        self._name = unit[0].name + (f" and {len(unit) - 1} more, vmapped" if len(unit) > 1 else "")
        self._steps = unit[0].cell.config.train.steps
        self._tokens, self._since = 0, time.perf_counter()

    def start(self, step: int) -> None:
        self._display.start_run(self._name, step, self._steps)
        self._since = time.perf_counter()

    def step(self, records: list[Record]) -> float | None:
        """Tokens per second since the last time it was told; None in between."""
        self._tokens += sum(record.tokens for record in records)
        if (records[0].step + 1) % self._every:
            return None
        now = time.perf_counter()
        rate, self._since, self._tokens = self._tokens / (now - self._since), now, 0
        self._display.step(records[0].step, records[0].loss, rate)
        return rate


class Log:
    """What a run writes beside its result: metrics.jsonl, TensorBoard, and at its end mixing.csv."""

    def __init__(self, run: Run, writes: bool):
        self._run, self._writes = run, writes
        self._path = run.directory / "metrics.jsonl"
        self._file = self._board = None
        self._counts = "spikes" in run.cell.config.run.log.instruments
        self._losses, self._spikes = [], 0

    def start(self, step: int) -> None:
        """Steps that are made again are logged again: what an earlier attempt logged from here on goes."""
        if self._writes:
            from lab.study.run import events  # slow to import, and only one host needs it

            self._begin(step)
            self._board = events.Writer(self._run.directory / "tensorboard")
            config, baseline = (cell and cell.described() for cell in (self._run.cell, self._run.baseline))
            self._board.text("config", events.describe(config, baseline))

    def _begin(self, step: int) -> None:
        kept = [line for line in results.metrics(self._run.directory) if line["step"] < step]
        write_atomically(self._path, "".join(json.dumps(sealed(line)) + "\n" for line in kept).encode())
        if self._counts:
            self._losses = [line["loss"] for line in kept]
            self._spikes = len(spikes.spikes(self._losses))
        self._file = self._path.open("a", buffering=1)  # a checkpoint must never outlive the lines before it

    def step(self, record: Record, rate: float | None) -> None:
        if not self._writes:
            return
        line = self._line(record)
        self._file.write(json.dumps(sealed(line)) + "\n")
        shown = {} if rate is None else {
            "train/loss_nats": record.loss, "train/grad_norm": record.grad_norm,
            "train/learning_rate": record.learning_rate, "train/fill_share": record.fill,
            "train/tile_share": record.tiles,
            "train/tokens_per_second": rate,
        }  # fmt: skip
        shown |= _curves(line.get("instruments", {}))
        if shown:
            self._board.scalars(record.step, shown)

    def _line(self, record: Record) -> dict:
        """Of metrics.jsonl: without instruments where they were not due, with the spikes so far if they are asked."""
        if self._counts:
            self._spikes += spikes.is_spike(record.loss, self._losses)
            self._losses.append(record.loss)
        line = record._asdict()
        if record.instruments is None:
            del line["instruments"]
        elif self._counts:
            line["instruments"] = record.instruments | {"spikes": self._spikes}
        return line

    def weights(self, step: int, weights: learned.Weights) -> None:
        """The weights that layers have learned for each other by now: a curve for each."""
        if self._writes and weights:
            self._board.scalars(step, learned.scalars(weights))

    def finish(self, weights: learned.Weights) -> None:
        """The weights that it has learned for layers."""
        if weights:
            from lab.study.report import figures  # which loads matplotlib

            write_atomically(self._run.directory / "mixing.csv", learned.table(weights))
            image = figures.png(figures.weight_maps(panel_rows(weights)))
            self._board.image("mixing", image, "Weight of what layer i gave (column) in layer m (row)")

    def close(self) -> None:
        if self._writes and self._file:
            self._file.close()
            self._board.close()


def _curves(instruments: Mapping[str, float | list | None]) -> dict[str, float]:
    """What was measured as curves of TensorBoard: a panel for each name, or for each name and layer."""
    found = {}
    for name, value in instruments.items():
        layers = value if isinstance(value, list) else []
        found |= {f"{name}/layer {m}": number for m, number in enumerate(layers)} or {f"instruments/{name}": value}
    return {name: number for name, number in found.items() if number is not None}


def compare(run: Run, column: str, conditions: list[dict]) -> None:
    """The run among the others, in the HPARAMS tab: what it was asked, after its last step. Trials and repeats stay
    out: the tab takes the mean over runs of the same labels and seed."""
    if run.note:
        return
    from lab.study.run import events

    metrics = {
        f"eval/{name}_{column}_{row[column]}": row[field]
        for name, field in (("loss_nats", "loss"), ("accuracy_share", "accuracy"))
        for row in conditions
    }
    board = events.Writer(run.directory / "tensorboard")
    board.hparams(run.cell.labels | {"seed": run.seed}, metrics, run.cell.config.train.steps)
    board.close()
