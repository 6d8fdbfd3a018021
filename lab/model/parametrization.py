"""How numbers of a model change with its size, so that those that were tuned at a base size stay the best.

Width, m = dim / base_dim (maximal update, arXiv 2203.03466, table 8), under optimizers that scale every entry of an
update as Adam does: matrices learn at the rate / m, and decay m times as much, which keeps rate x decay; they are drawn
with variance 1 / inputs under every parametrization. Embeddings are drawn as at the base, logits are multiplied by
1 / m, and scores by sqrt(base_head_dim) / head_dim instead of head_dim^-1/2. Embeddings, the head, gains and biases
learn at the rate. The widths inside a layer are meant to grow with dim: feed-forward, number of heads, ranks.

Depth, l = layers / base_layers: what sublayers give the stream is multiplied by 1 / l at the same rate (CompleteP,
arXiv 2505.01618), or by l^-1/2 as the rates of all parameters of layers are (arXiv 2310.02244). Output projections are
drawn as at base_layers. Adam's eps is left as it is.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from lab.errors import UserError
from lab.model import parameter
from lab.options import Option


class Parametrization(NamedTuple):
    """branch, rate: of l = layers / base_layers, what sublayers' outputs and the rates of layers are multiplied by."""

    options: Mapping[str, Option] = {}
    branch: Callable[[float], float] = lambda deeper: 1.0
    rate: Callable[[float], float] = lambda deeper: 1.0


WIDTH = {
    "base_dim": Option(0, "width at which rates were tuned; 0: the model's own", least=0),
    "base_head_dim": Option(0, "of a head there; 0: the model's own", least=0),
}
DEPTH = {"base_layers": Option(0, "layers at which rates were tuned; 0: the model's own", least=0)}
PARAMETRIZATIONS = {
    "standard": Parametrization(),
    "mup": Parametrization(WIDTH),
    "completep": Parametrization(WIDTH | DEPTH, branch=lambda deeper: 1 / deeper),
    "depth-mup": Parametrization(WIDTH | DEPTH, branch=lambda deeper: deeper**-0.5, rate=lambda deeper: deeper**-0.5),
}


STREAMS = ("plain", "parallel", "parallel-two")  # that add up what sublayers give them, and have no weights


def check(model) -> None:
    """Refuses streams for whose own weights and scores no parametrization says anything, and depth-aware forms beside
    what depends on the depth by itself."""
    name, stream = model.parametrization.name, model.stream.name
    if name != "standard" and stream not in STREAMS:
        raise UserError(
            f"model.parametrization.name = {name!r} says nothing of the weights of model.stream.name = {stream!r}; "
            f"choose 'standard', or one of the streams: {', '.join(STREAMS)}"
        )
    deep = [f"model.{part}.name" for part in ("placement", "init") if model[part].name == "deepnorm"]
    if "base_layers" in PARAMETRIZATIONS[name].options and deep:
        raise UserError(
            f"{' and '.join(deep)} = 'deepnorm' depends on model.layers by itself, and model.parametrization.name = "
            f"{name!r} would do so again; choose 'mup' or 'standard'"
        )


def wider(model) -> float:
    """m, the width in units of the base."""
    return _of_base(model, "base_dim", model.dim)


def deeper(model) -> float:
    """l, the number of layers in units of the base."""
    return _of_base(model, "base_layers", model.layers)


def _of_base(model, option: str, own: int) -> float:
    """A size in units of the base; one under a parametrization that does not read the option."""
    asked, read = model.parametrization, option in PARAMETRIZATIONS[model.parametrization.name].options
    return own / (asked[option] or own) if read else 1.0


def branch(model) -> float | None:
    """What the output of a sublayer is multiplied by; None: nothing."""
    return _unless_one(PARAMETRIZATIONS[model.parametrization.name].branch(deeper(model)))


def readout(model) -> float | None:
    """What logits are multiplied by; None: nothing."""
    return _unless_one(1 / wider(model))


def _unless_one(factor: float) -> float | None:
    return None if factor == 1 else factor


def as_drawn(spec):
    """The config of a layer by which its sublayers are made: output projections as at the base, and the scale of scores
    where none is set. The config itself under the standard parametrization, and at its base."""
    head_dim = spec.mixer.head_dim
    wider_head, layers = _of_base(spec, "base_head_dim", head_dim), spec.layers / deeper(spec)
    if wider_head == 1 and layers == spec.layers:
        return spec
    made = spec.copy_and_resolve_references()
    made.layers = round(layers)
    if wider_head != 1 and not made.mixer.softmax_scale:
        made.mixer.softmax_scale = (head_dim * wider_head) ** -0.5
    return made


def declare(transformer, model) -> None:
    """Declares the factors of rate and decay of every parameter, where one of them is not one."""
    m, rate = wider(model), PARAMETRIZATIONS[model.parametrization.name].rate(deeper(model))
    if m != 1 or rate != 1:
        parameter.declare_factors(transformer, (1 / m, m))
        parameter.declare_factors((transformer.blocks, transformer.added), (1 / m, m), rate)
