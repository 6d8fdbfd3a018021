"""The streams by name: what model.stream.name may say."""

from lab.errors import UserError, choose
from lab.model.streams import v1, v2, v3, v4, v4_tokens
from lab.model.streams.attnres import AttnRes, BlockAttnRes
from lab.model.streams.denseformer import DenseFormer
from lab.model.streams.hyper import ConstrainedHyperConnections, HyperConnections
from lab.model.streams.laurel import Laurel
from lab.model.streams.lime import LayerIntegratedMemory
from lab.model.streams.muddformer import MUDDFormer
from lab.model.streams.resformer import ValueResidual
from lab.model.streams.stream import Stream
from lab.model.streams.unet import UNet

STREAMS = {
    "plain": Stream,
    **dict.fromkeys(v1.METHODS, v1.RunningSums),
    **v2.METHODS,
    **dict.fromkeys(v3.METHODS, v3.Replay),
    **v4.METHODS,
    **v4_tokens.METHODS,
    "denseformer": DenseFormer,
    "muddformer": MUDDFormer,
    "hyper": HyperConnections,
    "mhc": ConstrainedHyperConnections,
    "resformer": ValueResidual,
    "laurel": Laurel,
    "attnres": AttnRes,
    "attnres-block": BlockAttnRes,
    "lime": LayerIntegratedMemory,
    "unet": UNet,
}
OPTIONS = {"accumulate": ("raw", "post"), "input": ("raw", "normed")}  # the first is what every other stream has
SIZES = {  # what a stream that reads one must be given; 0 for the others
    "length": "the tokens of a row",
    "copies": "how many of the stream, such as 4",
    "rank": "how many numbers, such as model.dim / 16",
    "blocks": "a divisor of model.layers",
}


def check(model, mixers: list[str]) -> None:
    """Refuses a stream that means nothing, or not on this model. mixers: of each entry of the layer pattern."""
    name = choose("model.stream.name", model.stream.name, STREAMS)
    stream, named = STREAMS[name], f"model.stream.name = {name!r}"
    check_fields(model, stream, named)
    if model.layers < stream.needs:
        raise UserError(
            f"model.layers = {model.layers}: {named} combines layers with earlier ones; choose at least {stream.needs} "
            "layers, or the stream 'plain'"
        )
    if stream.grows and model.scan:
        raise UserError(
            f"model.scan = True: {named} has a state that grows with the layers, which cannot be scanned; choose "
            "model.scan = False"
        )
    check_mixers(stream, named, mixers)
    stream.check(model)


def check_fields(model, stream: type[Stream], named: str) -> None:
    """Refuses fields that are missing or unknown, and those that are set and nothing reads."""
    for field, choices in OPTIONS.items():
        choose(f"model.stream.{field}", model.stream[field], choices)
        if field not in stream.fields and model.stream[field] != choices[0]:
            raise UserError(
                f"model.stream.{field} = {model.stream[field]!r} means nothing to {named}; choose {choices[0]!r}, or "
                f"one of: {', '.join(name for name in STREAMS if field in STREAMS[name].fields)}"
            )
    for field, meaning in SIZES.items():
        if field in stream.fields and model.stream[field] < 1:
            raise UserError(f"model.stream.{field} = {model.stream[field]}: {named} needs it; choose {meaning}")
        if field not in stream.fields and model.stream[field]:
            raise UserError(f"model.stream.{field} = {model.stream[field]} means nothing to {named}; choose 0")
    for field in stream.refuses:
        if model[field]:
            raise UserError(f"model.{field} = {model[field]!r}: {named} has no place for it; choose 0")


def check_mixers(stream: type[Stream], named: str, mixers: list[str]) -> None:
    """Refuses mixers that a stream cannot look into, and those whose heads differ from layer to layer."""
    if stream.mixers is None:
        return
    for mixer in mixers:
        choose(f"model.mixer under {named}", mixer, stream.mixers)
    if stream.grows and len(set(mixers)) > 1:
        raise UserError(
            f"model.pattern has the mixers {', '.join(dict.fromkeys(mixers))}: {named} combines heads of different "
            "layers; choose one mixer for all entries"
        )


def check_rows(model, field: str, tokens: int) -> None:
    """Refuses rows that are longer than a stream has weights for; `field`: what makes them as long."""
    if "length" in STREAMS[model.stream.name].fields and tokens > model.stream.length:
        raise UserError(
            f"{field} makes rows of {tokens} tokens: model.stream.name = {model.stream.name!r} has weights for "
            f"model.stream.length = {model.stream.length}; choose shorter rows, or that length"
        )
