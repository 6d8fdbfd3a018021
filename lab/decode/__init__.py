"""Decoding: tokens drawn from logits (sampling), requests that share a cache (engine), lists of prompts (generate), and
the text of what is generated (text)."""
