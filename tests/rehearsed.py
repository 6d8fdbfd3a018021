"""A checkpoint of Hugging Face's format that reads letters: a tiny one of tests/exchange, made for longer texts."""

import json
import pathlib
import random
import shutil
import string

PLACE = pathlib.Path(__file__).parent / "exchange" / "reference_checkpoints"
LETTERS = " " + string.ascii_lowercase + string.ascii_uppercase[:6] + string.digits + ".,:?=_-"


def checkpoint(family: str, place: pathlib.Path, trained: int, **changed) -> pathlib.Path:
    """Its weights, with another max_position_embeddings and a tokenizer that has a token for each letter."""
    shutil.copytree(PLACE / family, place)
    config = json.loads((place / "config.json").read_text()) | {"max_position_embeddings": trained} | changed
    (place / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((place / "tokenizer.json").read_text())
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {letter: i for i, letter in enumerate(LETTERS, 3)}
    tokenizer["model"]["vocab"] = vocabulary
    tokenizer["pre_tokenizer"] = {
        "type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated", "invert": False,
    }  # fmt: skip
    (place / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert max(vocabulary.values()) < config["vocab_size"]
    return place


def corpus(path: pathlib.Path, letters: int) -> pathlib.Path:
    """JSON lines of random words, so many letters among its validation texts."""
    draw = random.Random(0)
    lines, size = [], 0
    while size < letters:
        text = " ".join("".join(draw.choices(string.ascii_lowercase, k=draw.randint(2, 7))) for _ in range(200))
        lines.append(json.dumps({"text": text}))
        size += len(text)
    path.write_text("".join(f"{line}\n" for line in lines))
    return path
