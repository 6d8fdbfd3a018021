"""A study whose cells have different tokenizers is judged, drawn and told in bits per byte; any other in nats."""

import csv
import dataclasses
import json
import math
import types

import pytest
from studies import change_evaluation, without_plotly, write, write_study

import lab.config
from lab import report
from lab.data import Data
from lab.errors import UserError
from lab.study import measure, results
from lab.study.define import plan
from lab.study.define.cells import vary, zipped
from lab.study.define.resolve import resolve
from lab.study.judge import evidence, pairing, trends
from lab.study.report import headline
from lab.study.run import runs

VALUES = {"variant": ["bytes", "bpe:512"]}
STUDY = {"baseline": (("variant", "bytes"),)}
TOKENS, TEXTS, SIZE = {"bytes": 1000, "bpe:512": 500}, 48, 1000
PER_TOKEN = {"bytes": 2.0, "bpe:512": 3.4}  # nats: for each byte, the larger vocabulary costs less


def loss(labels, count):
    return PER_TOKEN[labels["variant"]]


def noise(labels, seed):
    return 0.01 * seed + 0.002 * seed**2 * (labels["variant"] == "bytes")


def bits(loss, labels):
    return loss * TOKENS[labels["variant"]] / SIZE / math.log(2)


def made(directory, **options):
    """A study of bytes and a BPE, as the command leaves it."""
    options = dict(loss=loss, noise=noise, counts=(1,), seeds=3, study=STUDY, sections=("curves",)) | options
    write_study(directory, VALUES, **options)
    kept = json.loads((directory / "plan.json").read_text())
    for cell in kept["cells"]:
        cell["fields"] = {"data.tokenizer": cell["labels"]["variant"], "data.text_bytes": 62}
        cell["reads"] = {"texts": TEXTS, "size": SIZE}
        for seed in cell["seeds"]:

            def count(rows, labels=cell["labels"]):
                for row in rows:
                    row |= {"tokens": TOKENS[labels["variant"]], "bytes": SIZE}
                    row["bits_per_byte"] = bits(row["loss"], labels)

            change_evaluation(directory / cell["directory"] / f"seed-{seed}", count)
    write(directory / "plan.json", kept | {"measure": "bits_per_byte"})
    return directory


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = made(tmp_path_factory.mktemp("study"))
    report.rebuild(directory)
    return directory


def rows(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def test_the_verdict_is_of_bits_whatever_the_losses_say(finished):
    (row,) = rows(finished / "comparisons.csv")
    wanted = [
        bits(3.4 + noise({"variant": "bpe:512"}, seed), {"variant": "bpe:512"})
        - bits(2.0 + noise({"variant": "bytes"}, seed), {"variant": "bytes"})
        for seed in range(3)
    ]
    assert float(row["difference"]) == pytest.approx(sum(wanted) / 3) and row["verdict"] == "better"
    text = (finished / "report.md").read_text()
    assert f"variant bpe:512 is better than variant bytes** by {-sum(wanted) / 3:.4f} bits per byte, 95%" in text
    assert "tokenizers differ" in text and "| variant | bits per byte | verdict |" in text


def test_every_word_of_the_report_is_of_bits(finished):
    pages = [(finished / "report.md").read_text(), without_plotly((finished / "report.html").read_text())]
    pages += [path.read_text() for path in finished.glob("cells/*/index.html")]
    assert len(pages) == 4 and all("nats" not in page for page in pages)
    assert all("bits per byte" in page for page in pages)
    assert "training loss (bits per byte)" in pages[1] and "difference of loss (bits per byte)" in pages[1]
    assert "perplexity" not in pages[0]


def test_tables_keep_the_losses_and_have_the_bits_beside_them(finished):
    plain, beside = rows(finished / "results.csv"), rows(finished / "results" / "bits_per_byte.csv")
    assert list(plain[0]) == ["variant", "seed", "eval_branch", "loss", "ppl", "tokens", "parameters"]
    assert list(beside[0]) == ["variant", "seed", "eval_branch", "bits_per_byte", "tokens", "bytes"]
    for ours, theirs in zip(plain, beside, strict=True):
        assert float(theirs["bits_per_byte"]) == pytest.approx(bits(float(ours["loss"]), ours))
        assert theirs["bytes"] == str(SIZE)


def test_training_losses_are_bits_of_the_bytes_that_a_step_reads(finished):
    study = results.collect(finished)
    line = study.runs[0].metrics[3]
    assert line["bits_per_byte"] == pytest.approx(line["loss"] * (line["tokens"] - TEXTS) / (SIZE * math.log(2)))
    findings = evidence.find(study)
    (one,) = findings.comparisons
    found = trends.trend(findings, one)
    assert found.measure is measure.BITS
    own, other = (findings.scores[name][0].run.metrics[0]["bits_per_byte"] for name in (one.name, one.against))
    assert found.values[0, 0] == pytest.approx(own - other)


def test_a_study_of_one_tokenizer_is_told_in_nats_though_its_rows_have_bits(tmp_path):
    told = []
    for name in ("without", "with"):
        directory = made(tmp_path / name)
        kept = json.loads((directory / "plan.json").read_text())
        del kept["measure"]
        for cell in kept["cells"]:
            del cell["reads"]
            cell["fields"]["data.tokenizer"] = "bytes"
            for seed in cell["seeds"] if name == "without" else ():
                change_evaluation(directory / cell["directory"] / f"seed-{seed}", forget_bytes)
        write(directory / "plan.json", kept)
        study = results.collect(directory)
        findings = evidence.find(study)
        tables = [
            *results.write_csv(study)[:1],
            evidence.write_csv(directory / "comparisons.csv", findings.comparisons),
        ]
        told.append([headline.answer(study, findings), headline.certainty(study, findings)])
        told[-1] += [path.read_text() for path in tables]
        assert "bits_per_byte" not in study.curves and not (directory / "results").exists()
    assert told[0] == told[1] and all("nats per token" in text for text in told[0][:2])
    assert "variant bpe:512 is worse than variant bytes by 1.39" in told[0][0]


def forget_bytes(rows):
    for row in rows:
        del row["bits_per_byte"], row["bytes"]


def test_losses_per_token_of_two_tokenizers_are_never_paired(finished):
    study = results.collect(finished)
    ours, theirs = (runs[0] for runs in pairing.scores(study, ()).values())
    assert pairing.mismatch(ours, theirs) == ""
    nats = [dataclasses.replace(score, measure=measure.NATS) for score in (ours, theirs)]
    assert pairing.mismatch(*nats) == "data.tokenizer: bytes and bpe:512, and losses are per token"
    assert pairing.mismatch(ours, nats[1]) == "judged in bits per byte and nats per token"


def cells(text_bytes, sizes=(300, 320)):
    config = lab.config.base()
    config.study.update(name="made", labels=(("data.tokenizer", "tokenizer"),))
    config.study.cells = zipped(
        vary("data.tokenizer", [f"bpe:{size}" for size in sizes]), vary("model.vocabulary", sizes),
        vary("data.text_bytes", text_bytes),
    )  # fmt: skip
    config.data.update(long_texts="refuse")
    return config, resolve(config)


@pytest.mark.parametrize("text_bytes", [(0, 0), (0, 64), (64, 32)])
def test_cells_of_different_tokenizers_must_have_their_texts_cut_by_the_same_bytes(text_bytes):
    with pytest.raises(
        UserError, match=r"the study varies data\.tokenizer \(bpe:300, bpe:320\) with data\.text_bytes = "
    ):
        plan.table(*cells(text_bytes))


def test_what_a_study_is_judged_in_follows_from_its_tokenizers():
    made, found = cells((64, 64))
    every = plan.table(made, found)
    assert measure.of_cells(every) is measure.BITS and measure.of_cells(every[:1]) is measure.NATS
    assert measure.of_cells([{}, *every[:1]]) is measure.NATS  # a probe has no tokenizer


def test_the_plan_keeps_what_is_judged_in_and_what_a_step_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(runs.asked, "wanted", lambda config, data: {})
    made, found = cells((64, 64))
    every = plan.table(made, found)
    data = Data(types.SimpleNamespace(mean_bytes=60.5), None, None, "", "")
    planned = [
        runs.Run(cell, 0, {"cell": cell.name}, data, tmp_path / "cells" / cell.name / "seed-0") for cell in found
    ]
    for count, expected in ((2, measure.BITS), (1, measure.NATS)):
        runs.write_plan(tmp_path / str(count), made, every[:count], planned[:count], [], "the command")
        kept = json.loads((tmp_path / str(count) / "plan.json").read_text())
        assert measure.of_plan(kept) is expected and ("measure" in kept) == (count == 2)
        reads = {"texts": made.data.rows, "size": made.data.rows * 60.5}
        assert [cell.get("reads") for cell in kept["cells"]] == ([reads] * 2 if count == 2 else [None])


def test_bits_per_byte_of_a_planted_loss():
    """Ten tokens of three bits each, over fifteen bytes; bytes that are all alike cost log2 of their number."""
    assert measure.bits_per_byte(10 * 3 * math.log(2), 15) == pytest.approx(2.0)
    assert measure.bits_per_byte(77 * math.log(256), 77) == pytest.approx(8.0)
