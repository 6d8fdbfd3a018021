"""A directory in an object store whose files do not change once they are whole: each is known by its digest, and
fetched once for a machine."""

import concurrent.futures
import contextlib
import errno
import logging
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import filelock

from lab.errors import UserError
from lab.remote.store import Store, patient, reached

AT_ONCE = 8  # files under way
SILENCE = 10.0  # seconds between lines that tell how far it is
RIGHTS = "list and read"


class Wanted(NamedTuple):
    """A file of a store by its name there, and where it is to lie here."""

    name: str
    path: pathlib.Path
    size: int  # bytes
    digest: str


class Directory:
    """Reads a directory in a store, and writes there. digest: of a file here. Raises UserError where the bucket is not
    there or not ours, and where a store does not answer: `sizes` at once, the others after a while."""

    def __init__(self, url: str, digest: Callable[[pathlib.Path], str], rights: str = RIGHTS):
        self._store, self._digest, self._rights, self._said = Store(url), digest, rights, False
        self.url = self._store.url

    def sizes(self) -> dict[str, int]:
        """{name: bytes} of all that is there."""
        with reached(self._store, self._rights):
            return {name: mark[0] for name, mark in self._store.list().items()}

    def read(self, name: str) -> bytes:
        if (content := self._patient(lambda: self._store.read(name))) is None:
            raise UserError(f"{self.url}/{name} is missing")
        return content

    def get(self, name: str, path: pathlib.Path) -> None:
        """Raises FileNotFoundError too."""
        if not self._patient(lambda: self._got(name, path)):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), f"{self.url}/{name}")

    def put(self, path: pathlib.Path, name: str) -> None:
        self._patient(lambda: self._store.put(path, name))

    def delete(self, name: str) -> None:
        self._patient(lambda: self._store.delete(name))

    def _patient(self, action: Callable):
        return patient(self._store, action, self._say_once, self._rights)

    def _got(self, name: str, path: pathlib.Path) -> bool:
        try:
            self._store.get(name, path)
            return True
        except FileNotFoundError:
            return False

    def fetch(self, wanted: Mapping[str, tuple[pathlib.Path, int, str]], mend: str) -> None:
        """Returns when all are here and whole. wanted: {name: (where it is to lie, bytes, digest)}. What lies there is
        looked over, and fetched again if it is damaged; another process that fetches the same is waited for. mend: how
        what is missing or damaged in the store is made again."""
        files, begun = [Wanted(name, *told) for name, told in wanted.items()], time.monotonic()
        pool = concurrent.futures.ThreadPoolExecutor(AT_ONCE)
        try:
            waiting = {pool.submit(self._keep, one, mend) for one in files}
            while waiting:
                done, waiting = concurrent.futures.wait(waiting, SILENCE, concurrent.futures.FIRST_EXCEPTION)
                for one in done:
                    one.result()
                if waiting:
                    self._tell(files, time.monotonic() - begun)
        finally:
            pool.shutdown(cancel_futures=True)

    def _keep(self, one: Wanted, mend: str) -> None:
        one.path.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(one.path.with_name(f".{one.path.name}.lock")):
            if self._is_whole(one.path, one):
                return
            if one.path.exists():
                logging.warning("the cache's %s is damaged: it is fetched again", one.path)
            drafts = _drafts(one)
            for _ in range(2):  # what came otherwise than it was sent is asked for once more
                shutil.rmtree(drafts, ignore_errors=True)  # of a process that was killed, too
                drafts.mkdir()
                try:
                    self.get(one.name, drafts / "whole")
                except FileNotFoundError as error:
                    raise UserError(f"{self.url}/{one.name} is missing ({mend})") from error
                if self._is_whole(drafts / "whole", one):
                    os.replace(drafts / "whole", one.path)
                    drafts.rmdir()
                    return
            shutil.rmtree(drafts, ignore_errors=True)
        raise UserError(f"{self.url}/{one.name} is damaged: it is not what was prepared ({mend})")

    def _is_whole(self, path: pathlib.Path, one: Wanted) -> bool:
        return path.is_file() and path.stat().st_size == one.size and self._digest(path) == one.digest

    def _say_once(self, error: Exception) -> None:
        if not self._said:
            said = " ".join(str(error.__cause__).split())[:200]
            logging.warning("%s is not reached (%s); it is tried again", self.url, said)
        self._said = True

    def _tell(self, files: list[Wanted], seconds: float) -> None:
        here, total = sum(map(_bytes_here, files)), sum(one.size for one in files)
        told = "fetching %d files from %s: %.2f of %.2f GiB in %.0f s"
        logging.warning(told, len(files), self.url, here / 2**30, total / 2**30, seconds)


def _bytes_here(one: Wanted) -> int:
    """As far as it has come."""
    with contextlib.suppress(OSError):  # of what moves meanwhile
        return one.path.stat().st_size if one.path.exists() else sum(x.stat().st_size for x in _drafts(one).iterdir())
    return 0


def _drafts(one: Wanted) -> pathlib.Path:
    return one.path.with_name(f".{one.path.name}")
