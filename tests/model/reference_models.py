"""Writes reference_models.npz: tiny models of `transformers`, random weights, and the logits that they give.

    python tests/model/reference_models.py        # with torch and transformers, which no test needs

For each family: "<family>/weights/<name of a tensor>", "<family>/tokens" [2, 9], "<family>/logits" [2, 9, 24], float32.
Two layers of width 16 with 4 heads of 4; 2 key heads where a family groups them. Made with transformers 5.24.0.
"""

import pathlib

import numpy as np

D, H, G, HD, F, C, L, T = 16, 4, 2, 4, 24, 24, 2, 9
COMMON = dict(vocab_size=C, hidden_size=D, intermediate_size=F, num_hidden_layers=L, num_attention_heads=H,
              max_position_embeddings=32, attn_implementation="eager")  # fmt: skip
GROUPED = COMMON | dict(num_key_value_heads=G, head_dim=HD)


def families() -> dict:
    """name -> a model, with its configuration."""
    import transformers as hf

    rope = lambda theta: dict(rope_parameters={"rope_type": "default", "rope_theta": theta})  # noqa: E731
    gpt2 = dict(vocab_size=C, n_embd=D, n_layer=L, n_head=H, n_positions=32, n_inner=F, attn_implementation="eager")
    neox = COMMON | dict(rope_parameters={"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5})
    gemma = GROUPED | rope(100.0) | dict(sliding_window=4, query_pre_attn_scalar=9, attn_logit_softcapping=5.0,
                                         final_logit_softcapping=3.0)  # fmt: skip
    t5 = dict(vocab_size=C, d_model=D, d_kv=HD, d_ff=F, num_layers=L, num_heads=H, is_decoder=True, use_cache=False,
              relative_attention_num_buckets=8, relative_attention_max_distance=8,
              is_encoder_decoder=False)  # fmt: skip
    return {
        "gpt2": hf.GPT2LMHeadModel(hf.GPT2Config(**gpt2)),
        "gpt-neox": hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**neox)),
        "llama": hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED, **rope(100.0))),
        "qwen2": hf.Qwen2ForCausalLM(hf.Qwen2Config(**GROUPED, **rope(100.0))),
        "qwen3": hf.Qwen3ForCausalLM(hf.Qwen3Config(**GROUPED, **rope(100.0))),
        "olmo2": hf.Olmo2ForCausalLM(hf.Olmo2Config(**GROUPED, **rope(100.0))),
        "gemma2": hf.Gemma2ForCausalLM(hf.Gemma2Config(**gemma)),
        "t5": hf.models.t5.modeling_t5.T5Stack(hf.T5Config(**t5)),
    }


def logits_of(name: str, model, tokens):
    """[B, T, C]; of T5, whose decoder is a stack without a head, its states times the embedding."""
    if name == "t5":
        return model(input_ids=tokens).last_hidden_state @ model.embed_tokens.weight.T
    return model(input_ids=tokens).logits


def main() -> None:
    import torch

    found = {}
    for name, model in families().items():
        rng = np.random.default_rng(sum(map(ord, name)))
        model = model.eval().float()
        for parameter in model.parameters():
            around = 1.0 if parameter.ndim == 1 and float(parameter.detach().mean()) == 1.0 else 0.0
            drawn = around + 0.4 * rng.normal(size=tuple(parameter.shape))
            parameter.data = torch.tensor(drawn, dtype=torch.float32)
        tokens = rng.integers(0, C, (2, T))
        with torch.no_grad():
            logits = logits_of(name, model, torch.tensor(tokens))
        unread = ("EncDec", ".1.layer_norm")  # of the attention to an encoder, which T5's stack has here, too
        kept = {key: weight for key, weight in model.named_parameters() if not any(part in key for part in unread)}
        found |= {f"{name}/weights/{key}": weight.detach().numpy() for key, weight in kept.items()}
        found |= {f"{name}/tokens": tokens.astype(np.int32), f"{name}/logits": logits.numpy()}
    np.savez_compressed(pathlib.Path(__file__).with_suffix(".npz"), **found)


if __name__ == "__main__":
    main()
