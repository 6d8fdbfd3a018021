"""A model of the hub by its name: from a server of these tests that speaks as much of its protocol as is needed."""

import hashlib
import http.server
import json
import pathlib
import re
import threading

import commands
import jax
import numpy as np
import pytest

import lab

pytestmark = pytest.mark.slow
PLACE = pathlib.Path(__file__).parent / "reference_checkpoints" / "llama3"
REVISION = "a" * 40


class Hub(http.server.ThreadingHTTPServer):
    """Has one model, some/model; and of what it does not need to be read, weights for torch. given: files, as asked."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.files = {file.name: file.read_bytes() for file in PLACE.iterdir()} | {"pytorch_model.bin": b"pickled"}
        self.given: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answer(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path, files = self.path.partition("?")[0], self.server.files
        if path == "/api/models/some/model/revision/main":
            self.send(json.dumps({"id": "some/model", "sha": REVISION, "siblings": []}).encode())
        elif path == f"/api/models/some/model/tree/{REVISION}":
            listed = [dict(type="file", path=name, size=len(data), oid=tagged(data)) for name, data in files.items()]
            self.send(json.dumps(listed).encode())
        elif (found := re.fullmatch(f"/some/model/resolve/{REVISION}/(.+)", path)) and found[1] in files:
            if self.command == "GET":
                self.server.given.append(found[1])
            self.send(files[found[1]])
        else:
            self.send(b"{}", 404)

    do_HEAD = do_GET

    def send(self, data: bytes, status: int = 200) -> None:
        self.send_response(status)
        headers = {"Content-Length": len(data), "ETag": f'"{tagged(data)}"', "X-Repo-Commit": REVISION}
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *_) -> None:
        pass


def tagged(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def hub():
    with Hub() as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield served
        served.shutdown()


def converted(name, out: pathlib.Path, hub: Hub, tmp_path: pathlib.Path, code: int = 0) -> str:
    """What the command says."""
    environment = dict(HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "home"), HF_HUB_DISABLE_TELEMETRY="1")
    done = commands.finished("convert", "from-hf", name, out, log=tmp_path / "log", code=code, **environment)
    return done.told()


def weights(out: pathlib.Path) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(lab.load(out)[0])]


def test_a_name_is_read_from_the_hub_once_and_from_its_cache_then(hub, tmp_path):
    outs = [tmp_path / name for name in ("local", "named", "cached")]
    converted(PLACE, outs[0], hub, tmp_path)
    assert not hub.given
    converted("some/model", outs[1], hub, tmp_path)
    read = sorted(hub.given)
    assert "config.json" in read and sum(name.endswith(".safetensors") for name in read) == 3
    assert "pytorch_model.bin" not in read and len(read) == len({*read})
    hub.shutdown()
    hub.server_close()  # nobody is there any more
    converted("some/model", outs[2], hub, tmp_path)
    local, *others = map(weights, outs)
    for other in others:
        jax.tree.map(np.testing.assert_array_equal, other, local)


def test_what_the_hub_lacks_is_said_in_one_line(hub, tmp_path):
    lost = "model-00002-of-00003.safetensors"
    del hub.files[lost]
    out = tmp_path / "out"
    for name, says in (("some/model", lost), ("other/model", "other/model is no directory, and the hub does not")):
        told = converted(name, out, hub, tmp_path, code=2)
        assert told.count("lab: ") == 1 and says in told and "Traceback" not in told
        assert not out.exists()
