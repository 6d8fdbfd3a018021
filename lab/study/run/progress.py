"""What a running study shows: a live display on a terminal, a line now and then elsewhere."""

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

SILENCE = 10.0  # seconds between lines where there is no terminal


class Display:
    """Cells done, and of the current one: step, loss, tokens per second; and the time left for the study."""

    def __init__(self, runs: int, quiet: bool = False):
        self.console = Console(quiet=quiet, soft_wrap=True, highlight=False, markup=False, emoji=False)
        self._live = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}", markup=False),
            TimeElapsedColumn(),
            console=self.console,
            disable=quiet or not self.console.is_terminal,
            refresh_per_second=4,
        )
        self._runs = runs
        self._study = self._live.add_task("runs", total=runs, status="")
        self._run = self._live.add_task("", total=None, status="", visible=False)
        self._done, self._seconds, self._name = 0, [], ""
        self._began = self._last_line = time.monotonic()

    def __enter__(self) -> "Display":
        self._live.start()
        return self

    def __exit__(self, *error) -> None:
        self._live.stop()

    def say(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text)

    def start_run(self, name: str, step: int, steps: int) -> None:
        """A run begins, or goes on, at `step` of `steps`."""
        self._name, self._began, self._first_step, self._steps = name, time.monotonic(), step, steps
        self._live.reset(self._run, total=steps, completed=step, description=name, status="", visible=True)
        self._line(f"{name}: from step {step}" if step else f"{name}: begins", always=True)

    def start_asking(self, name: str) -> None:
        """A run that is trained is asked something."""
        self._name, self._began = name, time.monotonic()
        self._live.reset(self._run, total=None, description=name, status="", visible=True)

    def step(self, step: int, loss: float, tokens_per_second: float) -> None:
        status = f"loss {loss:.3f}  {tokens_per_second:,.0f} tokens/s"
        left = self._left((step + 1 - self._first_step) / max(self._steps - self._first_step, 1))
        self._live.update(self._run, completed=step + 1, status=status)
        self._live.update(self._study, status=f"{left} left")
        self._line(
            f"{self._name}: step {step + 1}/{self._steps}  {status}  runs {self._done}/{self._runs}  {left} left"
        )

    def condition(self, label: str, value, loss: float) -> None:
        self._live.update(self._run, status=f"{label} {value}: loss {loss:.3f}")
        self._line(f"{self._name}: {label} {value}  loss {loss:.3f}")

    def finish_run(self, name: str, text: str, fresh: bool = True) -> None:
        """Counts a run as done; `fresh`: its time tells how long the others take."""
        self._done += 1
        if fresh:
            self._seconds.append(time.monotonic() - self._began)
        self._live.update(self._study, completed=self._done, status=f"{self._left(0.0)} left")
        self._live.update(self._run, visible=False)
        self._line(f"[{self._done}/{self._runs}] {name}: {text}", always=True)

    def skip_runs(self, count: int) -> None:
        """Counts runs that were finished before."""
        self._done += count
        self._live.update(self._study, completed=self._done)

    def _left(self, share: float) -> str:
        """Time left, from the mean of finished runs, or from the share of the current one that is done."""
        spent = time.monotonic() - self._began
        if self._seconds:
            each = sum(self._seconds) / len(self._seconds)
            seconds = each * (self._runs - self._done) - (spent if share else 0)
        elif share:
            seconds = spent / share * (self._runs - self._done) - spent
        else:
            return "?"
        minutes, seconds = divmod(max(int(seconds), 0), 60)
        return f"{minutes}:{seconds:02d}"

    def _line(self, text: str, always: bool = False) -> None:
        """Terminals have the live display; elsewhere a line when it matters, or after a silence."""
        if always or (not self.console.is_terminal and time.monotonic() - self._last_line > SILENCE):
            self._last_line = time.monotonic()
            self.console.print(text)
