"""What long documents say: differences by document, with their verdicts, and the section that tells them."""

import itertools
import json

import numpy as np
import pytest
from studies import ASKED, write, write_study

from lab import report
from lab.study import evaluations, results
from lab.study.judge import claims, documents

L, LENGTHS, DOCUMENTS = 128, (128, 256, 512), 12
TRAINED = ["position.trained", L]
HYBRIDS = {"cf_1_5": 1.5, "cf_2": 2.0, "cf_4": 4.0}
METHODS = {
    "plain": [],
    "yarn": [TRAINED, ["position.scaling.name", "yarn"]],
    "twin": [TRAINED, ["position.scaling.name", "ntk"]],
    **{name: [TRAINED, ["position.map.name", "hybrid"], ["position.map.cf", cf]] for name, cf in HYBRIDS.items()},
    "both": [TRAINED, ["position.scaling.name", "yarn"], ["position.map.name", "hybrid"]],
}
# Nats that a method adds to the plain model's within L and beyond it, by length; the seed has the noise of documents.
EFFECTS = {
    "plain": lambda length: (0.0, 0.0),
    "yarn": lambda length: (0.05, -0.4),
    "twin": lambda length: (0.05, -0.4),  # of the same losses as yarn
    "cf_1_5": lambda length: (0.0, -0.1),
    "cf_2": lambda length: (0.0, -0.05 if length == 256 else -0.3),
    "cf_4": lambda length: (0.0, 0.2 if length == 256 else -0.5),
    "both": lambda length: (0.0, 0.0),
}


def lengths_of(name, seed, length):
    """(row, sums by document) as an ask keeps them: what is within L is the same in every longer text."""
    own = np.random.default_rng([seed, length <= L, *map(ord, name.replace("twin", "yarn"))])
    within, beyond = EFFECTS[name](length)
    edges = [0, *(edge for edge in LENGTHS if edge <= length)]
    tokens = [high - low - (high == length) for low, high in itertools.pairwise(edges)]
    moved = [within, *[beyond] * (len(tokens) - 1)]
    level = 2 + 0.3 * np.random.default_rng(0).normal(size=(DOCUMENTS, len(LENGTHS)))[:, : len(tokens)]
    jitter = 0.01 * own.normal(size=(DOCUMENTS, len(LENGTHS)))[:, : len(tokens)] * (np.array(moved) != 0)
    nats = (level + np.array(moved) + jitter) * tokens
    loss = nats.sum() / (DOCUMENTS * sum(tokens))
    kept = {"length": length, "edges": edges, "tokens": tokens, "nats": nats.tolist()}
    kept |= {"sliding": nats.sum(1).tolist(), "sliding_tokens": sum(tokens)}
    row = {"length": length, "loss": loss, "accuracy": 0.5, "tokens": DOCUMENTS * sum(tokens),
           "ppl": float(np.exp(loss)), "within": nats[:, 0].sum() / (DOCUMENTS * tokens[0]),
           "documents": DOCUMENTS, "read": DOCUMENTS * length,
           "beyond": nats[:, 1:].sum() / (DOCUMENTS * sum(tokens[1:])) if len(tokens) > 1 else None,
           "sliding": loss, "sliding_ppl": float(np.exp(loss)), "texts": f"text{length}"}  # fmt: skip
    row |= {f"nats_{low}_{high}": nats[:, i].sum() / (DOCUMENTS * tokens[i]) for i, (low, high) in
            enumerate(itertools.pairwise(edges))}  # fmt: skip
    return row, kept


def answers_of(name, length):
    exact = np.array([[int(name == "yarn" or i % 6 == 0) for i in range(DOCUMENTS)]])
    kept = {"length": length, "tasks": ["passkey"], "exact": exact.tolist(), "nats": [], "read": [], "tokens": []}
    row = {"length": length, "loss": 1.0, "accuracy": 0.5, "tokens": 40, "exact": exact.mean(), "documents": DOCUMENTS,
           "exact_passkey": exact.mean(), "texts": f"answers{length}"}  # fmt: skip
    return row, kept


def wanted_of(name):
    """Hybrids run a program of their own."""
    return ASKED["loss"] | {"parts": {"program": ["compressed" if name.startswith("cf") else "plain"]}}


def built(directory, change=lambda name, row, kept: None, seeds=1, timed=lambda name, times: None):
    """A study of one cell that was asked by every method."""
    write_study(
        directory, {"variant": ["only"]}, lambda labels, count: 2.0, (1,), sections=("lengths", "curves"), seeds=seeds
    )
    plan = json.loads((directory / "plan.json").read_text())
    long = {"kind": "length", "lengths": list(LENGTHS), "trained": L, "stride": 64, "bos": -1}
    asked = {name: long | {"model": fields} for name, fields in METHODS.items()}
    retrieval = {"kind": "retrieval", "lengths": [512], "tasks": ["passkey"]}
    asked |= {f"{name}_answers": retrieval | {"model": METHODS[name]} for name in ("plain", "yarn")}
    plan["config"]["evaluate"] = {"loss": {"kind": "branches"}} | asked
    plan["asks"] |= dict.fromkeys(asked, "length")
    plan["published"] = "configs/published/extrapolation_llama3.csv"
    (cell,) = plan["cells"]
    cell["asks"] = {"loss": ASKED["loss"]} | {name: wanted_of(name) for name in asked}
    write(directory / "plan.json", plan)
    for name, about in asked.items():
        for seed in range(seeds):
            make = (lambda n, _, length: answers_of(n, length)) if about["kind"] == "retrieval" else lengths_of
            found = [make(name.removesuffix("_answers"), seed, length) for length in about["lengths"]]
            for row, kept in found:
                change(name, row, kept)
            rows, kept = zip(*found, strict=True)
            evaluation = evaluations.begun(name, "length", wanted_of(name)) | {"complete": True, "documents": kept}
            slow = 1.0 + 0.01 * len(name) + 0.6 * name.startswith("cf")
            times = [{"length": row["length"], "seconds": slow, "tokens_per_second": 100, "peak_bytes": 2**20}
                     for row in rows]  # fmt: skip
            timed(name, times)
            place = directory / cell["directory"] / f"seed-{seed}"
            evaluations.save(place, evaluation | {"conditions": list(rows), "timings": times})
    return directory


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return results.collect(built(tmp_path_factory.mktemp("study")))


def table(text, column):
    """The rows of the first Markdown table that has this column."""
    lines = next(block.splitlines() for block in text.split("\n\n") if f"| {column} |" in block)
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line[:1] == "|"]
    return [dict(zip(header, row, strict=True)) for row in rows]


def one(study, name, length, part):
    (found,) = [p for p in documents.compare(study) if (p.arm[1], p.length, p.part) == (name, length, part)]
    return found


def test_methods_are_the_asks_of_lengths_the_plain_one_first(study):
    found = {method.name: method for method in documents.methods(study)}
    assert [*found] == [*METHODS] and found["yarn"].retrieval == "yarn_answers" and found["both"].retrieval is None
    assert {name: method.cf for name, method in found.items() if method.cf} == HYBRIDS
    assert documents.long_asks(study) == {*METHODS, "plain_answers", "yarn_answers"}


def test_differences_are_paired_by_document(study):
    """The documents differ by 0.3, the method by 0.4 with a noise of 0.01: only pairs can tell."""
    ours, theirs = (
        documents.by_document(study, study.plan["cells"][0]["name"], name, 512, "beyond")[1]
        for name in ("yarn", "plain")
    )
    found = one(study, "yarn", 512, "beyond")
    assert found.estimate.mean == pytest.approx((ours - theirs).mean()) == pytest.approx(-0.4, abs=0.02)
    low, high = found.estimate.bootstrap_interval
    assert low < -0.4 < high and high - low < 0.05
    assert found.verdict == "better" and one(study, "yarn", 512, "within").verdict == "worse"
    assert one(study, "cf_2", 512, "within").verdict == "same"
    assert one(study, "yarn", 512, "exact").verdict == "better"
    assert one(study, "cf_4", 256, "beyond").verdict == "worse"


def test_verdicts_are_corrected_over_all_tests_each_once(study):
    """Within L a longer text is the same text, one of L tokens is all within, and here every text is one window;
    and two methods are one."""
    found, distinct, tested = documents.compare(study), {}, []
    for p in found:
        part = "all" if p.part == "sliding" or (p.part == "within" and p.length <= L) else p.part
        at = (p.arm[1].replace("twin", "yarn"), part, None if part == "within" else p.length)
        if p.estimate.p is not None:
            assert p.estimate.p == pytest.approx(distinct.setdefault(at, p.estimate.p), rel=1e-6)
            tested.append((at, p.adjusted))
    ranked, largest = sorted(distinct, key=distinct.get), 0.0
    for rank, at in enumerate(ranked):
        largest = max(largest, min(1.0, (len(ranked) - rank) * distinct[at]))
        assert {round(p / largest, 4) for other, p in tested if other == at} == {1.0}
    assert len(distinct) < len(tested) / 1.5


def test_other_documents_are_not_compared(tmp_path):
    def other(name, row, kept):
        if name == "yarn":
            row["texts"] = "other"

    found = results.collect(built(tmp_path, other))
    assert one(found, "yarn", 512, "beyond").estimate.n == 0
    assert one(found, "yarn", 512, "beyond").verdict == "cannot tell"


def test_too_few_documents_give_a_mean_and_no_verdict(tmp_path):
    """Nine of twelve are left out; an interval over three would be none."""

    def three(name, row, kept):
        row["documents"] = 3
        for part in ("nats", "sliding"):
            if part in kept:
                kept[part] = kept[part][:3]
        if "exact" in kept:
            kept["exact"] = [kept["exact"][0][:3]]

    found = results.collect(built(tmp_path, three))
    few = one(found, "yarn", 512, "beyond")
    assert few.estimate.mean == pytest.approx(-0.4, abs=0.02) and few.verdict == "cannot tell (3 documents)"
    assert {p.verdict for p in documents.compare(found) if p.estimate.n} == {"cannot tell (3 documents)"}
    outcomes = {claim.claim: claim.outcome for claim in claims.claims(found, L, documents.compare(found))}
    assert {
        outcome for claim, outcome in outcomes.items() if claim not in ("no overhead", "cf 2 takes more memory")
    } == {"cannot tell"}
    report.rebuild(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "**Too few documents: 3.** Below 10 no interval" in text and "beyond L cannot tell (3 documents)" in text


@pytest.mark.parametrize(("tokens", "verdict"), [(512, "cannot tell"), (0, "better")])
def test_documents_tell_nothing_of_weights_that_were_trained_apart(tmp_path, tokens, verdict):
    """Of weights that a checkpoint brought they do."""
    found = results.collect(built(tmp_path))
    (run,) = found.runs
    run.result["tokens"] = tokens
    twin = found.plan["cells"][0] | {"name": "twin"}
    found.plan["cells"].append(twin)
    found.runs_by_cell["twin"] = [run]
    arms = ("twin", "yarn"), (run.cell["name"], "plain")
    (told,) = documents.corrected([documents.between(found, *arms, 512, "beyond")])
    assert told.estimate.mean == pytest.approx(-0.4, abs=0.02) and told.verdict.startswith(verdict)


def test_seeds_are_averaged_by_document(tmp_path):
    """Documents are the unit: two seeds make no more of them."""
    found = results.collect(built(tmp_path, seeds=2))
    assert one(found, "yarn", 512, "beyond").estimate.n == DOCUMENTS


def test_claims_are_judged_as_they_were_published(study):
    found = {claim.claim: claim for claim in claims.claims(study, L, documents.compare(study))}
    assert found["cf 2 is best"].outcome == "contradicted" and "512: better than 2: cf 4" in found["cf 2 is best"].told
    grows = found["the best cf grows with the stretch"]
    assert grows.outcome == "supported" and grows.told.endswith("256: 1.5, 512: 4")
    assert found["no harm within L"].outcome == "supported"
    overhead = found["no overhead"]
    assert overhead.outcome == "contradicted" and "of 3 hybrids over those of 4 asks of the plain" in overhead.told
    modest = found["within a modest stretch the plain model is better"]
    assert modest.outcome == "contradicted" and modest.told == "256 tokens: better than it: cf_1_5, cf_2"
    memory = found["cf 2 takes more memory"]
    assert memory.outcome == "contradicted" and "+0.0%; up to cf 4" in memory.told


def test_overhead_and_memory_are_those_of_the_longest_documents(tmp_path):
    """Not of other lengths. Timings that vary more than by the overhead judge nothing."""
    for spread, outcome in ((0.001, "supported"), (0.4, "cannot tell")):

        def timed(name, times, spread=spread):
            for each in times:
                if name.endswith("answers") or each["length"] < 512:
                    each["seconds"] = 7.0
                else:
                    each["seconds"] = 1 + 0.01 * (name in HYBRIDS) + spread * (len(name) % 3)
                    each["peak_bytes"] *= 1 + (name == "cf_2")

        found = results.collect(built(tmp_path / outcome, timed=timed))
        told = {claim.claim: claim for claim in claims.claims(found, L, documents.compare(found))}
        assert told["no overhead"].outcome == outcome, told["no overhead"].told
        assert told["cf 2 takes more memory"].outcome == "supported"


def test_the_section_has_short_texts_and_retrieval_beside_the_gain(tmp_path):
    directory = built(tmp_path)
    report.rebuild(directory)
    text = (directory / "report.md").read_text()
    assert "**cf_4 has the lowest loss at 512 tokens**" in text.split("## Lengths")[0]
    section = text.split("\n## Lengths")[1].split("\n## ")[0]
    at = {row["method"]: row for row in table(section, "exact answers")}
    assert at["yarn"]["within L: less plain"].startswith("+0.04") and "[" in at["yarn"]["within L: less plain"]
    assert (at["yarn"]["exact answers"], at["plain"]["exact answers"], at["both"]["exact answers"]) == (
        "100.0%",
        "16.7%",
        "—",
    )
    assert at["yarn"]["documents"] == str(DOCUMENTS) and at["yarn"]["tokens"] == f"{DOCUMENTS * 512:,}"
    rebuilt = {row["tokens"]: row for row in table(section, "N / L")}
    assert rebuilt["512"]["best cf"] == "4" and rebuilt["512"]["published cf 1.5 PPL"] == "12.88"
    assert rebuilt["512"]["published cf 1.5 improves by"] == "+8.3%" and rebuilt["256"]["cf 2 improves by"].startswith(
        "+"
    )
    assert "| no harm within L | supported |" in section
    assert (directory / "figures" / "loss_by_position.png").exists()
    assert "\n## yarn" not in text, "asks that the section tells have none of their own"
    header, first, *_ = (directory / "results" / "yarn.csv").read_text().splitlines()
    assert header.split(",")[:7] == ["variant", "seed", "length", "loss", "accuracy", "tokens", "ppl"]
    assert {"within", "beyond", "nats_0_128", "sliding_ppl"} <= {*header.split(",")} and first.startswith("only,0,128,")


def test_what_is_done_is_told_before_the_plain_model_is(tmp_path):
    directory = built(tmp_path)
    for path in directory.glob("cells/*/seed-0/evaluations/plain-*.json"):
        path.unlink()
    report.rebuild(directory)
    section = (directory / "report.md").read_text().split("\n## Lengths")[1].split("\n## ")[0]
    assert "| only | yarn |" in section and "| only | plain |" not in section
