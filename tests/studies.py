"""Writes the directory of a made-up study, as lab.main leaves it: what the tests of reports read."""

import itertools
import json
import re
import zlib
from pathlib import Path

from lab import storage
from lab.study import evaluations

ASKED = {"loss": {"parts": {"ask": {"kind": "branches"}, "program": ["1a2b3c"]}, "versions": {"jax": "0.10.2"}}}
COUNTS = (1, 2, 4, 8, 16, 24, 32, 48, 64)
FIELDS = {
    "rope_ratio": "model.position.ratio",
    "train_branch": "data.draw",
    "head": "model.mixer.heads",
    "variant": "name",
    "rung": "rung",
}
RATIOS = {"rope_ratio": [0.0, 0.25, 0.5, 0.75, 1.0], "train_branch": ["fixed1", "1-15"]}
HEADS = {"head": ["h8", "h16", "h32"], **RATIOS}


def by_seed(labels, seed):
    return 0.01 * seed


def plausible(labels, count):
    """Losses of the published shape: flat at ratio 1.0, climbing below it, steep for models trained on one branch."""
    ratio, wide = labels["rope_ratio"], count / 64
    if labels["train_branch"] == "fixed1":
        return 1.82 + 0.01 * ratio + 3.0 * (1 - count**-0.35)
    return 2.30 - 0.28 * ratio + (1.2 - 1.1 * ratio) * wide**0.6 + 0.002 * len(labels)


def branches(values):
    """The section of that name, with the labels that it needs."""
    return ("branches", "rope_ratio", "train_branch", *["head"] * ("head" in values))


def write_study(
    directory,
    values=RATIOS,
    loss=plausible,
    counts=COUNTS,
    seeds=1,
    published="",
    sections=None,
    skip=(),
    study=None,
    noise=by_seed,
    looks=(),
):
    """A study over the product of `values`; `loss(labels, count)` for each evaluation, `noise(labels, seed)` added to
    it and to the training loss; runs in `skip`, given as (name of the cell, seed), are left pending; `study`: what the
    config's study says besides. Returns the directory."""
    cells = [_cell(dict(zip(values, point, strict=True)), seeds) for point in itertools.product(*values.values())]
    plan = {
        "study": "rope_ablation",
        "question": "Which share of the rotary frequencies should carry the branch?",
        "labels": [[FIELDS[label], label] for label in values],
        "condition": "eval_branch",
        "asks": {"loss": "eval_branch"},
        "sections": [branches(values), "curves"] if sections is None else list(sections),
        "published": published,
        "command": "python -m lab.main --config=configs/rope_ablation.py",
        "config": _config({"rope_ratio": 1.0, "train_branch": "1-15"}) | {"study": study or {}},
        "looks": [{"seeds": count} for count in looks],
        "cells": cells,
    }
    write(directory / "plan.json", plan)
    for cell in cells:
        write(directory / cell["directory"] / "config.json", _config(cell["labels"]))
        for seed in cell["seeds"]:
            if (cell["name"], seed) not in skip:
                write_run(directory, cell, seed, loss, counts, noise=noise)
    return directory


def write_run(directory, cell, seed, loss=plausible, counts=COUNTS, speed=45000.0, noise=by_seed):
    """The files of a finished run."""
    place, moved = directory / cell["directory"] / f"seed-{seed}", noise(cell["labels"], seed)
    write_metrics(place, range(10, 251, 10), start=5.5 + 0.1 * seed, moved=moved)
    result = {
        "cell": cell["name"],
        "fingerprint": cell["fingerprint"],
        "seed": seed,
        "labels": cell["labels"],
        "parameters": cell["parameters"],
        "tokens": cell["tokens"],
        "timings": [
            {
                "phase": "train",
                "seconds": 512000 / speed,
                "tokens_per_second": speed,
                "peak_bytes": 700 * 2**20,
                "overhead_share": 0.021,
            }
        ],
        "environment": {"platform": "cpu", "devices": 2, "jax": "0.10.2"},
        "segments": [{"first_step": 0, "implementation": "tiled", "platform": "cpu", "devices": 2, "vmapped": False}],
        "text_hash": f"{seed:x}" * 64,
    }
    write(place / "result.json", result)
    rows = [{"eval_branch": n, "loss": loss(cell["labels"], n) + moved, "tokens": 23000} for n in counts]
    times = {"seconds": 0.4, "tokens_per_second": 2 * speed, "peak_bytes": 2**29}
    write_evaluation(place, rows, [{"eval_branch": n} | times for n in counts])


def write_evaluation(place, rows, timings=()):
    """All that the ask named loss found of a run."""
    found = evaluations.begun("loss", "eval_branch", ASKED["loss"])
    evaluations.save(place, found | {"complete": True, "conditions": list(rows), "timings": list(timings)})


def change_evaluation(place, change):
    """Rewrites the rows of the ask named loss: `change(rows)` edits them."""
    (path,) = place.glob("evaluations/loss-*.json")
    found = json.loads(path.read_text())
    change(found["conditions"])
    write(path, found)


def write_metrics(place, steps, start=5.5, moved=0.0):
    lines = [
        {
            "step": step,
            "loss": 2.0 + (start - 2.0) * 20 / (20 + step) + moved,
            "tokens": 2048,
            "text_hash": f"{step:x}",
            "grad_norm": 1.0,
            "learning_rate": 1e-3,
            "fill": 0.9,
        }
        for step in steps
    ]
    place.mkdir(parents=True, exist_ok=True)
    (place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write(path: Path, content: dict):
    """As the lab writes it; content may have been read from such a file."""
    storage.write_json(path, {name: value for name, value in content.items() if name != storage.SEAL})


def _cell(labels, seeds):
    name = ",".join(f"{label}={value}" for label, value in labels.items())
    head_dim = {"h8": 128, "h16": 64, "h32": 32}.get(labels.get("head"), 24)
    pairs = head_dim // 2
    fingerprint = f"{zlib.crc32(name.encode()):08x}"
    selected = round(pairs * labels.get("rope_ratio", 1.0))
    return {
        "name": name,
        "fingerprint": fingerprint,
        "directory": f"cells/{name}-{fingerprint}",
        "labels": labels,
        "seeds": list(range(seeds)),
        "parameters": 297408,
        "parameters_non_embedding": 272640,
        "train_flops_per_token": 1930000.0,
        "attention_work": 192,
        "cache_per_token_per_layer": 48,
        "cache_bytes_per_token": 1536,
        "intensity_training": 12.34,
        "intensity_decoding": {"1": 0.96, "64": None if labels.get("rope_ratio") == 0.0 else 7.0},
        "tokens": 512000,
        "executable": "1a2b3c",
        "asks": ASKED,
        "head_dim": head_dim,
        "pairs_branch": (selected + 1) // 2,
        "pairs_time": selected // 2,
        "pairs_index": pairs - selected,
    }


def _config(labels):
    heads = int(labels.get("head", "h4")[1:])
    return {
        "model": {
            "mixer": {"name": "attention", "heads": heads, "kv_heads": heads // 4},
            "position": {"ratio": labels.get("rope_ratio", 1.0), "theta": 1e6},
        },
        "data": {"draw": labels.get("train_branch", "1-15"), "corpus": "stdlib"},
        "train": {"steps": 250},
    }


def without_plotly(page: str) -> str:
    """An HTML page without the script that draws its figures: megabytes in which every word occurs."""
    return re.sub(r'<script id="plotly">.*?</script>', "", page, flags=re.DOTALL)
