"""Parallel blocks: attention and feed-forward read the same stream, and both are added to it."""

from lab.model import mesh
from lab.model.streams.stream import Stream


class Parallel(Stream):
    """x + f1(n(x)) + f2(n(x)) with one norm (GPT-J; PaLM, arXiv 2204.02311, section 2); sandwiched, each output has
    its own. A norm before the sublayers is what they share, so there is no other placement."""

    placements = ("pre", "sandwich")
    shares_norm = True

    def layer(self, x_BTD, block, view, cache, *, m):
        normed_BTD = block.mixer_placement.before(x_BTD)
        mixed_BTD, cache = block.mixer(normed_BTD, view, cache)
        return x_BTD + mesh.constrain(block.mixed(mixed_BTD)) + block.feed(normed_BTD), cache


class ParallelTwoNorms(Stream):
    """x + f1(n1(x)) + f2(n2(x)) (GPT-NeoX-20B, arXiv 2204.06745, section 2.1)."""

    placements = ("pre", "sandwich")

    def layer(self, x_BTD, block, view, cache, *, m):
        mixed_BTD, cache = block.mix(x_BTD, view, cache)
        return x_BTD + mixed_BTD + block.feed(x_BTD), cache
