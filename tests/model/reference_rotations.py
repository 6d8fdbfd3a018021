"""Writes reference_rotations.json: inverse frequencies and attention factors that `transformers` computes.

    python tests/model/reference_rotations.py        # with torch and transformers, which no test needs

A list of {config, layer_type, length, inverse, factor}: config as config.json has it, length of the row (None: not
given), float32 numbers. For every rope type 20 random settings of the keys that it knows, in the new spelling, the old
one, and for each type of layer. Made with transformers 5.24.0.
"""

import json
import pathlib

import numpy as np

SETTINGS = 20
TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional")


def some(rng, **choices) -> dict:
    """Of keys, about half, each with a random choice of its values."""
    return {key: values[rng.integers(len(values))] for key, values in choices.items() if rng.random() < 0.5}


def drawn(kind: str, rng) -> tuple[dict, dict]:
    """(config.json without its rope parameters, those parameters)"""
    head, length = int(rng.choice([16, 32, 64])), int(rng.choice([256, 2048, 32768]))
    original = max(64, length // int(rng.choice([1, 2, 4, 8])))
    theta = float(rng.choice([1e4, 5e5, 1e6]))
    config = {"head_dim": head, "max_position_embeddings": length, "rope_theta": theta}
    factor = float(rng.choice([1.0, 1.5, 2.0, 4.0, 8.0, 32.0]))
    given = {"rope_type": kind}
    if kind != "default":
        given["factor"] = factor
        given |= some(rng, partial_rotary_factor=[0.25, 0.5, 0.75])
    share = given.get("partial_rotary_factor", 1.0)
    if kind == "yarn":
        given |= some(rng, attention_factor=[0.7, 1.2], mscale=[0.707, 1.0, 0.0], mscale_all_dim=[0.4, 1.0],
                      beta_fast=[16.0, 48, 0], beta_slow=[0.5, 2.0], truncate=[True, False],
                      original_max_position_embeddings=[original])  # fmt: skip
        if rng.random() < 0.3:
            given["factor"] = None
    if kind == "longrope":
        pairs = int(head * share) // 2
        given |= {f"{n}_factor": (1 + 5 * rng.random(pairs)).round(3).tolist() for n in ("short", "long")}
        given |= some(rng, attention_factor=[1.1, 0.9], original_max_position_embeddings=[original])
        if rng.random() < 0.5:
            del given["factor"]
    if kind == "llama3":
        low = float(rng.choice([1.0, 2.0]))
        given |= {"low_freq_factor": low, "high_freq_factor": low * float(rng.choice([2, 4]))}
        given["original_max_position_embeddings"] = original
    if kind == "proportional" and rng.random() < 0.5:
        del given["factor"]
    if rng.random() < 0.3:
        given["rope_theta"] = 2 * theta
    return config, given


def computed(config: dict, layer_type: str, length: int | None) -> tuple[list[float], float]:
    """By the function of its type, of a model whose layers are as config.json says."""
    import torch
    import transformers as hf
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    shape = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 8}
    nested = any(isinstance(value, dict) for value in (config.get("rope_parameters") or {}).values())
    made = hf.LlamaConfig(**shape, **json.loads(json.dumps(config)))
    if nested:
        made.layer_types = ["full_attention", "sliding_attention"]
        made.rope_parameters = json.loads(json.dumps(config["rope_parameters"]))
        made.standardize_rope_params()
    parameters = made.rope_parameters[layer_type] if nested else made.rope_parameters
    parameters["rope_theta"] = parameters.get("rope_theta") or config["rope_theta"]
    if parameters["rope_type"] == "default":
        inverse, factor = LlamaRotaryEmbedding.compute_default_rope_parameters(made)
    else:
        function = ROPE_INIT_FUNCTIONS[parameters["rope_type"]]
        inverse, factor = function(made, torch.device("cpu"), length, **({"layer_type": layer_type} if nested else {}))
    return inverse.numpy().astype(np.float32).tolist(), float(factor)


def main() -> None:
    found = []
    for kind in TYPES:
        rng = np.random.default_rng(sum(map(ord, kind)))
        for i in range(SETTINGS):
            config, given = drawn(kind, rng)
            layer_type = "full_attention"
            if i % 4 == 1:  # as it was spelled at first
                config["rope_scaling"] = given | {"type": given["rope_type"]}
                del config["rope_scaling"]["rope_type"]
            elif i % 4 == 2 and kind not in ("default", "yarn"):  # default has no function that reads a type of layers
                layer_type = "sliding_attention"
                config["rope_parameters"] = {"full_attention": {"rope_type": "default"}, layer_type: given}
            else:
                config["rope_parameters"] = given
            if i % 4 == 3 and kind in ("yarn", "longrope", "llama3"):
                config["original_max_position_embeddings"] = config["max_position_embeddings"] // 2
            lengths = (None, 3 * config["max_position_embeddings"]) if kind in ("dynamic", "longrope") else (None,)
            for length in lengths:
                inverse, factor = computed(config, layer_type, length)
                found.append(dict(config=config, layer_type=layer_type, length=length, inverse=inverse, factor=factor))
    rows = ",\n".join(json.dumps(one) for one in found)
    pathlib.Path(__file__).with_suffix(".json").write_text(f"[\n{rows}\n]\n")


if __name__ == "__main__":
    main()
