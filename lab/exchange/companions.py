"""What lies beside the weights: the tokenizer, and what says how it is used.

An imported directory keeps the files of COMPANIONS as they were, and in ORIGIN the config.json that it was made from.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import tokenizers as library
from tokenizers import decoders, models, pre_tokenizers

from lab.data import tokenizers
from lab.errors import UserError
from lab.exchange import kinds
from lab.exchange.source import CONFIG, find_json

SETTINGS, GENERATION, TEMPLATE = "tokenizer_config.json", "generation_config.json", "chat_template.jinja"
COMPANIONS = (SETTINGS, GENERATION, "special_tokens_map.json", TEMPLATE)
ORIGIN = "huggingface.json"  # {"config": that config.json, "dtypes": {name of a tensor: its type}}


def copy(source: Path, target: Path) -> None:
    """The tokenizer and the other files, of an imported directory also what it was made from."""
    for name in (tokenizers.FILE, *COMPANIONS, ORIGIN):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def check(source: Path) -> None:
    """Raises UserError where there is no tokenizer, or one that cannot be read."""
    if not (source / tokenizers.FILE).is_file():
        others = [name for name in ("tokenizer.model", "vocab.json") if (source / name).is_file()]
        told = f"; {others[0]} is not read: open it with transformers, and save it from there" if others else ""
        raise UserError(f"{source} has no {tokenizers.FILE}{told}")
    tokenizers.load(source)


def special(source: Path, values: Mapping, vocabulary: int) -> str:
    """The token that ends a text, "" where none is named. Raises UserError for a tokenizer without a token that
    config.json names, or the first token of a text that its settings name, or with more tokens than the model has.

    values: of config.json, with defaults.
    """
    check(source)
    file, settings = source / tokenizers.FILE, find_json(source / SETTINGS)
    kinds.check(settings, kinds.SETTINGS, source / SETTINGS)
    kinds.check(find_json(source / GENERATION), kinds.GENERATION, source / GENERATION)
    tokenizer = library.Tokenizer.from_file(str(file))
    largest = max(tokenizer.get_vocab(with_added_tokens=False).values(), default=0)
    if largest >= vocabulary:
        raise UserError(f"{file} has a token of id {largest}, and config.json has vocab_size = {vocabulary}")
    for key in ("bos_token_id", "eos_token_id"):
        for one in ids(values.get(key)):
            if one >= vocabulary:
                raise UserError(f"{source / CONFIG}: {key} = {one} is no token: vocab_size = {vocabulary}")
    for one in ids(values.get("bos_token_id")):
        if tokenizer.id_to_token(one) is None:
            raise UserError(f"{file} has no token of id {one}, which config.json names as bos_token_id")
    named = content(settings.get("bos_token"))
    if settings.get("add_bos_token") and (not named or tokenizer.token_to_id(named) is None):
        raise UserError(f"{file} has no token {named!r}, with which texts begin: {SETTINGS} has add_bos_token = true")
    ends = [tokenizer.id_to_token(one) for one in ids(values.get("eos_token_id"))[:1]]
    known = content(settings.get("eos_token")), *ends
    return next((token for token in known if token and tokenizer.token_to_id(token) is not None), "")


def ids(value: int | list[int] | None) -> list[int]:
    """Of tokens, as a file names one, several or none."""
    return value if isinstance(value, list) else [] if value is None else [value]


def content(token) -> str:
    """A token as a settings file names it: by itself, or in an object."""
    return (token.get("content") if isinstance(token, Mapping) else token) or ""


def origin(cell: Path) -> dict:
    """What ORIGIN holds; empty for a model that was trained here from the start."""
    return find_json(cell / ORIGIN)


def write(cell: Path, target: Path, tokenizer: tokenizers.Tokenizer) -> str | None:
    """The tokenizer of a cell as `transformers` reads it, with what lies beside it. Returns what is to be said."""
    if isinstance(tokenizer, tokenizers.Symbols):
        return "the model goes without a tokenizer: its tokens are numbers of a probe"
    if isinstance(tokenizer, tokenizers.Bytes):
        _of_bytes(tokenizer).save(str(target / tokenizers.FILE))
    else:
        tokenizer.save(target)
    for name in COMPANIONS:
        if (cell / name).is_file():
            shutil.copyfile(cell / name, target / name)
    if not (target / SETTINGS).is_file():
        made = library.Tokenizer.from_file(str(target / tokenizers.FILE))
        end = {} if tokenizer.eos is None else {"eos_token": made.id_to_token(tokenizer.eos)}
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False} | end
        (target / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n")
    return None


def _of_bytes(tokenizer: tokenizers.Bytes) -> library.Tokenizer:
    """A byte-level tokenizer without merges: the ids of `tokenizers.Bytes`."""
    made = library.Tokenizer(models.BPE(vocab=_byte_ids(), merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<|endoftext|>", "<|pad|>"])
    return made


def _byte_ids() -> dict[str, int]:
    """The id of the letter that stands for each byte: printable ones for themselves, the others from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
