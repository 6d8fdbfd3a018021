"""Processes of the lab that are forked from one which has imported everything: starting Python is most of what a tiny
study costs.

A launcher is given `Server.python` as its interpreter: what it starts with `-m lab.main ...` stands for a forked
process, takes SIGTERM for it, ends as it ends, and takes it along.
"""

import contextlib
import importlib
import json
import os
import pathlib
import select
import signal
import socket
import subprocess
import sys

HOOK = "FORKED_HOOK"  # in the environment: a module whose `before()` is called in the forked process


class Server:
    """The process that all are forked from; `python` is the interpreter of its processes."""

    def __init__(self, place: pathlib.Path, environment: dict[str, str]):
        door, here = place / "door", pathlib.Path(__file__)
        self.python = place / "python"
        self.python.write_text(f'#!/bin/sh\nexec {sys.executable} -SE {here} --stand {door} "$@"\n')
        self.python.chmod(0o755)
        self._serving = subprocess.Popen(
            [sys.executable, here, "--serve", door], env=environment | dict(PYTHONPATH=str(here.parents[1])),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._serving.stdout.readline() == "ready\n"

    def close(self) -> None:
        self._serving.communicate()


def become(asked: dict) -> None:
    """This process, which was forked, becomes the one that was asked for."""
    from lab import command, main

    os.environ.clear()
    os.environ.update(asked["environment"])
    os.chdir(asked["directory"])
    sys.argv = ["lab.main", *asked["arguments"]]
    if HOOK in os.environ:
        importlib.import_module(os.environ[HOOK]).before()
    command.run(main.main)


def serve(place: str) -> None:
    """Forks a process for each that connects. It ends with its standard input."""
    from jax._src import xla_bridge

    from lab.study.run import events, study  # noqa: F401

    assert not xla_bridge._backends, "devices are opened in forked processes alone"
    with contextlib.suppress(OSError):
        os.unlink(place)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(place)
    listening.listen()
    print("ready", flush=True)
    while listening in select.select([listening, sys.stdin], [], [])[0]:
        connection, _ = listening.accept()
        if os.fork():
            connection.close()
            continue
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        text, files, _, _ = socket.recv_fds(connection, 2**20, 2)
        child = os.fork()
        if not child:
            for file, number in zip(files, (1, 2), strict=True):
                os.dup2(file, number)
            for each in (listening, connection):
                each.close()
            become(json.loads(text))
            return
        connection.sendall(f"{child}\n".encode())
        ended = 0
        while not ended:
            if select.select([connection], [], [], 0.05)[0]:  # who stands for it is gone
                os.kill(child, signal.SIGKILL)
                os._exit(0)
            ended, status = os.waitpid(child, os.WNOHANG)
        connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
        os._exit(0)


def stand(place: str, arguments: list[str]) -> None:
    """Stands for a forked process: passes SIGTERM on, and ends as it ends."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(place)
    asked = dict(environment=dict(os.environ), directory=os.getcwd(), arguments=arguments)
    socket.send_fds(connection, [json.dumps(asked).encode()], [1, 2])
    lines = connection.makefile()
    child = int(lines.readline())

    def forward(*_) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(child, signal.SIGTERM)

    signal.signal(signal.SIGTERM, forward)
    code = int(lines.readline())
    if code < 0:
        os.kill(os.getpid(), signal.SIGKILL if code == -9 else -code)
    os._exit(code)


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        serve(sys.argv[2])
    else:
        stand(sys.argv[2], sys.argv[5:])  # behind -m lab.main
