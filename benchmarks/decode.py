"""Branches that share a prompt, one after the other, as a batch, and by `transformers`: tokens a second and memory.

    python benchmarks/decode.py [--prefixes 128 512 2048 8192] [--branches 1 2 4 8 16 32 64] [--shares 1 4]
                                [--own 64] [--processes 3] [--rounds 5] [--steps 5] [--dim 256] [--heads 8] [--layers 4]
                                [--chunk 64] [--read 16384] [--most 8] [--torch-python PATH] [--out DIR] [--quick]

N branches go on from one prefix of P tokens, each after `own` tokens of its own, greedily, under own_branch, so that
all ways generate the same. The weights are random, of Llama's shape, written in Hugging Face's format and opened from
there by both sides.

shared: lab.decode's engine, a row whose branches read the prefix once. sequential: the same with one branch, so many
times. plain: the engine with N rows, each with its copy of the prefix. transformers: `generate` of N rows with caches
of their own, in a Python that has it (--torch-python); left out without. At one branch the first three are one.

Each way has a process of its own; they take turns, in another order each time. Processes of one program differ by some
percent from beginning to end, so each point is measured again in `processes` new ones. ms: the median of single steps,
each a token of every branch. Ratios are geometric means, over processes, of medians of those of single turns. first:
from the prompt to the first token of every branch; sequential: of the first branch; not measured ("-") where rows with
prompts of their own would read more than `read` tokens. cache: bytes of keys, values and coordinates as they were
allocated. resident: the most of the process while it decodes, its programs and libraries among it. A way whose cache
would be over `most` GB is left out.

Writes decode.json, decode.md and decode.png to `out`, says whether the targets are met, and which attention the lab
took.
"""

import argparse
import collections
import itertools
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import time

import numpy as np
import peers
import tokenizers
from safetensors.numpy import save_file

HERE = pathlib.Path(__file__).parent
WAYS = ("shared", "sequential", "plain", "transformers")
VOCABULARY = 2048
SETTLE = 0.1  # seconds before a turn: threads of the way before wait for work for a while, and take time from the next
TARGET_PREFIX, TARGET_BRANCHES = 2048, 64
TARGETS = {"cpu": {"sequential": 8, "plain": 1.5}, "others": {"sequential": 20, "plain": 3}}  # x, at these


def write_model(place: pathlib.Path, flags, groups: int) -> None:
    """A model of Llama's shape, with so many key heads."""
    rng, D, F, K = np.random.default_rng(0), flags.dim, 8 * flags.dim // 3, flags.dim // flags.heads
    drawn = lambda *shape: (rng.normal(size=shape) * shape[-1] ** -0.5).astype(np.float32)  # noqa: E731
    weights = {"model.embed_tokens.weight": drawn(VOCABULARY, D), "lm_head.weight": drawn(VOCABULARY, D)}
    weights["model.norm.weight"] = np.ones(D, np.float32)
    for m in range(flags.layers):
        layer = f"model.layers.{m}"
        for name, heads in (("q", flags.heads), ("k", groups), ("v", groups)):
            weights[f"{layer}.self_attn.{name}_proj.weight"] = drawn(heads * K, D)
        weights[f"{layer}.self_attn.o_proj.weight"] = drawn(D, flags.heads * K)
        for name, shape in (("gate", (F, D)), ("up", (F, D)), ("down", (D, F))):
            weights[f"{layer}.mlp.{name}_proj.weight"] = drawn(*shape)
        for name in ("input", "post_attention"):
            weights[f"{layer}.{name}_layernorm.weight"] = np.ones(D, np.float32)
    config = dict(
        model_type="llama", architectures=["LlamaForCausalLM"], hidden_size=D, intermediate_size=F, head_dim=K,
        num_hidden_layers=flags.layers, num_attention_heads=flags.heads, num_key_value_heads=groups,
        vocab_size=VOCABULARY, max_position_embeddings=2**17, rope_theta=10000.0, hidden_act="silu", rms_norm_eps=1e-6,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    place.mkdir()
    (place / "config.json").write_text(json.dumps(config))
    save_file(weights, place / "model.safetensors", metadata={"format": "pt"})
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"w": 0}, unk_token="w")).save(str(place / "tokenizer.json"))


def opened(place: pathlib.Path, flags) -> tuple[dict[str, peers.Peer], dict]:
    """The process of each way, and what they say of themselves."""
    about, found = {}, {}
    ours = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # several share a GPU
    for way in WAYS[:3]:
        found[way] = peers.Peer([sys.executable, str(HERE / "decode_ours.py")], ours)
        about |= found[way].ask("open", place=str(place), rule="own_branch")
    if flags.torch_python:
        found["transformers"] = peers.Peer([flags.torch_python, str(HERE / "decode_transformers.py")])
        about |= found["transformers"].ask("open", place=str(place))
    return found, about


def measured(ways: dict[str, peers.Peer], flags, prefix: int, branches: int, token_bytes: int) -> dict[str, dict]:
    """Of each way: seconds of steps, turn by turn, and what else was measured. An `error` says why nothing was."""
    rng = np.random.default_rng(prefix)
    prompt = rng.integers(0, VOCABULARY, prefix).tolist()
    texts = rng.integers(0, VOCABULARY, (branches, flags.own)).tolist()
    found: dict[str, dict] = {}
    if branches == 1:
        ways = {way: ways[way] for way in ("sequential", "transformers") if way in ways}
    many = {way for way in ("plain", "transformers") if way in ways and branches > 1}
    if (needed := branches * (prefix + flags.own) * token_bytes) > flags.most * 1e9:
        found |= {way: {"error": f"its cache would have {needed / 1e9:.1f} GB"} for way in sorted(many)}
    for way in [way for way in ways if way not in found]:
        request = dict(prompt=prompt, texts=texts)
        if way != "transformers":
            tokens = flags.rounds * flags.steps + 2
            request |= dict(rows=branches if way == "plain" else 1, tokens=tokens, chunk=flags.chunk)
        if way == "sequential":
            request["texts"] = texts[:1]
        ways[way].begin("prepare", **request)  # compiles beside the others
        found[way] = {}
    going = [way for way in found if "error" not in found[way]]

    def attempt(way: str, function):
        """What it gives, None of a way that fails, which is left out from there on."""
        try:
            return function()
        except RuntimeError as error:
            found[way] = {"error": str(error)}
            going.remove(way)

    for way in [*going]:
        attempt(way, ways[way].end)
    for way in [*going]:
        reads = branches * prefix if way in many else 0
        first = attempt(way, lambda way=way: ways[way].ask("first")) if reads <= flags.read else None
        if way in going:
            found[way] |= {"first": first, "steps": []}
    for way in [*going]:
        attempt(way, lambda way=way: ways[way].ask("fill"))
    for _ in range(flags.rounds if going else 0):
        for way in random.sample(going, len(going)):
            time.sleep(SETTLE)
            seconds = attempt(way, lambda way=way: ways[way].ask("steps", count=flags.steps))
            if way in going:
                found[way]["steps"].append(seconds)
    for way in [*going]:
        closed = attempt(way, lambda way=way: ways[way].ask("close"))
        if way in going:
            found[way] |= closed
    return found


def merged(parts: list[dict[str, dict]]) -> dict[str, dict]:
    """Of each way what all processes have found: turns of each, the medians of the rest. One error is that of all."""
    found = {}
    for way in parts[0]:
        several = [part[way] for part in parts]
        if failed := [one for one in several if "error" in one]:
            found[way] = failed[0]
            continue
        medians = {key: float(np.median([one[key] for one in several])) for key in ("cache", "resident")}
        medians["attention"] = sorted({one["attention"] for one in several if "attention" in one})
        first = None if several[0]["first"] is None else float(np.median([one["first"] for one in several]))
        steps, tokens = [one["steps"] for one in several], [one["tokens"] for one in several]
        found[way] = medians | {"first": first, "steps": steps, "tokens": tokens}
    return found


def summary(ways: dict[str, dict], branches: int) -> dict:
    """ms and tokens a second of each way, how often faster the shared one is, and whose tokens are others."""
    if branches == 1:
        ways = dict.fromkeys(WAYS[:3], ways["sequential"]) | ways
    of_turns = {way: np.array(one["steps"]) for way, one in ways.items() if "steps" in one}  # process, turn, step
    turns = {way: np.median(seconds, axis=2) for way, seconds in of_turns.items()}
    made = {way: 1 if way == "sequential" else branches for way in turns}  # tokens of a step
    rate = {way: made[way] / float(np.median(seconds)) for way, seconds in of_turns.items()}
    each = lambda way: np.median(turns[way] / made[way] / (turns["shared"] / made["shared"]), axis=1)  # noqa: E731
    ratio = lambda way: float(np.exp(np.log(each(way)).mean()))  # noqa: E731
    other = lambda one, ours: any(  # noqa: E731  some have more
        a != b for mine, its in zip(one["tokens"], ours, strict=True) for a, b in zip(mine, its, strict=False)
    )
    return {
        "ms": {way: 1e3 * made[way] / rate[way] for way in turns},
        "tokens_per_second": rate,
        "x": {way: ratio(way) for way in turns if way != "shared" and "shared" in turns},
        "differing": [way for way in turns if "shared" in turns and other(ways[way], ways["shared"]["tokens"])],
        "ways": ways,
    }


def number(x, places: int = 0, scale: float = 1) -> str:
    return "-" if x is None else f"{x * scale:,.{places}f}"


def tables(points: list[dict]) -> str:
    """Two tables in Markdown: speed, then latency and memory."""
    lines = [
        "| query heads a key head | prefix | branches | shared tokens/s | sequential | plain | transformers "
        "| shared x sequential | x plain | x transformers |",
        "| --: " * 10 + "|",
    ]
    for p in points:
        cells = [number(p["tokens_per_second"].get(way)) for way in WAYS]
        cells += [number(p["x"].get(way), 2) for way in WAYS[1:]]
        lines.append(f"| {p['share']} | {p['prefix']} | {p['branches']} | {' | '.join(cells)} |")
    units = ("ms a step", 2, None), ("first, s", 2, "first"), ("cache, MB", 1, "cache"), ("resident, MB", 0, "resident")
    head = " | ".join(f"{unit}: {' / '.join(WAYS)}" for unit, *_ in units)
    lines += ["", f"| query heads a key head | prefix | branches | {head} |", "| --: " * (3 + len(units)) + "|"]
    for p in points:
        cells = []
        for _, places, key in units:
            values = [p["ms"].get(way) if key is None else p["ways"].get(way, {}).get(key) for way in WAYS]
            cells.append(" / ".join(number(x, places, 1e-6 if key in ("cache", "resident") else 1) for x in values))
        lines.append(f"| {p['share']} | {p['prefix']} | {p['branches']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def verdicts(points: list[dict], device: str, own: int) -> list[str]:
    """A line for each target, and for what is not as it should be."""
    wanted, lines = TARGETS["cpu" if device == "cpu" else "others"], []
    for p in points:
        at = f"{p['share']} query heads a key head, {p['branches']} branches at prefix {p['prefix']}"
        if (p["prefix"], p["branches"]) == (TARGET_PREFIX, TARGET_BRANCHES):
            for way, least in wanted.items():
                found = p["x"].get(way)
                told = "not measured" if found is None else f"{found:.2f}x: {'met' if found >= least else 'MISSED'}"
                lines.append(f"at least {least}x {way}, {at}: {told}")
        for way in p["differing"]:
            lines.append(f"{at}: the first branch of {way} has other tokens than that of the shared way")
        lines += [f"{at}: {way}: {one['error']}" for way, one in p["ways"].items() if "error" in one]
    alone = [p["x"]["transformers"] for p in points if p["branches"] == 1 and "transformers" in p["x"]]
    if alone:
        told = f"{min(alone):.2f}x to {max(alone):.2f}x: {'met' if min(alone) >= 1 else 'MISSED'}"
        lines.append(f"never slower than transformers at one branch: {told}")
    several = [p for p in points if p["branches"] > 1]
    steps = [p["x"]["plain"] for p in several if "plain" in p["x"]]
    whole = [x for p in several if (x := whole_over_plain(p, own)) is not None]
    for of, ratios in (("a step", steps), (f"from the prompt to {own} tokens of every branch", whole)):
        if ratios:
            told = f"{sum(x < 0.97 for x in ratios)} of {len(ratios)} points, {min(ratios):.2f}x at worst"
            lines.append(f"sharing is slower than plain batching by more than 3%, {of}: at {told}")
    taken = {name for p in points for one in p["ways"].values() for name in one.get("attention", ())}
    return [*lines, f"attention of the lab: {', '.join(sorted(taken))}"]


def whole_over_plain(point: dict, own: int) -> float | None:
    """How often faster sharing is, of a first token and then so many steps; None where the first was not measured."""
    first = {way: point["ways"].get(way, {}).get("first") for way in ("shared", "plain")}
    if None in first.values():
        return None
    seconds = {way: first[way] + own * point["ms"][way] / 1e3 for way in first}
    return seconds["plain"] / seconds["shared"]


def plot(path: pathlib.Path, points: list[dict]) -> None:
    """Maps over prefix and branches, by what the shared way is set beside and by query heads of a key head."""
    import matplotlib.pyplot as plt
    from matplotlib.colors import LogNorm

    shares = sorted({p["share"] for p in points})
    rows = [way for way in WAYS[1:] if any(way in p["x"] for p in points)]
    prefixes, counts = (sorted({p[name] for p in points}) for name in ("prefix", "branches"))
    size = (1.5 + 3.6 * len(shares), 1 + (0.6 + 0.32 * len(counts)) * len(rows))
    figure, panels = plt.subplots(len(rows), len(shares), figsize=size, squeeze=False, layout="constrained")
    for way, of_way in zip(rows, panels, strict=True):
        for share, axes in zip(shares, of_way, strict=True):
            map_NP = np.full((len(counts), len(prefixes)), np.nan)
            for p in points:
                if p["share"] == share:
                    map_NP[counts.index(p["branches"]), prefixes.index(p["prefix"])] = p["x"].get(way, np.nan)
            image = axes.imshow(map_NP, origin="lower", aspect="auto", cmap="PuOr", norm=LogNorm(1 / 16, 16))
            for (n, P), x in np.ndenumerate(map_NP):
                if not np.isnan(x):
                    bold, dark = "bold" if x < 1 else "normal", abs(np.log2(x)) > 2.5
                    axes.text(P, n, f"{x:.2g}", ha="center", va="center", weight=bold, color="w" if dark else "k")
            axes.set(xticks=range(len(prefixes)), xticklabels=prefixes, yticks=range(len(counts)), yticklabels=counts)
            axes.set(title=f"shared over {way}, {share} query heads a key head", xlabel="prefix", ylabel="branches")
            axes.title.set_size("medium")
    bar = figure.colorbar(image, ax=panels, ticks=[1 / 16, 1 / 4, 1, 4, 16], label="tokens a second, ratio", shrink=0.6)
    bar.ax.set_yticklabels(["1/16", "1/4", "1", "4", "16"])
    figure.savefig(path, dpi=110)
    plt.close(figure)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    whole = dict(type=int)
    parser.add_argument("--prefixes", nargs="+", default=[128, 512, 2048, 8192], **whole, help="tokens that are shared")
    parser.add_argument("--branches", nargs="+", default=[1, 2, 4, 8, 16, 32, 64], **whole)
    parser.add_argument("--shares", nargs="+", default=[1, 4], **whole, help="query heads of a key head")
    parser.add_argument("--own", default=64, **whole, help="tokens of each branch when it is measured")
    parser.add_argument("--processes", default=3, **whole, help="of each way, one after the other")
    parser.add_argument("--rounds", default=5, **whole, help="turns of each way")
    parser.add_argument("--steps", default=5, **whole, help="of a turn; the first finds nothing in caches")
    parser.add_argument("--dim", default=256, **whole, help="width; heads are dim / heads wide")
    parser.add_argument("--heads", default=8, **whole)
    parser.add_argument("--layers", default=4, **whole)
    parser.add_argument("--chunk", default=64, **whole, help="tokens of a prompt that the engine takes at once")
    parser.add_argument("--read", default=16384, **whole, help="tokens at most that rows read for their first tokens")
    parser.add_argument("--most", default=8.0, type=float, help="GB of a cache")
    parser.add_argument("--torch-python", default=sys.executable, help="an interpreter that has torch and transformers")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("decode"), help="where results are written")
    parser.add_argument("--quick", action="store_true", help="few points, few turns: does everything run?")
    flags = parser.parse_args()
    if not shutil.which(flags.torch_python):
        parser.error(f"--torch-python {flags.torch_python}: there is no such interpreter")
    if undivided := [share for share in flags.shares if flags.heads % share]:
        parser.error(f"--shares {undivided[0]} does not divide --heads {flags.heads}")
    if flags.quick:
        flags.prefixes, flags.branches = [128, 512], [1, 4]
        flags.processes, flags.rounds, flags.own = 2, 2, 8
    return flags


def main() -> None:
    flags = parsed()
    has = [flags.torch_python, "-c", "import torch, transformers"]
    if subprocess.run(has, capture_output=True).returncode:
        print(f"transformers is left out: {flags.torch_python} does not have it (--torch-python)", file=sys.stderr)
        flags.torch_python = None
    flags.out.mkdir(parents=True, exist_ok=True)
    parts, points, about = collections.defaultdict(list), [], {}
    for share, process in itertools.product(flags.shares, range(flags.processes)):
        with tempfile.TemporaryDirectory() as place:
            write_model(pathlib.Path(place) / "model", flags, flags.heads // share)
            ways, about = opened(pathlib.Path(place) / "model", flags)
        half = 1 if about["dtype"] == "float32" else 2
        token_bytes = flags.layers * 2 * flags.dim // share * 4 // half
        for prefix, branches in itertools.product(flags.prefixes, flags.branches):
            start, at = time.monotonic(), (share, prefix, branches)
            parts[at].append(measured(ways, flags, prefix, branches, token_bytes))
            said = ", ".join(f"{x:.2f}x {way}" for way, x in summary(merged(parts[at][-1:]), branches)["x"].items())
            took = f"process {process + 1} of {flags.processes}, {time.monotonic() - start:.0f} s"
            print(f"{share} query heads a key head, prefix {prefix}, {branches} branches: {said} ({took})",
                  file=sys.stderr, flush=True)  # fmt: skip
            points = [
                dict(zip(("share", "prefix", "branches"), at, strict=True)) | summary(merged(found), at[2])
                for at, found in parts.items()
            ]
            settings = {name: value for name, value in vars(flags).items() if name not in ("out", "torch_python")}
            kept = {"about": about, "flags": settings, "points": points}
            (flags.out / "decode.json").write_text(json.dumps(kept, indent=1) + "\n")
        for peer in ways.values():
            peer.close()
    told = verdicts(points, about["device"], flags.own)
    text = tables(points) + "\n\n" + "\n".join(f"- {line}" for line in told) + "\n"
    (flags.out / "decode.md").write_text(text)
    plot(flags.out / "decode.png", points)
    print(", ".join(f"{name} {value}" for name, value in about.items()), text, sep="\n\n")


if __name__ == "__main__":
    main()
