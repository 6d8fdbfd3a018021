"""How fast was decoded stands in the report beside what memory carries, and nowhere near results.csv."""

import studies
from test_verdicts import table

from lab import report
from lab.storage import read_json
from lab.study import evaluations

VALUES = {"variant": ["MHA", "MQA"]}
ASK = {"kind": "length", "chunk": 1, "rows": 64}


def asked(directory, **changed) -> str:
    """The report of a study that is asked `decode` too: seeds of MHA decode 100, 300 and 200 tokens a second, MQA twice
    that."""
    plan = read_json(directory / "plan.json")
    plan["asks"], plan["config"]["evaluate"] = {"loss": "eval_branch", "decode": "length"}, {"decode": ASK | changed}
    for place, cell in enumerate(plan["cells"], 1):
        cell["asks"] = studies.ASKED | {"decode": studies.ASKED["loss"]}
        for seed, speed in zip(cell["seeds"], (100.0, 300.0, 200.0), strict=True):
            found = evaluations.begun("decode", "length", studies.ASKED["loss"]) | {"complete": True}
            found["conditions"] = [{"length": 128, "loss": 2.0, "accuracy": 0.5, "tokens": 10}]
            found["timings"] = [{"length": 128, "seconds": 1.0, "tokens_per_second": place * speed, "peak_bytes": 1}]
            evaluations.save(directory / cell["directory"] / f"seed-{seed}", found)
    studies.write(directory / "plan.json", plan)
    report.rebuild(directory)
    return (directory / "report.md").read_text()


def moved(text: str) -> list[dict]:
    return table(text, "variant | cache bytes per token")


def test_decoded_tokens_stand_beside_bytes_and_intensities(tmp_path):
    studies.write_study(tmp_path, VALUES, lambda labels, count: 2.0, (1,), 3, sections=("curves",))
    report.rebuild(tmp_path)
    plain, results = (tmp_path / "report.md").read_text(), (tmp_path / "results.csv").read_bytes()
    rows = moved(asked(tmp_path))
    assert [row["decoded tokens/s, 64 rows"] for row in rows] == ["200", "400"]
    assert {row["cache bytes per token"] for row in rows} == {"1,536"} and rows[0]["of decoding 64"] == "7.0"
    assert (tmp_path / "results.csv").read_bytes() == results and "decoded tokens" not in plain


def test_what_reads_many_tokens_at_once_is_no_decoding(tmp_path):
    studies.write_study(tmp_path, VALUES, lambda labels, count: 2.0, (1,), 3, sections=("curves",))
    assert "decoded tokens/s" not in asked(tmp_path, chunk=512)
