"""A study on prepared shards, through real processes: killed, its shards moved, and one of them lost."""

import shutil
import signal

import commands
import pytest

import lab.data
from lab import command

pytestmark = pytest.mark.slow


@pytest.mark.long
def test_a_killed_study_goes_on_where_its_shards_were_moved(tmp_path):
    corpus = commands.write_corpus(tmp_path / "corpus.jsonl")
    study = commands.write_study(tmp_path / "tiny.py", corpus, commands.ONE_CELL)
    out, work = tmp_path / "texts", tmp_path / "work"
    made = commands.finished("prepare", f"--config={study}", f"--out={out}", "--workers=2", log=tmp_path / "prepare")
    assert made.err == "" and "1,500 documents" in made.out
    words = f"--config={study}", "--config.data.corpus=prepared", f"--workdir={work}"
    with commands.started("main", *words, f"--config.data.path={out}", log=tmp_path / "killed") as process:
        assert process.until(lambda: commands.steps_logged(work) > commands.STEPS // 2)
        process.signal(signal.SIGKILL)
        process.wait()
    moved = shutil.move(out, tmp_path / "moved")
    again = commands.finished("main", *words, f"--config.data.path={moved}", log=tmp_path / "again")
    (run,) = commands.runs(work).values()
    assert "from step" in again.out
    config = command.load_config(str(study))
    config.data.draw, config.model.position.ratio = "1-3", 1.0
    expected = [info.text_hash for _, info in lab.data.train_batches(config, lab.data.open(config).train)]
    assert [row["text_hash"] for row in commands.metrics(run)] == expected
    lost = next((tmp_path / "moved").glob("train-*"))
    lost.unlink()
    refused = commands.finished("main", *words, f"--config.data.path={moved}", log=tmp_path / "refused", code=2)
    assert refused.err.startswith(f"lab: {lost} is missing (the command that made it makes it again: python -m lab.")
    assert refused.err.count("\n") == 1
