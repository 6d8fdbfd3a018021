"""Writes reference_checkpoints/: tiny models of `transformers`, random weights, and the logits that they give.

    python tests/exchange/reference_checkpoints.py            # with torch and transformers, which no test needs
    python tests/exchange/reference_checkpoints.py DIR ...    # prints, as JSON, how far logits of exports are off

For each row of MODELS a directory as `save_pretrained` writes it, with tokens.npy [2, T] and logits.npy [2, T, C],
float32; T is three windows where there is one. Made with transformers 5.24.0. The second form opens a directory with
`transformers` and compares what it gives for tokens.npy with the logits.npy that lies there; one of adapters, with
`peft` upon the model in base/. A chat.json says what the chat template makes of a message.
"""

import json
import pathlib
import shutil
import sys

import numpy as np

PLACE = pathlib.Path(__file__).with_name("reference_checkpoints")
C, D = 64, 16
COMMON = dict(vocab_size=C, hidden_size=D, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
              num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2)  # fmt: skip
GEMMA = COMMON | dict(num_hidden_layers=3, head_dim=8, query_pre_attn_scalar=12, attn_implementation="eager")
LLAMA3 = dict(rope_type="llama3", rope_theta=500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=16)  # fmt: skip


def plain(theta: float) -> dict:
    return dict(rope_parameters={"rope_type": "default", "rope_theta": theta})


# name: (class of the configuration, its values, tokens of a row, type of the weights, bytes of a file)
MODELS = {
    "llama2": ("Llama", COMMON | plain(100.0) | dict(num_key_value_heads=4), 24, "float32", None),
    "llama3": ("Llama", COMMON | plain(5e3) | dict(head_dim=6, rms_norm_eps=1e-5), 24, "bfloat16", 6000),
    "llama3.1-tied": ("Llama", COMMON | dict(rope_parameters=LLAMA3, tie_word_embeddings=True), 48, "float16", None),
    "llama-biased": ("Llama", COMMON | plain(1e4) | dict(attention_bias=True, mlp_bias=True), 24, "float32", None),
    "qwen2.5": ("Qwen2", COMMON | plain(1e6), 24, "float32", None),
    "qwen2-window": (
        "Qwen2",
        COMMON
        | plain(1e3)
        | dict(num_hidden_layers=3, use_sliding_window=True, sliding_window=8, max_window_layers=1)
        | dict(tie_word_embeddings=True),
        24,
        "float32",
        None,
    ),
    "qwen3": ("Qwen3", COMMON | plain(1e6) | dict(head_dim=6), 24, "bfloat16", None),
    "mistral-window": ("Mistral", COMMON | plain(1e4) | dict(sliding_window=8), 24, "float32", 8000),
    "mistral": ("Mistral", COMMON | plain(1e6) | dict(sliding_window=None, head_dim=8), 24, "float32", None),
    "gemma2": (
        "Gemma2",
        GEMMA | plain(1e4) | dict(sliding_window=8, attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
        24,
        "float32",
        None,
    ),
    "gemma2-long-window": ("Gemma2", GEMMA | plain(1e4) | dict(sliding_window=4096), 24, "bfloat16", None),
    "gemma3": (
        "Gemma3Text",
        GEMMA
        | dict(num_hidden_layers=4, sliding_window=6, head_dim=4, sliding_window_pattern=3)
        | dict(
            rope_parameters={
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            }
        ),
        18,
        "float32",
        None,
    ),
}


def drawn(model, rng) -> None:
    """Generic weights: around what they start at."""
    import torch

    for parameter in model.parameters():
        around = 1.0 if parameter.ndim == 1 and float(parameter.detach().float().mean()) == 1.0 else 0.0
        spread = 0.4 if parameter.ndim == 1 else 0.7 * parameter.shape[-1] ** -0.5
        numbers = around + spread * rng.normal(size=tuple(parameter.shape))
        parameter.data = torch.tensor(numbers, dtype=parameter.dtype)


def logits_of(place: pathlib.Path, tokens: np.ndarray) -> np.ndarray:
    """In float32, whatever the weights are kept in: rotary frequencies are never rounded."""
    import torch
    import transformers as hf

    adapters = (place / "adapter_config.json").is_file()
    base = place / "base" if adapters else place
    model = hf.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    if adapters:
        import peft

        model = peft.PeftModel.from_pretrained(model, place)
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor(tokens.astype(np.int64))).logits.numpy()


def write_tokenizer(place: pathlib.Path) -> None:
    """Words w0, w1, ...; three special tokens before them."""
    import tokenizers
    import transformers

    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, C)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = dict(unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special)
    fast.chat_template = "{% for message in messages %}<s> {{ message['content'] }} </s>{% endfor %}"
    fast.save_pretrained(place)


def make(name: str) -> None:
    import torch
    import transformers as hf

    kind, values, length, dtype, shard = MODELS[name]
    rng = np.random.default_rng(sum(map(ord, name)))
    causal = kind.replace("Text", "")
    made = getattr(hf, f"{kind}Config")(**values)
    model = getattr(hf, f"{causal}ForCausalLM")(made).to(getattr(torch, dtype))
    drawn(model, rng)
    place = PLACE / name
    shutil.rmtree(place, ignore_errors=True)
    model.save_pretrained(place, **({"max_shard_size": shard} if shard else {}))
    write_tokenizer(place)
    tokens = rng.integers(3, C, (2, length)).astype(np.int32)
    np.save(place / "tokens.npy", tokens)
    np.save(place / "logits.npy", logits_of(place, tokens))


def off(place: pathlib.Path) -> float:
    """The largest difference over the largest logit."""
    import transformers as hf

    tokenizer = hf.AutoTokenizer.from_pretrained(place / "base" if (place / "base").is_dir() else place)
    if (place / "chat.json").is_file():
        message, text, ids = json.loads((place / "chat.json").read_text())
        asked = dict(conversation=[{"role": "user", "content": message}], add_generation_prompt=True)
        assert tokenizer.apply_chat_template(**asked, tokenize=False) == text
        assert list(tokenizer.apply_chat_template(**asked, return_dict=False)) == ids
    expected = np.load(place / "logits.npy")
    return float(np.abs(logits_of(place, np.load(place / "tokens.npy")) - expected).max() / np.abs(expected).max())


if __name__ == "__main__":
    if sys.argv[1:]:
        print(json.dumps({place: off(pathlib.Path(place)) for place in sys.argv[1:]}))
    else:
        for name in MODELS:
            make(name)
