"""Continuations of a list of prompts, as tokens."""

from collections.abc import Iterable, Sequence

from lab.decode.engine import Engine
from lab.decode.forest import PAGE, needed_for
from lab.decode.sampling import Sampling


def generate(
    model,
    prompts: Sequence[Sequence[int]],
    *,
    most_tokens: int,
    sampling: Sampling = Sampling(),  # noqa: B008  a value that nobody can change
    stop: Iterable[int] = (),
    branches: int = 0,
    rows: int = 8,
    chunk: int = 64,
) -> list[list[int]] | list[list[list[int]]]:
    """What `model` generates after each prompt, at most so many tokens, without the one of `stop` that ends it.

    branches: 0 for one text; n for n branches that go on from the prompt side by side, each at most so many tokens:
    a list of n texts for each prompt. rows: prompts that are decoded at once. chunk: tokens of a prompt taken at once.
    What is drawn for prompt i depends on (sampling.seed, i, branch, step) and its logits. Raises UserError for a prompt
    that is empty or longer than the model can read.
    """
    stop, n = frozenset(stop), max(branches, 1)
    longest = max(map(len, prompts), default=1)
    length = needed_for(longest, [0] * branches, most_tokens, max(chunk, PAGE))
    engine = Engine(model, rows=max(1, min(rows, len(prompts))), length=length, branches=n, chunk=chunk)
    for prompt in prompts:
        engine.submit(prompt, branches=branches, sampling=sampling, stop=stop, most_tokens=most_tokens)
    texts = [[[] for _ in range(n)] for _ in prompts]
    while engine.busy:
        for event in engine.step():
            if event.token is not None:
                texts[event.request][event.branch - 1].append(event.token)
    return texts if branches else [alone for (alone,) in texts]
