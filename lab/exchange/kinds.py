"""What a key of a JSON file of Hugging Face's format may hold. It is read once by its kind, before anything uses it."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from lab.errors import UserError, shown
from lab.model.position_maps import LONGEST
from lab.options import LARGEST


class Kind(NamedTuple):
    """holds: whether a value of JSON is of it. words: what it is called, after "must be"."""

    holds: Callable[[object], bool]
    words: str


def whole(least: int, most: int = LARGEST) -> Kind:
    """A whole number in a range that includes both ends."""
    return Kind(
        lambda value: type(value) is int and least <= value <= most,
        f"a whole number of at least {least}" + (f" and at most {most}" if most < LARGEST else ""),
    )


def number(least: float | None = None, above: float | None = None, most: float = math.inf) -> Kind:
    """A finite number in a range."""

    def holds(value) -> bool:
        if type(value) not in (int, float) or not -1e300 < value < 1e300:
            return False
        return value <= most and (least is None or value >= least) and (above is None or value > above)

    words = "a number above " + str(above) if least is None else f"a number of at least {least}"
    return Kind(holds, words + (f" and at most {most}" if most < math.inf else ""))


def each(kind: Kind, words: str) -> Kind:
    """A list of such."""
    return Kind(lambda value: isinstance(value, list | tuple) and all(map(kind.holds, value)), f"a list of {words}")


def either(*kinds: Kind) -> Kind:
    """One of several."""
    return Kind(lambda value: any(kind.holds(value) for kind in kinds), " or ".join(kind.words for kind in kinds))


TRUTH = Kind(lambda value: isinstance(value, bool), "a truth value")
WORD = Kind(lambda value: isinstance(value, str), "a text")
OBJECT = Kind(lambda value: isinstance(value, Mapping), "an object")
NULL = Kind(lambda value: value is None, "null")
TOKEN = either(WORD, Kind(lambda value: OBJECT.holds(value) and WORD.holds(value.get("content")), "an object with one"))
IDS = either(whole(0), each(whole(0), "such"), NULL)
POSITIVE = number(above=0)


def optional(kind: Kind) -> Kind:
    """It may be null: what that means, the reader says."""
    return either(kind, NULL)


SIZE = whole(1, 2**24)
CONFIG = {  # of config.json; null of a truth value is false, as Python takes it
    "model_type": WORD,
    "architectures": optional(each(WORD, "texts")),
    "hidden_size": SIZE,
    "num_hidden_layers": whole(1, 2**14),
    "vocab_size": SIZE,
    "intermediate_size": SIZE,
    "num_attention_heads": SIZE,
    "num_key_value_heads": optional(SIZE),
    "head_dim": optional(whole(1, 2**16)),
    "max_position_embeddings": whole(1, LONGEST),
    "original_max_position_embeddings": optional(whole(2, LONGEST)),
    "rms_norm_eps": POSITIVE,
    **dict.fromkeys(("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window"), optional(TRUTH)),
    **dict.fromkeys(("hidden_act", "hidden_activation"), WORD),
    "layer_types": optional(each(WORD, "texts")),
    "sliding_window": optional(whole(0)),
    "max_window_layers": whole(0),
    "sliding_window_pattern": whole(1),
    "query_pre_attn_scalar": POSITIVE,
    **dict.fromkeys(("final_logit_softcapping", "attn_logit_softcapping"), optional(number(least=0))),
    **dict.fromkeys(("rope_theta", "rope_local_base_freq"), optional(POSITIVE)),
    "partial_rotary_factor": optional(number(above=0, most=1)),
    **dict.fromkeys(("rope_parameters", "rope_scaling"), optional(OBJECT)),
    "bos_token_id": optional(whole(0)),
    "eos_token_id": IDS,
    "pad_token_id": optional(whole(-LARGEST)),
}
ROPE = {  # of rope parameters; null is as if it were not there
    "rope_type": WORD,
    "type": WORD,
    "rope_theta": POSITIVE,
    "partial_rotary_factor": number(above=0, most=1),
    "factor": POSITIVE,
    "original_max_position_embeddings": whole(2, LONGEST),
    "attention_factor": POSITIVE,
    **dict.fromkeys(("beta_fast", "beta_slow", "mscale", "mscale_all_dim"), number(least=0)),
    "truncate": TRUTH,
    **dict.fromkeys(("short_factor", "long_factor"), each(POSITIVE, "numbers above 0")),
    **dict.fromkeys(("low_freq_factor", "high_freq_factor"), POSITIVE),
}
SETTINGS = {  # of tokenizer_config.json
    **dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), optional(TOKEN)),
    "add_bos_token": optional(TRUTH),
    "chat_template": optional(either(WORD, each(OBJECT, "objects"))),
}
GENERATION = {"bos_token_id": IDS, "eos_token_id": IDS, "pad_token_id": optional(whole(-LARGEST))}


def check(values: Mapping, kinds: Mapping[str, Kind], file: Path | str, at: str = "") -> None:
    """Raises UserError for a value that is not of the kind of its key, naming both. at: where in the file they are."""
    for key, kind in kinds.items():
        if key in values and not kind.holds(values[key]):
            raise UserError(f"{file}: {at}{key} = {shown(values[key])} must be {kind.words}")
