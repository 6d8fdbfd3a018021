"""Several hosts hold the same config, data and code, or the first that does not is named, with what is other."""

import types

import numpy as np
import pytest

from lab.errors import UserError
from lab.study.run import runs
from lab.study.run.runs import check_hosts_agree


def a_run(rate=1.0, data="d", program="p"):
    config = types.SimpleNamespace(to_json_best_effort=lambda: f'{{"rate": {rate}}}')
    of = types.SimpleNamespace(fingerprint=data, validation_fingerprint="v")
    return types.SimpleNamespace(
        name="r seed 0", place="cells/x", identity=(program,), data=of, cell=types.SimpleNamespace(config=config)
    )


def of_hosts(monkeypatch, *hosts):
    """What each of the hosts (its run, its name, a digest of its code) sends to the others."""
    sent = []
    monkeypatch.setattr(runs.jax, "process_count", lambda: len(hosts))
    monkeypatch.setattr(
        runs.multihost_utils, "process_allgather", lambda ours: sent.append(ours) or np.stack([ours] * len(hosts))
    )
    for run, name, code in hosts:
        monkeypatch.setattr(runs.socket, "gethostname", lambda name=name: name)
        monkeypatch.setattr(runs, "_code", lambda code=code: code)
        check_hosts_agree([run])
    return np.stack(sent)


@pytest.mark.parametrize(
    ("other", "part"),
    [
        ((a_run(rate=2.0), "c", "1"), "config"),
        ((a_run(data="e"), "c", "1"), "data"),
        ((a_run(program="q"), "c", "1"), "code"),
        ((a_run(), "c", "2"), "code"),
        ((a_run(), "c", "1"), None),
    ],
)
def test_the_host_that_differs_is_named(monkeypatch, other, part):
    sent = of_hosts(monkeypatch, (a_run(), "a", "1"), (a_run(), "b", "1"), other)
    monkeypatch.setattr(runs.multihost_utils, "process_allgather", lambda ours: sent)
    if part is None:
        check_hosts_agree([a_run()])
        return
    with pytest.raises(UserError, match=f"process 2 on host c has other {part} than process 0 on a; give all hosts"):
        check_hosts_agree([a_run()])


def test_a_digest_of_the_code_follows_it(monkeypatch, tmp_path):
    monkeypatch.setattr(runs.lab, "__file__", str(tmp_path / "__init__.py"))
    digests = []
    for name, text in (("a.py", "x = 1"), ("a.py", "x = 2"), ("b.py", ""), ("b.txt", "")):
        (tmp_path / name).write_text(text)
        digests.append(runs._code())
    assert len({*digests[:3]}) == 3 and digests[3] == digests[2]
