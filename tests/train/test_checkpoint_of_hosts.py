"""Checkpoints that several hosts set aside: two in threads, one of them as far ahead of the other as it may be."""

import concurrent.futures
import math
import os
import threading

import pytest

from lab.train import checkpoint


class Hosts:
    """Two that wait for each other where they ask each other. `mine.number` is the thread's own, 0 or 1."""

    def __init__(self):
        self.mine, self._asked, self._changed = threading.local(), [0, 0], threading.Condition()

    def asks(self, of_mine: bool) -> bool:
        own = self.mine.number
        with self._changed:
            self._asked[own] += 1
            self._until(lambda: self._asked[1 - own] >= self._asked[own])
        return of_mine

    def let_the_other_go_ahead(self) -> None:
        """As far as it goes without this one."""
        own = self.mine.number
        with self._changed:
            self._until(lambda: self._asked[1 - own] > self._asked[own])

    def end(self) -> None:
        with self._changed:
            self._asked[self.mine.number] = math.inf
            self._changed.notify_all()

    def _until(self, happened) -> None:
        self._changed.notify_all()
        assert self._changed.wait_for(happened, timeout=60)


@pytest.mark.parametrize("slow", [0, 1], ids=["who moves is slow", "who looks is slow"])
def test_no_host_looks_while_a_checkpoint_is_moved(tmp_path, monkeypatch, slow):
    hosts, directory, rename = Hosts(), tmp_path / "checkpoints", os.rename
    for step in (1, 2, 3, 4):
        (directory / str(step)).mkdir(parents=True)

    class Manager:
        """As Orbax has it: which steps there are is known from the last look, and a look opens what it finds."""

        def __init__(self, *_, **__):
            self.reload()

        def all_steps(self):
            return self._steps

        def reload(self):
            self._steps = [int(path.name) for path in directory.iterdir()]
            if slow == hosts.mine.number == 1:
                hosts.let_the_other_go_ahead()
            assert all((directory / str(step)).is_dir() for step in self._steps), "it went while this host looked"

    def moved(source, target):
        if slow == 0:
            hosts.let_the_other_go_ahead()
        rename(source, target)

    def host(number: int) -> list[int]:
        hosts.mine.number = number
        try:
            checkpoints = checkpoint.Checkpoints(directory, keep=9)
            hosts.asks(False)  # both are there
            checkpoints.take_back(1, "a reason")
            return checkpoints.steps()
        finally:
            hosts.end()

    monkeypatch.setattr(checkpoint, "_any_host", hosts.asks)
    monkeypatch.setattr(checkpoint, "_Manager", Manager)
    monkeypatch.setattr(checkpoint.jax, "process_index", lambda: hosts.mine.number)
    monkeypatch.setattr(checkpoint.os, "rename", moved)
    with concurrent.futures.ThreadPoolExecutor(2) as both:
        assert list(both.map(host, (0, 1))) == [[1], [1]]
    assert {path.name for path in (tmp_path / checkpoint.SET_ASIDE).iterdir()} == {"2-1", "3-1", "4-1"}
