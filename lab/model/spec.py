"""What config.model may say: its own options, and the parts that a layer has one of."""

import re

from lab.errors import UserError, choose
from lab.kernels import rules
from lab.model import lora, norm, parametrization, position, streams, stretched
from lab.model.branch import BRANCHES
from lab.model.extrapolation import FREQUENCY_MAPS
from lab.model.feedforward import FEEDFORWARDS
from lab.model.init import INITIALISERS
from lab.model.mixers import MIXERS
from lab.model.norm import NORMS
from lab.model.parametrization import PARAMETRIZATIONS
from lab.model.placement import PLACEMENTS
from lab.model.position import POSITIONS
from lab.model.position_maps import POSITION_MAPS
from lab.model.streams import STREAMS
from lab.options import Option, Part, Room, leaves, set_field

OWN = {
    "dim": Option(96, "width of the residual stream", least=1),
    "layers": Option(3, "layers", least=1),
    "vocabulary": Option(258, "token ids", least=1),
    "tied": Option(True, "the head reads the embedding of tokens"),
    "embedding_scale": Option(1.0, "of the embeddings of tokens", above=0),
    "logit_softcap": Option(0.0, "logits z become c tanh(z / c); 0: none", least=0),
    "rule": Option("causal", "who sees whom: rules of lab.kernels.rules, joined by & and |, in parentheses"),
    "pattern": Option(((),), "layer specs that repeat, each of (field of a layer's part, value) laid over the model's",
                      kind=tuple[tuple[tuple[str, object], ...], ...]),
    "compute": Option("float32", "of activations; weights stay float32", choices=("float32", "bfloat16")),
}  # fmt: skip


def _part(name: str, table, default: str, meaning: str) -> Part:
    return Part(f"{name}.name", table, default, meaning, at=f"{name}.")


LAYER = (  # the parts of a layer, which the layers of a pattern may have different
    _part("mixer", MIXERS, "attention", "how tokens look at each other"),
    _part("feedforward", FEEDFORWARDS, "swiglu", "what every token goes through by itself"),
    _part("norm", NORMS, "rms", "what norms do"),
    _part("placement", PLACEMENTS, "pre", "where norms stand around a sublayer"),
    _part("branch", BRANCHES, "plain", "what outputs of sublayers are multiplied with"),
    _part("position", POSITIONS, "rope2d", "how the position of a token enters"),
    _part("position.scaling", FREQUENCY_MAPS, "default", "how the rotary frequencies change for longer texts"),
    _part("position.map", POSITION_MAPS, "none", "how the times that rotate change for longer texts"),
)
WHOLE = (  # the parts that it has one of
    _part("stream", STREAMS, "plain", "how the outputs of layers are combined"),
    _part("init", INITIALISERS, "scaled", "how matrices of sublayers are drawn"),
    _part("parametrization", PARAMETRIZATIONS, "standard", "how numbers change with the size of the model"),
)
MODEL = Room(OWN | lora.OPTIONS, (*LAYER, *WHOLE))
OF_LAYERS = ("rule", *Room({}, LAYER).declared())  # what an entry of the pattern may set


def layer_specs(model) -> list:
    """The model config as each entry of the layer pattern has it. Raises UserError for what an entry cannot set."""
    OWN["pattern"].check("model.pattern", model.pattern)
    specs = []
    for entry in model.pattern:
        specs.append(model.copy_and_resolve_references())
        for field, value in entry:
            choose("a field of model.pattern", field, OF_LAYERS)
            try:
                set_field(specs[-1], field, value)
            except TypeError:
                raise UserError(f"model.pattern sets {field} = {value!r}, which is of another type") from None
    return specs


def apart(model) -> tuple:
    """Overrides under which branches of one prompt are texts of their own, where the model reads texts in order: every
    rule `causal` becomes `own_branch`. A single text is read as before."""
    own = lambda field, value: re.sub(r"\bcausal\b", "own_branch", value) if field == "rule" else value  # noqa: E731
    pattern = tuple(tuple((field, own(field, value)) for field, value in entry) for entry in model.pattern)
    return ("rule", own("rule", model.rule)), ("pattern", pattern)


def read_by_layers(model) -> list[set[str]]:
    """The options that each entry of the pattern reads, those of the whole model among them."""
    return [MODEL.read(leaves(spec), "model.") - lora.unread(model) for spec in layer_specs(model)]


def meant_by_layers(model) -> list[set[str]]:
    """The same, but for those that mean nothing beside the values of others."""
    pairs = zip(layer_specs(model), read_by_layers(model), strict=True)
    return [read - {*MODEL.idle(leaves(one))} for one, read in pairs]


def maps(spec) -> int:
    """Attention maps of a layer; of a mixer without any, its heads."""
    return getattr(MIXERS[spec.mixer.name], "heads_each", 1) * spec.mixer.heads


def biased(model) -> bool:
    """Whether the position of some layer adds to scores."""
    return any(position.of(spec).added for spec in layer_specs(model))


def check(model) -> None:
    """Refuses a model config that means nothing, naming the value and the valid choices."""
    OWN["layers"].check("model.layers", model.layers)
    specs = layer_specs(model)
    if not 1 <= len(specs) <= model.layers:
        raise UserError(
            f"model.pattern has {len(specs)} entries for model.layers = {model.layers}; choose 1 to that many"
        )
    lora.check(model)
    declared, values, read = MODEL.declared(), [leaves(spec) for spec in specs], meant_by_layers(model)
    for field, value in leaves(model).items():
        if value != declared[field].default and not any(field in of_layer for of_layer in read):
            raise MODEL.unread(leaves(model), field, "model.")
    for spec, entry, of_layer, fields in zip(specs, model.pattern, values, read, strict=True):
        for field, _ in entry:
            if field not in fields:
                raise MODEL.unread(of_layer, field, "model.")
        for field in fields:
            declared[field].check(f"model.{field}", of_layer[field])
        rules.parse(spec.rule)
        norm.check(spec)
        position.check(spec)
        MIXERS[spec.mixer.name].check(spec)
        stretched.check(spec, MIXERS)
    position.check_layers(specs, [maps(spec) for spec in specs])
    streams.check(model, specs)
    parametrization.check(model)
