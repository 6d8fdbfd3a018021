"""The scales of the study of lengths that are of named models, rehearsed on tiny models of these families."""

import commands
import pytest
import rehearsed

from lab.command import load_config
from lab.errors import UserError
from lab.evaluate import asks
from lab.exchange import importing
from lab.study.define import start
from lab.study.open import open

CONFIG = commands.REPOSITORY / "configs" / "length_extrapolation.py"
# The scale, the checkpoint of tests/exchange, its L, and what else it is changed to.
FAMILIES = {
    "llama3/32": ("llama3", 256, {}),
    "qwen25/32": ("qwen2.5", 1024, {}),
    "mistral/32": ("mistral", 1024, {}),
    "gemma2/32": ("gemma2", 256, dict(sliding_window=96)),
}
KEPT = ("loss", "plain", "hybrid_cf1_5", "hybrid_cf2")
_SHORTER = """\
\"\"\"Does a scale of the study of lengths run?\"\"\"

from lab.command import load_config


def get_config(scale):
    config = load_config({config!r} + ":" + scale)
    with config.unlocked():
        for name in [*config.evaluate]:
            if name not in {kept!r}:
                del config.evaluate[name]
    return config
"""


def imported(scale: str, place):
    family, L, changed = FAMILIES[scale]
    source = rehearsed.checkpoint(family, place / "theirs", L, **changed)
    importing.from_hf(source, place / "ours", lambda count: None, lambda count: None)
    return place / "ours"


@pytest.mark.slow
@pytest.mark.parametrize(
    "scale", [pytest.param(name, marks=[] if name == "gemma2/32" else pytest.mark.whole) for name in FAMILIES]
)
def test_a_scale_opens_upon_a_model_of_its_family(scale, tmp_path):
    config = load_config(f"{CONFIG}:{scale}")
    place = imported(scale, tmp_path)
    with pytest.raises(UserError, match=r"config.checkpoint is empty: this study is of .*--config.checkpoint=OUT"):
        start.check_brought(config)
    config.checkpoint = str(place)
    study = open(config)
    asked = study.config.evaluate
    assert asked.plain.trained == study.config.model.position.trained == FAMILIES[scale][1] and len(study.rows) == 1
    assert {"hybrid_cf1_8", "hybrid_yarn", "hybrid_ntk", "hybrid_dynamic"} <= {*asked}, "the seed's future work"
    if scale.startswith("gemma2"):  # the layers with a window keep their positions
        window = study.config.model.pattern[0][0]
        assert window[0] == "rule" and window in asks.remodelled(study.config, asked.yarn).model.pattern[0]


@pytest.mark.parametrize("kind", ["nowhere", "not converted", "of another length"])
def test_a_wrong_directory_is_one_line_that_says_what_to_bring(kind, tmp_path):
    config = load_config(f"{CONFIG}:llama3/{64 if kind == 'of another length' else 32}")
    place = imported("llama3/32", tmp_path)
    config.checkpoint = str({"nowhere": tmp_path / "nowhere", "not converted": tmp_path / "theirs"}.get(kind, place))
    with pytest.raises(UserError, match=r"bring a model of the family of Llama 3 8B that was trained to ") as refused:
        open(config)
    assert "\n" not in str(refused.value)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("scale", ["llama3/32", pytest.param("qwen25/32", marks=pytest.mark.whole)])
def test_the_seeds_table_is_rebuilt_with_every_column(scale, tmp_path):
    shorter = tmp_path / "shorter.py"
    shorter.write_text(_SHORTER.format(config=str(CONFIG), kept=KEPT))
    texts = rehearsed.corpus(tmp_path / "texts.jsonl", letters=400_000)
    flags = [f"--config={shorter}:{scale}", f"--config.checkpoint={imported(scale, tmp_path)}"]
    flags += ["--config.data.corpus=jsonl", f"--config.data.path={texts}", "--config.model.compute=float32"]
    commands.finished("main", *flags, f"--workdir={tmp_path / 'run'}", log=tmp_path / "log", JAX_NUM_CPU_DEVICES="1")
    report = (tmp_path / "run" / "report.md").read_text()
    published = table(report, "N / L")
    columns = ["baseline PPL", "cf 1.5 PPL", "cf 2 PPL", "cf 1.5 improves by", "cf 2 improves by", "best cf"]
    lengths = {"llama3": (256, 1536), "qwen25": (128, 1536)}[scale.split("/")[0]]
    assert {*columns} <= {*published[0]}
    assert (int(published[0]["tokens"]), int(published[-1]["tokens"].replace(",", ""))) == lengths
    for row in published:
        stretched = float(row["N / L"]) > 1
        assert all(float(row[name]) > 1 for name in columns[:3]) and float(row["best cf"]) in (1, 1.5, 2)
        assert all(row[name][0] in "+-" and (stretched or row[name] == "+0.0%") for name in columns[3:5])
    assert published[-1]["published baseline PPL"] != "—" or scale.startswith("qwen25")
    costs = {row["method"]: row for row in table(report, "peak MiB")}
    assert [*sorted(costs)] == sorted(KEPT[1:])
    assert all(float(row["seconds"]) > 0 and float(row["peak MiB"].replace(",", "")) > 0 for row in costs.values())
    assert "| no overhead |" in report and "| cf 2 is best |" in report


def table(text: str, column: str) -> list[dict]:
    """The rows of the first Markdown table that has this column."""
    lines = next(block.splitlines() for block in text.split("\n\n") if f"| {column} |" in block)
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line[:1] == "|"]
    return [dict(zip(header, row, strict=True)) for row in rows]
