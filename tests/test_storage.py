"""Where what is made once is kept."""

import pathlib

import commands
import pytest

from lab.errors import UserError
from lab.storage import cache_directory, opened


@pytest.mark.parametrize(
    ("set_to", "place"),
    [(None, "~/.cache/lab"), ("", "~/.cache/lab"), ("~/x", "~/x"), ("/y/z", "/y/z"), ("here", "here")],
)
def test_an_empty_place_of_the_cache_is_none(monkeypatch, set_to, place):
    monkeypatch.delenv("LAB_CACHE")
    if set_to is not None:
        monkeypatch.setenv("LAB_CACHE", set_to)
    assert cache_directory() == pathlib.Path(place).expanduser()


def test_a_cache_without_a_home_is_one_clear_line(monkeypatch):
    def homeless(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("LAB_CACHE")
    monkeypatch.setattr(pathlib.Path, "expanduser", homeless)
    with pytest.raises(UserError, match=r"home directory.*set LAB_CACHE"):
        cache_directory()


def test_one_function_reads_the_place_of_the_cache():
    readers = [
        path for path in (commands.REPOSITORY / "lab").rglob("*.py") if 'environ.get("LAB_CACHE' in path.read_text()
    ]
    assert [path.name for path in readers] == ["storage.py"]


def test_a_home_is_found_where_no_shell_has_put_it(monkeypatch, tmp_path):
    """As behind --workdir=."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert opened("~/runs/x") == tmp_path / "runs" / "x" and opened("runs/~") == pathlib.Path("runs/~")
    with pytest.raises(UserError, match="~nobody-here/x has no place"):
        opened("~nobody-here/x")
