"""config.json of a family read as config.model, and written.

A model is written as a family if what is read back means the same: so nothing is exported that would be another model.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from lab.config import base
from lab.errors import UserError, choose, shown
from lab.exchange import kinds, rope
from lab.exchange.families import FAMILIES, FULL, NESTED, SLIDING, Family, Values
from lab.model import spec
from lab.options import leaves, set_field

DECLARED = spec.MODEL.declared()
# What a model was drawn by, and what it is computed in, are no part of what it is.
APART = ("layers", "pattern", "compute")
SOURCES = ("init.", "parametrization.base", "lora.")


def text_of(config: Mapping, file: Path) -> tuple[Family, dict]:
    """The family of config.json, and the part of it that describes the text model. Raises UserError for others."""
    names = [*FAMILIES, *NESTED]
    kinds.check(config, kinds.CONFIG, file)
    named = choose(f"{file}: model_type", config.get("model_type"), names)
    if named in NESTED:
        kinds.check({"text_config": config.get("text_config")}, {"text_config": kinds.OBJECT}, file)
        tied = {"tie_word_embeddings": config.get("tie_word_embeddings", True)}
        family, config = FAMILIES[NESTED[named]], tied | dict(config["text_config"])
        kinds.check(config, kinds.CONFIG, file, "text_config: ")
    else:
        family = FAMILIES[named]
        made_for = config.get("architectures") or [family.architecture]
        choose(f"{file}: architectures", made_for[0], [family.architecture])
    return family, dict(config)


def read(family: Family, config: Mapping, file: Path) -> ConfigDict:
    """config.model of a (text) config.json. Raises UserError for what the family does not have here, naming the key."""
    values = completed(family, config, file)
    model = base().model
    options = {option: value(values) if callable(value) else value for option, value in family.always.items()}
    for key, row in family.keys.items():
        if row.choices is None:
            options[row.option] = _converted(f"{file}: {key}", row, values[key])
        else:
            options[row.option] = row.choices[choose(f"{file}: {key}", values[key], row.choices)]
    layers = _layers(family, config, values, file)
    whole = layers[values["types"].index(FULL)] if FULL in values["types"] else layers[0]
    for option, value in (options | whole).items():
        set_field(model, option, value)
    model.pattern = tuple(shortest_period([_entry(layer, whole) for layer in layers]))
    try:
        spec.check(model)
    except UserError as error:
        named = [key for key, row in family.keys.items() if f"model.{row.option} " in str(error)]
        raise UserError(f"{file}: {''.join(f'{key}: ' for key in named)}{error}") from error
    return model


def completed(family: Family, config: Mapping, file: Path) -> dict:
    """The values of a config.json with the defaults of the family, and the type of every layer in `types`."""
    values = family.defaults | dict(config)
    for key, allowed in family.only.items():
        if values.get(key) not in allowed:
            raise UserError(f"{file}: {key} = {shown(values[key])} is not supported; only {_listed(allowed)}")
    kinds.check(values, kinds.CONFIG, file)
    if values["num_key_value_heads"] is None:
        values["num_key_value_heads"] = values["num_attention_heads"]
    if values["head_dim"] is None:
        values["head_dim"] = values["hidden_size"] // values["num_attention_heads"]
    kinds.check(values, kinds.CONFIG, file)  # a width that follows from others too
    values["types"] = _types(family, values, file)
    window = values["sliding_window"]
    if SLIDING in values["types"] and not window:
        raise UserError(f"{file}: sliding_window = {shown(window)} must be a whole number of at least 1")
    return values


def _types(family: Family, values: Values, file: Path) -> list[str]:
    """SLIDING or FULL for each layer."""
    given = values.get("layer_types") if family.names_types else None
    if given is None:
        return family.types(values)
    for one in given:
        choose(f"{file}: layer_types", one, (SLIDING, FULL))
    if len(given) != values["num_hidden_layers"]:
        raise UserError(f"{file}: layer_types has {len(given)} entries for {values['num_hidden_layers']} layers")
    if SLIDING in given and values.get("use_sliding_window") is False:
        raise UserError(f"{file}: layer_types has {SLIDING!r} beside use_sliding_window = False; choose one of both")
    return list(given)


def _converted(name: str, row, value):
    """The value of an option, checked by its declaration."""
    try:
        found = row.read(value)
    except (TypeError, ValueError, ArithmeticError):
        raise UserError(f"{name} = {shown(value)} is no {type(DECLARED[row.option].default).__name__}") from None
    DECLARED[row.option].check(name, found)
    return found


def _layers(family: Family, config: Mapping, values: Values, file: Path) -> list[dict]:
    """What differs by the type of a layer, of every layer: its rule and its rotation."""
    of_type = {
        FULL: {"rule": "causal"},
        SLIDING: {"rule": f"causal & window({values['sliding_window']})"},
    }
    for kind in set(values["types"]):
        of_type[kind] |= _rotation(family, config, values, kind, file)
    return [of_type[kind] for kind in values["types"]]


def _entry(layer: Mapping, whole: Mapping) -> tuple:
    """The entry of the pattern for a layer whose options are not those of the whole model. What a frequency map reads
    is not set beside another one."""
    unread = () if layer.get("position.scaling.name") else ("position.scaling.",)
    reset = {name for name in {*whole} - {*layer} if name.endswith(".name") or not name.startswith(unread)}
    found = {name: DECLARED[name].default for name in reset} | dict(layer)
    plain = {name: whole.get(name, DECLARED[name].default) for name in found}
    return tuple((name, found[name]) for name in sorted(found) if found[name] != plain[name])


def _rotation(family: Family, config: Mapping, values: Values, kind: str, file: Path) -> dict:
    """Options of the rotation of a layer."""
    said = dict(config) | {key: values[key] for key in ("max_position_embeddings", "head_dim")}
    if len(set(family.thetas.values())) > 1:  # older keys of the whole are those of one type of layer alone
        older = {FULL: ("rope_theta", said.get("rope_scaling")), SLIDING: ("rope_local_base_freq", None)}
        theta, scaling = older[kind]
        by_kind = said.get("rope_parameters") or {}
        for name in by_kind:
            choose(f"{file}: a key of rope_parameters", name, older)
        kinds.check(by_kind, dict.fromkeys(older, kinds.optional(kinds.OBJECT)), file, "rope_parameters: ")
        of_kind = {**(by_kind.get(kind) or {}), **(scaling or {})}
        of_kind.setdefault("rope_theta", said.get(theta) or family.thetas[kind])
        said |= {"rope_scaling": None, "rope_parameters": {kind: of_kind}}
    return rope.from_rope_parameters(said, kind, family.thetas[kind], str(file))


def shortest_period(entries: Sequence) -> list:
    """The first entries, as few as give all by repeating."""
    for period in range(1, len(entries) + 1):
        if all(entry == entries[m % period] for m, entry in enumerate(entries)):
            return list(entries[:period])
    return list(entries)


def write(model: ConfigDict, family: Family, kept: Mapping, positions: int) -> dict:
    """The config.json of the family that is nearest to config.model. kept: keys that it may take from the config.json
    that a model came from. positions: max_position_embeddings."""
    layers = meaning(model)
    config = {"architectures": [family.architecture], "model_type": family.model_type} | dict(kept)
    first = next((layer for layer in layers if window(layer["rule"]) is None), layers[0])
    for key, row in family.keys.items():
        value = len(layers) if row.option == "layers" else first.get(row.option)
        spelled = {option: name for name, option in (row.choices or {}).items()}
        if value is None or (row.choices and value not in spelled):
            config[key] = family.defaults[key]  # and what is read back is another model
        else:
            config[key] = spelled[value] if row.choices else row.write(value)
    config["max_position_embeddings"] = positions
    return config | _windows_written(family, layers) | _rotation_written(family, layers)


def _windows_written(family: Family, layers: Sequence[Mapping]) -> dict:
    windows = [window(layer["rule"]) for layer in layers]
    if "sliding_window" not in family.defaults or family.defaults["sliding_window"] is None:
        return {}
    widest = max((n for n in windows if n), default=None)
    if not family.names_types:
        return {"sliding_window": widest}
    found = {"layer_types": [SLIDING if n else FULL for n in windows]}
    if "use_sliding_window" in family.defaults:
        full = next((m for m, n in enumerate(windows) if n), len(windows))
        found |= {"use_sliding_window": widest is not None, "max_window_layers": full}
    return found | {"sliding_window": widest or family.defaults["sliding_window"]}


def _rotation_written(family: Family, layers: Sequence[Mapping]) -> dict:
    """In the spelling that older and newer versions of `transformers` read."""
    by_type = {SLIDING if window(layer["rule"]) else FULL: _parameters(layer) for layer in reversed(layers)}
    of_full = by_type.get(FULL) or by_type[SLIDING]
    theta, scaling = of_full.pop("rope_theta"), of_full
    found = {"rope_theta": theta, "rope_scaling": scaling or None}
    if len(set(family.thetas.values())) == 1:
        return found
    of_sliding = dict(by_type.get(SLIDING) or {"rope_theta": family.thetas[SLIDING]})
    local = of_sliding.pop("rope_theta", theta)
    if not of_sliding:
        return found | {"rope_local_base_freq": local}
    nested = {
        FULL: {"rope_type": "default", "rope_theta": theta} | scaling,
        SLIDING: of_sliding | {"rope_theta": local},
    }
    return {"rope_parameters": nested}


def _parameters(layer: Mapping) -> dict:
    """Of a layer, as `transformers` spells rope_parameters: theta and, if there is one, a frequency map."""
    found = {"rope_theta": layer.get("position.theta", 1e4)}
    if layer.get("position.scaling.name", "default") not in {*rope.KEYS} - {"default"}:
        return found  # and what is read back of another one is another model
    prefix = "position.scaling."
    for option, value in layer.items():
        if option.startswith(prefix) and (value or DECLARED[option].default):  # what is 0 follows from others
            key = option.removeprefix(prefix)
            found["rope_type" if key == "name" else key] = list(value) if isinstance(value, tuple) else value
    return found


def window(rule: str) -> int | None:
    """The window of a causal rule; None: there is none, or it is another rule."""
    terms = {term.strip(" ()") for term in rule.split("&")}
    found = [re.fullmatch(r"window\((\d+)", term) for term in terms - {"causal"}]
    return int(found[0][1]) if "causal" in terms and len(found) == 1 and found[0] else None


def meaning(model: ConfigDict) -> list[dict]:
    """What every layer is, {option: value}: two models of one meaning compute the same."""
    specs, read = spec.layer_specs(model), spec.read_by_layers(model)
    of_entries = [_meant(leaves(one) | rope.meant(one), fields) for one, fields in zip(specs, read, strict=True)]
    return [of_entries[m % len(specs)] for m in range(model.layers)]


def _meant(values: Mapping, read: set[str]) -> dict:
    """The options of a layer, those spelled alike that mean the same."""
    found = {name: values[name] for name in sorted(read) if name not in APART and not name.startswith(SOURCES)}
    if n := window(values["rule"]):
        found["rule"] = f"causal & window({n})"
    elif values["rule"].strip(" ()") == "causal":
        found["rule"] = "causal"
    found["mixer.softmax_scale"] = values["mixer.softmax_scale"] or values["mixer.head_dim"] ** -0.5
    if "mixer.v_head_dim" in found:
        found["mixer.v_head_dim"] = values["mixer.v_head_dim"] or values["mixer.head_dim"]
    if found.get("mixer.rotate") == "qk":
        found["mixer.rotate"] = "auto"
    kind, original = values["position.scaling.name"], rope.SCALING + rope.ORIGINAL
    if kind == "default":
        found = {name: x for name, x in found.items() if not name.startswith(rope.SCALING) or name.endswith(".name")}
    if original in found and rope.ORIGINAL in rope.KEYS.get(kind, ()):
        found[original] = found[original] or values["position.trained"]
    if "position.dim" in found:
        found["position.dim"] = values["position.dim"] or values["mixer.head_dim"]
    if found.get("position.ratio") == 0:  # then nothing says branches apart, and a text's index is its time
        found["position.unselected"] = "time"
        del found["position.stride"]
    unread = {"position.scaling.name": "default", "position.map.name": "none", "position.log_n": False}
    if all(found.get(name, plain) == plain for name, plain in unread.items()):  # then no length is read
        found.pop("position.trained", None)
        found.pop("position.length", None)
    return found


def differences(model: ConfigDict, other: ConfigDict) -> dict[str, tuple]:
    """{option: (value of the one, of the other)} where two models differ in meaning."""
    one, two = meaning(model), meaning(other)
    found = {} if len(one) == len(two) else {"layers": (len(one), len(two))}
    for left, right in zip(one, two, strict=False):
        for name in sorted({*left, *right}):
            if left.get(name) != right.get(name):
                found.setdefault(name, (left.get(name), right.get(name)))
    return found


def _listed(values: Sequence) -> str:
    return " or ".join(map(repr, values))
