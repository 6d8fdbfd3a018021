"""What config.json of Hugging Face's format says of rotation, as options of config.model.position; and which of these
options say the same.
"""

import logging
from collections.abc import Mapping
from typing import Any

from lab.errors import UserError, choose
from lab.exchange import kinds
from lab.model import extrapolation, position

SCALING = "position.scaling."
ORIGINAL = "original_max_position_embeddings"
EVERYWHERE = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
YARN = ("factor", ORIGINAL, "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
KEYS = {  # rope_type -> what it reads beside EVERYWHERE, spelled as our options are
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": YARN,
    "longrope": ("factor", ORIGINAL, "attention_factor", "short_factor", "long_factor"),
    "llama3": ("factor", ORIGINAL, "low_freq_factor", "high_freq_factor"),
    "proportional": ("factor",),
}
NEEDED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
OLDER = {"su": "longrope"}  # as Phi-3 spelled it at first
DERIVED = ("yarn", "longrope")  # whose missing factor is max_position_embeddings over the original one
ZERO_IS_ABSENT = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim")


def from_rope_parameters(
    config: Mapping, layer_type: str, theta: float, file: str = "config.json", partial: bool = False
) -> dict[str, Any]:
    """{option: value} for the layers of a type, of a config.json with max_position_embeddings and head_dim.

    Reads rope_parameters, flat or for each type of layer, and the older rope_scaling with its "type". theta: the base
    where config.json has none. partial: whether a part of a head may rotate; `transformers` takes the first dimensions,
    and we the last. Raises UserError, naming the file, for a type, a key or a value that is not supported.
    """
    kinds.check(config, kinds.CONFIG, file)
    whole = config.get("rope_scaling") or config.get("rope_parameters") or {}
    given, nested = of_layer_type(whole, layer_type, file)
    if given is None:
        return {"position.name": "none"}
    given = {key: value for key, value in given.items() if value is not None}
    kind = rope_type(given, file)
    check_keys(given, kind, file)
    of_head, length = config["head_dim"], config["max_position_embeddings"]
    found = {
        "position.theta": float(given.get("rope_theta") or config.get("rope_theta") or theta),
        "position.unselected": "time",
        "position.trained": length,
    }
    share = float(given.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0)
    if kind == "default":
        if share != 1:  # as the default type of Llama and most others does
            logging.warning("%s: partial_rotary_factor = %s is not read by rope_type = 'default'", file, share)
        return found
    found[f"{SCALING}name"] = kind
    if kind == "proportional":
        found[f"{SCALING}partial_rotary_factor"] = share
    elif share != 1:
        found["position.dim"] = rotary_dim(share, of_head, partial, file)
    if ORIGINAL in KEYS[kind]:
        if not nested and config.get(ORIGINAL) is not None:  # there it stands above the one beside the type
            given[ORIGINAL] = config[ORIGINAL]
        given.setdefault(ORIGINAL, length)
    if kind in DERIVED:
        given.setdefault("factor", length / given[ORIGINAL])
    if kind == "yarn" and nested:
        given["truncate"] = truncates(given, whole, layer_type, file)
    return found | scaling(given, kind)


def of_layer_type(whole: Mapping, layer_type: str, file: str) -> tuple[Mapping | None, bool]:
    """(what is said of the layers of a type, None if they do not rotate; whether it is said for each type)"""
    if layer_type not in whole and not any(isinstance(value, Mapping) for value in whole.values()):
        return whole, False
    choose(f"{file}: a type of layers in rope_parameters", layer_type, [*whole])
    kinds.check(whole, {layer_type: kinds.optional(kinds.OBJECT)}, file, "rope parameters of ")
    return whole[layer_type], True


def rope_type(given: Mapping, file: str) -> str:
    """Its name among KEYS. Raises UserError for values that its keys cannot have."""
    kinds.check(given, kinds.ROPE, file, "rope parameters: ")
    named = {OLDER.get(given[key], given[key]) for key in ("rope_type", "type") if key in given}
    if len(named) > 1:
        raise UserError(
            f"{file}: rope_type = {given['rope_type']!r} beside type = {given['type']!r}; choose one of both"
        )
    return choose(f"{file}: rope_type", next(iter(named), "default"), KEYS)


def check_keys(given: Mapping, kind: str, file: str) -> None:
    """Refuses keys that `transformers` would warn of, and the lack of those that it needs."""
    for key in given:
        choose(f"{file}: a key of rope parameters of type {kind!r}", key, (*EVERYWHERE, *KEYS[kind]))
    for key in NEEDED.get(kind, ()):
        if key not in given:
            raise UserError(f"{file}: rope parameters of type {kind!r} lack {key}")


def rotary_dim(share: float, of_head: int, partial: bool, file: str) -> int:
    """Of a head of that many."""
    found = int(of_head * share)
    if not partial or found < 2 or found % 2:
        raise UserError(
            f"{file}: partial_rotary_factor = {share} rotates the first {found} of {of_head} dimensions of a head, "
            "which is not supported; only 1"
        )
    return found


def truncates(given: Mapping, whole: Mapping, layer_type: str, file: str) -> bool:
    """Where types of layers have parameters of their own, `transformers` reads `truncate` beside the types alone."""
    kinds.check(whole, {"truncate": kinds.TRUTH}, file, "rope parameters: ")
    beside = whole.get("truncate", True)
    found = given.get("truncate", beside)
    if found != beside:
        logging.warning(
            "%s: truncate = %s of %s is honoured here; `transformers` does not read it there", file, found, layer_type
        )
    return found


def scaling(given: Mapping, kind: str) -> dict[str, Any]:
    """The options of a frequency map, but for those that it does not read beside others, as `transformers` does not."""
    row = extrapolation.FREQUENCY_MAPS[kind]
    found = {}
    for key in KEYS[kind]:
        value = given.get(key)
        if value is None or (key in ZERO_IS_ABSENT and value == 0):
            continue
        if isinstance(value, list | tuple):
            value = tuple(map(float, value))
        elif key not in ("truncate", ORIGINAL):
            value = float(value)
        found[SCALING + key] = value
    unread = row.idle({SCALING + name: option.default for name, option in row.options.items()} | found)
    return {name: value for name, value in found.items() if name not in unread}


def meant(layer) -> dict[str, Any]:
    """{option: value} of the rotation of a layer whose frequency map or length is spelled otherwise than config.json
    can spell it, and means the same: a factor that follows from the length, frequencies of another base, lists."""
    R, chosen = position.rotary_dim(layer), layer.position
    name = chosen.scaling.name if R and chosen.map.name == "none" and chosen.table == "own" else "default"
    if name == "default":
        return {}
    found: dict[str, Any] = {"position.length": 0}
    if name == "ntk" or (name == "dynamic" and chosen.length):  # frequencies b^(-2i/R) of another b
        inverse, _ = extrapolation.frequencies(R, chosen)
        return found | {f"{SCALING}name": "default", "position.theta": float(inverse[1]) ** (-R / 2)}
    if name == "longrope" and chosen.length:
        which = "long" if chosen.length > extrapolation.original(chosen) else "short"
        found |= {f"{SCALING}{one}_factor": chosen.scaling[f"{which}_factor"] for one in ("short", "long")}
    if name == "linear":
        found[SCALING + ORIGINAL] = 0  # a factor says it
    derives = extrapolation.FREQUENCY_MAPS[name].derives
    s = extrapolation.stretch(chosen, chosen.length) if derives else chosen.scaling.factor or 1.0
    return found | {f"{SCALING}factor": float(s)}
