"""What the rows of an ask depend on, beside the weights that it is asked of."""

import hashlib
from pathlib import Path

from ml_collections import ConfigDict

from lab import data as lab_data
from lab.data import reading
from lab.evaluate import asks, decoding
from lab.evaluate.passes import Pass
from lab.study.define.identity import versions
from lab.train import canonical, origin

_programs: dict[tuple, list[str]] = {}  # a study looks at each of its runs many times
_tables_of: dict[tuple, str] = {}  # and asks several things under the same overrides


def wanted(config: ConfigDict, data: lab_data.Data) -> dict[str, dict]:
    """{name of an ask: {"parts", "versions"}} of all asks of a cell, that named loss first, as lab.study.evaluations
    compares them."""
    found = {}
    for name in sorted(config.evaluate, key=lambda name: (name != asks.LOSS, name)):
        asked = config.evaluate[name]
        parts = {
            "ask": asks.resolved(asked),
            "data": data.validation_fingerprint,
            "version": asks.ASKS[asked.kind].version,
            "program": _program(config, asked),
        }
        if parts["ask"].pop("chat", False) and data.tokenizer.chat:  # what that is, not that it is asked for
            parts["chat"] = hashlib.blake2b(data.tokenizer.chat.text.encode(), digest_size=16).hexdigest()
        if evaluator := parts["ask"].get("evaluator"):  # another one may lie at the same place later
            parts["evaluator"] = origin.digest(origin.find(evaluator))
        if path := parts["ask"].get("squad"):
            parts["squad"] = reading.digest(Path(path))
        found[name] = {"parts": parts, "versions": versions()}
    return found


def _program(config: ConfigDict, asked: ConfigDict) -> list[str]:
    """Digests of the evaluation step and, where they are not those of training, of the tables that it reads."""
    key = config.model.to_json_best_effort(), asked.to_json_best_effort(), config.data.text_length
    if key not in _programs:
        changed = asks.remodelled(config, asked)
        if asks.ASKS[asked.kind].decode:
            step = canonical.score_chunk(changed, 1, decoding.CHUNK, 2 * decoding.CHUNK)  # what is read and extended
        elif asks.ASKS[asked.kind].rows:
            step = canonical.score_chunk(changed, *Pass.of(asked))
        else:
            step = canonical.evaluation_step(changed, asked.rows, asks.tokens_at_once(config, asked))
        _programs[key] = [step, _tables(changed)] if asked.model else [step]
    return _programs[key]


def _tables(config: ConfigDict) -> str:
    """`canonical.tables` of a config."""
    key = config.model.to_json_best_effort(), config.train.to_json_best_effort()
    if key not in _tables_of:
        _tables_of[key] = canonical.tables(config)
    return _tables_of[key]
