"""Processes that take turns: a peer answers requests, each a line of JSON, and a benchmark asks several of them."""

import contextlib
import ctypes
import json
import os
import pathlib
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping


class Peer:
    """A process of its own. `begin` asks it, `end` gives what it answers; `ask` does both."""

    def __init__(self, command: list[str], environment: Mapping[str, str] = os.environ):
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._process = subprocess.Popen(command, env=environment, **pipes)

    def begin(self, do: str, **request) -> None:
        with contextlib.suppress(BrokenPipeError):  # `end` tells of it
            self._process.stdin.write(json.dumps({"do": do} | request) + "\n")
            self._process.stdin.flush()

    def end(self):
        """Raises RuntimeError with the last line of what went wrong there."""
        answer = json.loads(self._process.stdout.readline() or '{"error": "its process ended"}')
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["found"]

    def ask(self, do: str, **request):
        self.begin(do, **request)
        return self.end()

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def answer(of: Mapping[str, Callable]) -> None:
    """Calls the function that each request names, until there are no more. What they print is no answer."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            found = {"found": of[request.pop("do")](**request)}
        except Exception as error:
            traceback.print_exc()
            said = (str(error).strip().splitlines() or [""])[-1][:200]
            found = {"error": f"{type(error).__name__}: {said}"}
        print(json.dumps(found), file=out, flush=True)


def forget_peak() -> None:
    """Gives memory that is free back to the system, and counts the peak of this process from here (Linux)."""
    with contextlib.suppress(OSError, AttributeError):  # elsewhere the peak is that since the process began
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        pathlib.Path("/proc/self/clear_refs").write_text("5")


def peak() -> int | None:
    """The most bytes that were resident since; None where the system does not tell."""
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    return None
