"""The objects of a store below a URL, over fsspec, and one line for what a store refuses."""

import contextlib
import errno
import functools
import json
import os
import pathlib
import secrets
import socket
import time
from collections.abc import Callable, Iterator

from lab.errors import UserError

LIBRARIES = {"s3": "s3fs", "gs": "gcsfs"}  # of fsspec, by scheme
CREDENTIALS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS to a key file, or log in with gcloud",
}
TRIES = 6  # of a request, by the library that makes it; the pauses between them grow
ALL_RIGHTS = "list, read, write and delete"
PATIENCE, PAUSE = 300.0, 5.0  # seconds for which a store that does not answer is waited for, and between tries


class Unreached(UserError):
    """A store that answers nothing, or what may pass."""

    exit_code = 1


class Lease:
    """An object that is renewed for as long as it is held. directory: what it is a lease of; "" of an announcement."""

    def __init__(self, name: str, directory: str = ""):
        self.name, self.directory = name, directory
        self.token, self.renewed = secrets.token_hex(8), time.monotonic()

    def content(self) -> bytes:
        holder = f"{socket.gethostname()} process {os.getpid()}"
        return json.dumps({"holder": holder, "time": time.time(), "token": self.token}).encode()

    def is_of(self, content: bytes | None) -> bool:
        try:
            return content is not None and json.loads(content)["token"] == self.token
        except (ValueError, KeyError, TypeError):
            return False


class Store:
    """Objects below a URL, by their names relative to it. Raises UserError for a URL of no store, and where nothing is
    installed that speaks to it."""

    def __init__(self, url: str, files=None):
        self.scheme, _, place = url.partition("://")
        self._root = place.strip("/")
        self.url = f"{self.scheme}://{self._root}"
        self.bucket = self._root.partition("/")[0]
        if files is None and self.scheme not in LIBRARIES:
            raise UserError(f"{url} is of no known store; choose s3://BUCKET/DIR, gs://BUCKET/DIR, or a directory")
        if not self.bucket:
            raise UserError(f"{url} names no bucket; choose {self.scheme}://BUCKET/DIR")
        try:
            self._files = files or _files(self.scheme)
        except ImportError as error:
            needed = LIBRARIES[self.scheme]
            raise UserError(f"{url} needs {needed}: pip install -r requirements-storage.txt") from error

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def list(self, under: str = "") -> dict[str, tuple]:
        """{name: (bytes, what changes with the content)} of all objects below a name."""
        self._files.invalidate_cache()
        found = self._files.find(self._path(under), detail=True)
        start = len(self._files._strip_protocol(self._root)) + 1
        return {path[start:]: _mark(about) for path, about in found.items() if len(path) > start}

    def top(self) -> set[str]:
        """The first parts of the names of all objects."""
        self._files.invalidate_cache()
        try:
            return {path.rstrip("/").rpartition("/")[2] for path in self._files.ls(self._root, detail=False)}
        except FileNotFoundError:
            return set()

    def get(self, name: str, path: pathlib.Path) -> None:
        """Into a file that appears whole."""
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{secrets.token_hex(8)}")
        try:
            self._files.get_file(self._path(name), str(draft))
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)

    def put(self, path: pathlib.Path, name: str) -> tuple:
        """Returns what `list` has of it."""
        self._files.put_file(str(path), self._path(name))
        self._files.invalidate_cache()
        return _mark(self._files.info(self._path(name)))

    def read(self, name: str) -> bytes | None:
        try:
            return self._files.cat_file(self._path(name))
        except FileNotFoundError:
            return None

    def write(self, name: str, content: bytes) -> None:
        self._files.pipe_file(self._path(name), content)

    def create(self, name: str, lease: Lease) -> bool:
        """Whether it is there now by this lease: a try may succeed though its answer is lost, and the next one is then
        refused."""
        try:
            self._files.pipe_file(self._path(name), lease.content(), mode="create")
            return True
        except OSError:
            content = self.read(name)
            if content is None:
                raise
            return lease.is_of(content)

    def delete(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._files.rm_file(self._path(name))  # its rm() takes brackets of a name for a pattern

    def modified(self, name: str) -> float | None:
        """Seconds since 1970 by the store's clock; None where there is no such object."""
        self._files.invalidate_cache()
        try:
            return self._files.modified(self._path(name)).timestamp()
        except FileNotFoundError:
            return None


def _mark(about: dict) -> tuple:
    return about["size"], about.get("ETag") or about.get("etag") or str(about.get("created"))


@functools.cache
def _files(scheme: str):
    """The file system of fsspec that speaks to a store."""
    import fsspec

    options = dict(use_listings_cache=False, skip_instance_cache=True)
    if scheme == "s3":
        options["config_kwargs"] = dict(retries=dict(mode="standard", max_attempts=TRIES), connect_timeout=10)
    made = fsspec.filesystem(scheme, **options)
    made.retries = 2 if scheme == "s3" else TRIES  # s3fs tries again what botocore has tried
    return made


def patient(store: Store, action: Callable, tell: Callable[[Exception], None], rights: str = ALL_RIGHTS):
    """What an action gives. A store that does not answer is asked again, which is told; Unreached after PATIENCE."""
    until = time.monotonic() + PATIENCE
    while True:
        try:
            with reached(store, rights):
                return action()
        except Unreached as error:
            if time.monotonic() > until:
                raise
            tell(error)
            time.sleep(PAUSE)


@contextlib.contextmanager
def reached(store: Store, rights: str = ALL_RIGHTS) -> Iterator[None]:
    """One line for what a store refuses, or does not answer. rights: what is to be done there."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # each library has kinds of its own
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):  # of this machine
            raise
        kind, said = type(error).__name__, " ".join(str(error).split())[:200]
        if "Credential" in kind or "Anonymous caller" in said:
            raise UserError(f"{store.url}: there are no credentials; {CREDENTIALS[store.scheme]}") from error
        if isinstance(error, FileNotFoundError):
            raise UserError(
                f"{store.url}: there is no bucket {store.bucket!r}; create it, or choose another"
            ) from error
        if isinstance(error, PermissionError):
            raise UserError(
                f"{store.url}: the bucket {store.bucket!r} is not ours to use ({said}); choose another, or credentials "
                f"that may {rights} there"
            ) from error
        raise Unreached(
            f"{store.url} cannot be reached ({kind}: {said}); what is there stays; run the same command again"
        ) from error
