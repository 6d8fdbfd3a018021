"""The part of a report on long documents: methods by length, loss within L beside loss beyond it, retrieval beside
perplexity, the published table rebuilt, and what it all costs."""

from collections.abc import Mapping, Sequence

from lab.study.judge import documents
from lab.study.judge.claims import claims
from lab.study.judge.documents import Method, Paired
from lab.study.judge.statistics import Interval
from lab.study.numbers import number
from lab.study.report import figures, live
from lab.study.report.layout import panel_rows
from lab.study.report.page import Chart, Heading, Piece, Table, Text
from lab.study.results import Results

MEBIBYTE = 2**20
NAME = "lengths"  # in SECTIONS
COMPARED = {"within": "within L", "beyond": "beyond L", "exact": "exact answers"}
ByArm = Mapping[tuple[str, str], Mapping[int, dict]]  # {(cell, method): {length: row}}


def section(study: Results) -> list[Piece]:
    """Of every cell and method that is done."""
    every = documents.methods(study)
    found = {(cell["name"], one.name): documents.rows(study, cell["name"], one.name)
             for cell in study.plan["cells"] for one in every}  # fmt: skip
    found = {arm: by_length for arm, by_length in found.items() if by_length}
    if not found:
        return [Text("No length has been asked yet.")]
    paired, L = documents.compare(study), trained(study)
    lengths = sorted({length for by_length in found.values() for length in by_length})
    blocks = [*_few(found), Text(_measured(study, every, L)), _perplexities(study, found, paired, lengths)]
    blocks += _positions(study, every, found, L)
    beyond = [length for length in lengths if length > L]
    for length in reversed(beyond or lengths):
        blocks.append(_at(study, every, found, paired, length, L, folded=length != lengths[-1]))
    blocks += _published(study, found, lengths, L) + _claims(study, L, paired)
    return [*blocks, *_costs(study, every, found, lengths[-1])]


def trained(study: Results) -> int:
    """L, as the plain model's ask has it."""
    config = study.plan["config"]
    asked = config["evaluate"][documents.methods(study)[0].name]
    return asked["trained"] or config["model"]["position"]["trained"] or config["data"]["text_length"]


def answer(study: Results) -> list[Piece]:
    """In a sentence: which method loses least at the longest length, and whether that is more than chance."""
    every, paired = documents.methods(study), documents.compare(study)
    cell = study.plan["cells"][0]["name"]
    plain, longest = every[0].name, max(every[0].lengths)
    last = {one.name: documents.rows(study, cell, one.name).get(longest, {}) for one in every}
    last = {name: row["loss"] for name, row in last.items() if row}
    if len(last) < 2 or plain not in last:
        return []
    best = min(last, key=last.get)
    if best == plain:
        return [
            Text(f"**No method has a lower loss than {plain}** at {longest} tokens ({last[plain]:.4f}).", strong=True)
        ]
    of = {one.part: one for one in paired if one.arm == (cell, best) and one.length == longest}
    told = (
        f"**{best} has the lowest loss at {longest} tokens**, {last[best]:.4f} nats per token against {last[plain]:.4f}"
    )
    told += (
        f" of {plain}: {', '.join(f'{part} L {_verdict(of[part])}' for part in ('beyond', 'within') if part in of)}."
    )
    return [Text(told, strong=True)]


def _verdict(one: Paired) -> str:
    bounds = interval(one)
    return f"{one.verdict}{f' ({one.estimate.mean:+.4f} {_shown(bounds)})' if bounds else ''}"


def interval(one: Paired) -> Interval | None:
    """By resampling documents; None where they are too few, or do not differ."""
    return one.estimate.bootstrap_interval if one.estimate.values else None


def _shown(bounds: Interval | None) -> str:
    return f"[{bounds[0]:+.4f}, {bounds[1]:+.4f}]" if bounds else "—"


def _measured(study: Results, every: Sequence[Method], L: int) -> str:
    asked = study.plan["config"]["evaluate"][every[0].name]
    first = "no BOS" if asked["bos"] < 0 else f"id {asked['bos']} (BOS) before every document and window"
    sliding = (
        f"Sliding: windows of as many tokens as the length, {asked['stride']} apart, over the whole of the longest "
        "documents; the first counts whole, later ones their new tokens alone."
        if asked["stride"]
        else "No sliding windows were asked."
    )
    return (
        f"L = {L} tokens, which the model was trained to. Losses are nats per token, weighted by tokens, in one pass "
        f"over documents of exactly so many tokens of the model's own tokenizer; {first}. A document is the same text "
        "at every length, to its first so many tokens. Within and beyond L: by the position of the token that is read. "
        f"{sliding} Exact: every token of the answer is the likeliest given the true text before it, as greedy "
        "decoding would find. Differences are from the plain model, paired by document; intervals are by resampling "
        "documents (95%, studentised bootstrap), verdicts by paired t-tests, corrected over all of them (Holm), "
        "one that stands in several places counting once."
    )


def _few(found: ByArm) -> list[Piece]:
    """That there are too few documents to judge by."""
    counts = {row["documents"] for by_length in found.values() for row in by_length.values() if "documents" in row}
    if not counts or min(counts) >= documents.LEAST:
        return []
    told = f"**Too few documents: {min(counts):g}.** Below {documents.LEAST} no interval and no verdict is given"
    return [Text(f"{told}; bring more text, or ask of shorter lengths, for as many as that.", strong=True)]


def _labelled(study: Results, arm: tuple[str, str]) -> list[str]:
    cell = next(cell for cell in study.plan["cells"] if cell["name"] == arm[0])
    return [*map(str, study.key(cell)), arm[1]]


def _perplexities(study: Results, found: ByArm, paired: Sequence[Paired], lengths: Sequence[int]) -> Table:
    verdicts = {(one.arm, one.length): one.verdict for one in paired if one.part == "all"}
    rows = []
    for arm, by_length in found.items():
        shown = []
        for length in lengths:
            value, verdict = by_length.get(length, {}).get("ppl"), verdicts.get((arm, length))
            shown.append(number(value, 3) + (f" ({verdict})" if verdict and value is not None else ""))
        rows.append([*_labelled(study, arm), *shown])
    caption = (
        "**Perplexity in one pass, by tokens of a document**; in brackets, whether that is told from the plain model."
    )
    return Table([*study.labels, "method", *map(str, lengths)], rows, caption, sortable=True)


def _at(study, every, found: ByArm, paired: Sequence[Paired], length: int, L: int, folded: bool) -> Table:
    """Everything of one length: the loss within L and retrieval beside what is gained beyond."""
    of = {(one.arm, one.part): one for one in paired if one.length == length}
    retrieval = {one.name: one.retrieval for one in every}
    parts = [part for part in COMPARED if any(key[1] == part and one.estimate.n for key, one in of.items())]
    rows, asked_keys = [], any("keys" in by_length.get(length, {}) for by_length in found.values())
    for arm, by_length in found.items():
        row = by_length.get(length, {})
        asked = retrieval[arm[1]]
        answers = documents.rows(study, arm[0], asked).get(length, {}) if asked else {}
        values = {part: row.get(part) for part in ("within", "beyond")} | {"exact": answers.get("exact")}
        shown = []
        for part in parts:
            one = of.get((arm, part))
            value = values[part]
            told = "—" if value is None else f"{value:.1%}" if part == "exact" else number(value, 4)
            shown += [told, *(["—", "—"] if one is None or not one.estimate.n else _difference(one))]
        tasks = [f"{answers[name]:.0%}" if name in answers else "—" for name in _tasks(study, every)]
        keyed = [number(row.get("long_ppl"), 3), number(row.get("keys"), 0)] if asked_keys else []
        rows.append([*_labelled(study, arm), *shown, number(row.get("sliding_ppl"), 3), *keyed, *tasks,
                     number(row.get("documents"), 0), number(row.get("read"), 0)])  # fmt: skip
    columns = [
        column
        for told in (COMPARED[part] for part in parts)
        for column in (told, f"{told}: less plain", f"{told}: verdict")
    ]
    names = [name.removeprefix("exact_").replace("_", "-") for name in _tasks(study, every)]
    caption = f"At {length} tokens, {length / L:g} L: loss within and beyond L, and retrieval"
    keyed = ["LongPPL", "key tokens"] if asked_keys else []
    every_column = [*study.labels, "method", *columns, "sliding PPL", *keyed, *names, "documents", "tokens"]
    return Table(every_column, rows, caption, sortable=not folded, folded=folded)


def _difference(one: Paired) -> list[str]:
    mean = f"{one.estimate.mean:+.4f}"
    return [f"{mean} {_shown(bounds)}" if (bounds := interval(one)) else mean, one.verdict]


def _tasks(study: Results, every: Sequence[Method]) -> list[str]:
    """The columns of tasks of retrieval that were asked."""
    asked = study.plan["config"]["evaluate"]
    tasks = dict.fromkeys(task for one in every if one.retrieval for task in asked[one.retrieval]["tasks"])
    return [f"exact_{task.replace('-', '_')}" for task in tasks]


def family(method: Method) -> str:
    """The panel that a method is drawn in."""
    fields = {field.split(".")[1] for field in method.overrides if field.startswith("position.")} - documents.BESIDE
    if method.cf is not None:
        return "hybrid"
    if len(fields) > 1:
        return "combined"
    return {"scaling": "frequency maps", "map": "position maps"}.get(next(iter(fields), ""), "others")


def _positions(study: Results, every: Sequence[Method], found: ByArm, L: int) -> list[Piece]:
    """Loss by bucket of positions at the longest length: a panel for each family of methods, the plain model in all."""
    cell, longest = study.plan["cells"][0]["name"], max(every[0].lengths)
    curves = {
        one.name: _buckets(found[cell, one.name][longest])
        for one in every
        if longest in found.get((cell, one.name), {})
    }
    plain, panels = every[0].name, {}
    if plain not in curves or len(curves[plain]) < 2:
        return []
    for one in every[1:]:
        if one.name in curves:
            panels.setdefault(family(one), {plain: curves[plain]})[one.name] = curves[one.name]
    panels = panels or {"": {plain: curves[plain]}}
    drawn = panel_rows(panels), {}, "tokens read, up to", dict.fromkeys(panels, (L, L)), study.measure
    caption = (
        f"Loss by the position of the token that is read, in documents of {longest} tokens: the mean of "
        f"0 to L, L to 2 L, 2 L to 4 L and so on, at the end of each. Grey: L = {L}, which the model was trained to."
    )
    return [Chart("loss_by_position", figures.png(figures.by_condition(*drawn)), caption, live.by_condition(*drawn))]


def _buckets(row: Mapping) -> dict[int, float]:
    """{last position: loss} of a row."""
    found = {name: value for name, value in row.items() if name.startswith("nats_") and value is not None}
    return {int(name.split("_")[2]): value for name, value in found.items()}


def _published(study: Results, found: ByArm, lengths: Sequence[int], L: int) -> list[Piece]:
    """Plain, cf 1.5 and cf 2 by length, and what was published at as many times L."""
    cell, every = study.plan["cells"][0]["name"], documents.hybrids(study)
    by_cf = {documents.cf(one): found.get((cell, one.name), {}) for one in every}
    if len(by_cf) < 2:
        return []
    said, rows = study.published(), []
    for length in lengths:
        ppl = {cf: by_length[length]["ppl"] for cf, by_length in by_cf.items() if length in by_length}
        ppl = {cf: value for cf, value in ppl.items() if value is not None}
        if not ppl:
            continue
        theirs = _said(said, length / L)
        rows.append([
            str(length), f"{length / L:g}", *(number(ppl.get(cf), 3) for cf in (1.0, 1.5, 2.0)),
            *(_gain(ppl, cf) for cf in (1.5, 2.0)), f"{min(ppl, key=ppl.get):g}",
            *(number(theirs.get(cf), 2) for cf in (1.0, 1.5, 2.0)), *(_gain(theirs, cf) for cf in (1.5, 2.0)),
        ])  # fmt: skip
    ours = ["baseline PPL", "cf 1.5 PPL", "cf 2 PPL", "cf 1.5 improves by", "cf 2 improves by"]
    columns = ["tokens", "N / L", *ours, "best cf", *(f"published {name}" for name in ours)]
    caption = (
        "The published table rebuilt: hybrid positions against the plain model, in one pass. Best cf: of all that were "
        "asked, 1 being the plain model. Published: of another model on other text, by nominal length, at as many "
        "times L; compare signs, not levels."
    )
    return [Heading("The published table"), Table(columns, rows, caption)]


def _said(published, stretch: float) -> dict[float, float]:
    """{cf: published perplexity} at a stretch."""
    if published is None or not {"stretch", "cf", "ppl"} <= {*published.columns}:
        return {}
    rows = published[(published["stretch"] - stretch).abs() < 1e-6]
    return dict(zip(rows["cf"], rows["ppl"], strict=True))


def _gain(ppl: Mapping[float, float], cf: float) -> str:
    """By how much the perplexity of cf is below that of the plain model: positive is better."""
    return f"{1 - ppl[cf] / ppl[1.0]:+.1%}" if {cf, 1.0} <= {*ppl} else "—"


def _claims(study: Results, L: int, paired: list[Paired]) -> list[Piece]:
    rows = [[one.claim, one.outcome, one.told] for one in claims(study, L, paired)]
    caption = "Published claims of hybrid positions, as hypotheses: what these documents say."
    return [Table(["claim", "outcome", "by"], rows, caption)] if rows else []


def _costs(study: Results, every: Sequence[Method], found: ByArm, length: int) -> list[Piece]:
    frame, rows = study.timings, []
    for arm in found:
        of = frame[(frame["cell"] == arm[0]) & (frame["phase"] == documents.phase(arm[1]))]
        of = of[of[study.condition] == length]
        if of.empty:
            continue
        seconds, speed, peak = of[["seconds", "tokens_per_second", "peak_bytes"]].astype(float).mean()
        shown = number(seconds, 2), number(speed, 0), number(peak / MEBIBYTE, 0)
        rows.append([*_labelled(study, arm), *shown])
    columns = [*study.labels, "method", "seconds", "tokens/s", "peak MiB"]
    caption = (
        f"What {length} tokens cost: seconds of all documents, read in chunks behind a cache (single timings, without "
        "compiling), and the memory of the program that reads them."
    )
    return [Table(columns, rows, caption, sortable=True)] if rows else []
