"""The turns of `transformers` in benchmarks/decode.py: `generate` for a batch of rows, each with its own prompt.

It runs under a Python that has torch and transformers, and reads nothing of the lab.
"""

import itertools
import time

import peers
import torch
import transformers

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


class Times(transformers.StoppingCriteria):
    """When each token came; stops nothing."""

    def __init__(self):
        self.at: list[float] = []

    def __call__(self, ids, scores, **_):
        synchronize()
        self.at.append(time.perf_counter())
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


class Decoder:
    def open(self, place: str) -> dict:
        self.model = transformers.AutoModelForCausalLM.from_pretrained(place, dtype=DTYPE).to(DEVICE).eval()
        return {"torch": torch.__version__, "transformers": transformers.__version__}

    def prepare(self, prompt: list[int], texts: list[list[int]]) -> None:
        self.cache = self.ids = None  # frees them first
        self.prompt, self.begun = torch.tensor([prompt], device=DEVICE), torch.tensor(texts, device=DEVICE)
        self.generate(self.prompt[:, :2], None, 2)

    def generate(self, ids, cache, tokens: int) -> tuple:
        """(ids with so many more tokens, when each came)."""
        times, end = Times(), ids.shape[1] + tokens
        given = dict(cache=cache) if cache is not None else {}
        ids = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_length=end, min_length=end,
            stopping_criteria=[times], pad_token_id=0, eos_token_id=None, **given,
        )  # fmt: skip
        return ids, times.at

    def first(self) -> float:
        """Seconds from when the prompts come, one for each row, to when every row has its first token."""
        prompts = self.prompt.expand(len(self.begun), -1)
        start = time.perf_counter()
        return self.generate(prompts, None, 1)[1][0] - start

    @torch.no_grad()
    def fill(self) -> None:
        """Reads the prompt once, and the texts behind copies of it."""
        rows = len(self.begun)
        self.cache = transformers.DynamicCache(config=self.model.config)
        self.model(self.prompt, cache=self.cache, logits_to_keep=1)
        self.cache.batch_repeat_interleave(rows)
        if self.begun.shape[1] > 1:
            self.model(self.begun[:, :-1], cache=self.cache, logits_to_keep=1)
        self.ids = torch.cat([self.prompt.expand(rows, -1), self.begun], dim=1)
        self.given = self.ids.shape[1]
        self.steps(1)
        peers.forget_peak()

    def steps(self, count: int) -> list[float]:
        """Seconds of each of so many steps: of a call, all but the first, which begins it."""
        self.ids, at = self.generate(self.ids, self.cache, count + 1)
        return [later - earlier for earlier, later in itertools.pairwise(at)]

    def close(self) -> dict:
        """What it took, and what the first row has generated."""
        cache = sum(x.nbytes for layer in self.cache.layers for x in (layer.keys, layer.values))
        tokens = self.ids[0, self.given :].tolist()
        return {"cache": cache, "resident": peers.peak(), "tokens": tokens}


if __name__ == "__main__":
    of = Decoder()
    peers.answer({name: getattr(of, name) for name in ("open", "prepare", "first", "fill", "steps", "close")})
