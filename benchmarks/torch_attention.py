"""PyTorch's attention, as a process that benchmarks/attention.py asks for one run at a time: `flex` and `sdpa`.

It reads a line of JSON for each run: {"rule", "coordinates": path of an npz, "heads", "width", "peer", "pass"}, and
answers with {"seconds"} or {"error"}. Of PyTorch alone, so that any interpreter that has it will do.
"""

import json
import os
import sys
import time

import numpy as np
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
FIELDS = ("segment", "branch", "time", "index")
RULES = {
    "causal": lambda q, k: k["index"] <= q["index"],
    "all_branches": lambda q, k: (k["time"] < q["time"]) | (k["index"] == q["index"]),
    "own_branch": lambda q, k: ((k["branch"] == 0) | (k["branch"] == q["branch"])) & (k["time"] <= q["time"]),
}


def visible(rule: str, q: dict, k: dict):
    """Who sees whom, of coordinates that broadcast against each other."""
    seen = (q["segment"] == k["segment"]) & (q["segment"] >= 0)
    for part in rule.split(" & "):
        if part.startswith("window("):
            seen = seen & (q["time"] - k["time"] < int(part[7:-1]))
        else:
            seen = seen & RULES[part](q, k)
    return seen


def check_memory(T: int) -> None:
    """Raises MemoryError where a mask of T x T, as booleans and as numbers, leaves too little."""
    most = (
        torch.cuda.mem_get_info()[0] if DEVICE == "cuda" else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    )
    if (1 + DTYPE.itemsize) * T**2 > 0.5 * most:
        raise MemoryError(f"its mask takes {(1 + DTYPE.itemsize) * T**2 / 2**30:.0f} GiB")


def attention(request: dict):
    """(q, k, v) [1, H, T, D] -> o, as the peer does it."""
    loaded = np.load(request["coordinates"])
    at = {name: torch.tensor(loaded[name], device=DEVICE) for name in FIELDS}
    T = len(at["index"])
    if request["peer"] == "sdpa":
        check_memory(T)
        mask = visible(request["rule"], *({n: x[at_] for n, x in at.items()} for at_ in (np.s_[:, None], np.s_[None])))
        return lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    one = lambda i: {name: x[i] for name, x in at.items()}  # noqa: E731
    blocks = create_block_mask(lambda b, h, q, k: visible(request["rule"], one(q), one(k)), 1, 1, T, T, device=DEVICE)
    compiled = torch.compile(flex_attention)
    return lambda q, k, v: compiled(q, k, v, block_mask=blocks)


def passes(request: dict):
    """A function that makes one forward pass, or one of both."""
    T = len(np.load(request["coordinates"])["index"])
    shape = (1, request["heads"], T, request["width"])
    both = request["pass"] == "both"
    q, k, v, weight = (torch.randn(shape, device=DEVICE, dtype=DTYPE, requires_grad=both and i < 3) for i in range(4))
    attend = attention(request)

    def run() -> None:
        o = attend(q, k, v)
        if both:
            torch.autograd.grad(o, (q, k, v), weight)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    return run


def main() -> None:
    made = {}
    for line in sys.stdin:
        request, answer = json.loads(line), {}
        try:
            if line not in made:
                made = {
                    key: run for key, run in made.items() if json.loads(key)["coordinates"] == request["coordinates"]
                }
                made[line] = passes(request)
                made[line]()  # compiles
            start = time.perf_counter()
            made[line]()
            answer["seconds"] = time.perf_counter() - start
        except Exception as error:  # what a peer cannot do is part of the table
            answer["error"] = f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:120]}"
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
