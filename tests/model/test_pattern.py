"""A layer of the pattern may set all that a part of a layer reads."""

import pytest
import tiny
import variants

from lab import model as lab_model
from lab.model import spec
from lab.model.extrapolation import FREQUENCY_MAPS
from lab.model.position_maps import POSITION_MAPS
from lab.options import leaves

VALUES = {  # another than the default, by type, where the declaration names no choices
    bool: True, "rule": "causal & window(2)", "mixer.heads": 8, "mixer.kv_heads": 4, "mixer.head_dim": 16,
    "mixer.v_head_dim": 10, "mixer.q_rank": 3, "mixer.o_rank": 5, "mixer.rotate": "q", "mixer.softmax_scale": 0.3,
    "mixer.softcap": 2.0, "mixer.latent": 6, "feedforward.width": 20, "norm.eps": 0.1, "position.theta": 7.0,
    "position.dim": 6, "position.ratio": 0.3, "position.stride": 2, "position.share": 0.5, "position.length": 40,
    "position.branches": 9, "mixer.qk_norm_over": "heads", "position.buckets": 16, "position.distance": 200,
    "position.clip": 3, "branch.start": 0.2, "position.trained": 8, "position.temperature": 0.5,
    "position.temperature_step": 4,
    "position.scaling.factor": 3.0, "position.scaling.attention_factor": 1.5, "position.scaling.beta_fast": 20.0,
    "position.scaling.original_max_position_embeddings": 4, "position.scaling.beta_slow": 2.0,
    "position.scaling.mscale": 0.7, "position.scaling.mscale_all_dim": 0.4, "position.scaling.low_freq_factor": 2.0,
    "position.scaling.short_factor": (2.0,) * 4, "position.scaling.long_factor": (3.0,) * 4,
    "position.scaling.high_freq_factor": 8.0, "position.scaling.partial_rotary_factor": 0.5, "position.map.window": 16,
    "position.map.sinks": 2, "position.map.cf": 1.5, "position.map.leak": 4.0, "position.map.group": 4,
    "position.map.chunk": 5, "position.map.local": 2,
}  # fmt: skip
ALREADY = {"mixer.latent_norm": False, "position.shared": False, "position.scaling.truncate": False}
OF_METHODS = {"position.scaling": FREQUENCY_MAPS, "position.map": POSITION_MAPS}
STRETCHED = {  # what some method needs beside its own option
    "position.unselected": "time", "position.ratio": 0.0, "position.trained": 16, "position.length": 32,
}  # fmt: skip


def reading(field: str) -> dict:
    """A model that has an option of a layer in use."""
    if field in ("mixer.latent", "mixer.latent_norm"):
        return variants.mixer("mla")
    if field == "position.clip":
        return dict(model__position__name="shaw")
    if field == "position.temperature_step":
        return dict(model__position__temperature=0.5)
    if field.startswith(tuple(OF_METHODS)) or field == "position.log_n":
        made = {f"model.{name}": value for name, value in STRETCHED.items()}
        if not field.startswith("position.scaling.") or field.endswith("partial_rotary_factor"):
            del made["model.position.length"]
        if field.startswith("position.scaling.mscale"):
            made |= {f"model.position.scaling.{one}": 0.3 for one in ("mscale", "mscale_all_dim")}
        for place, table in OF_METHODS.items():
            entry = [name for name, row in table.items() if field.removeprefix(f"{place}.") in row.options]
            if entry:
                made[f"model.{place}.name"] = entry[0]
            if entry and entry[0] == "longrope":
                made |= {f"model.{place}.{one}_factor": (1.5,) * 4 for one in ("short", "long")}
        return {name.replace(".", "__"): value for name, value in made.items()}
    if field == "mixer.qk_norm_over":
        return dict(model__mixer__qk_norm=True)
    if field in ("position.buckets", "position.distance", "position.shared"):
        return dict(model__position__name="t5", model__position__shared=field == "position.shared")
    return dict(model__branch__name="layer-scale") if field == "branch.start" else {}


@pytest.mark.parametrize("field", spec.OF_LAYERS)
def test_an_entry_of_the_pattern_may_set_every_option_of_a_layer(field):
    """What the entry sets is what its layers are, and the others stay what they were."""
    option = (spec.MODEL.declared() | spec.OWN)[field]
    base = tiny.config(**reading(field)).model
    default = leaves(base)[field]
    others = [c for c in option.choices or () if c != default]
    entry = [(field, {**VALUES, **ALREADY}.get(field, others[0] if others else VALUES.get(type(default))))]
    if field == "mixer.name":
        entry = [("mixer.name", "delta"), ("rule", "causal")]
    if field in ("position.length", "position.branches"):  # all layers read one embedding
        entry = [("position.name", "learned" if field == "position.length" else "learned-branch"), *entry]
    if entry[0][1] is None:
        assert len(option.choices) == 1  # the only one there is
        entry = [(field, default)]
    base.pattern = ((), tuple(entry))
    specs = spec.layer_specs(base)
    for name, value in entry:
        assert leaves(specs[1])[name] == value
    assert leaves(specs[0]) == leaves(base)
    made = lab_model.abstract(base)
    assert len(made.blocks) == 2
