"""The streams by name: what model.stream.name may say."""

from lab.errors import UserError, choose
from lab.model import stretched
from lab.model.position import POSITIONS
from lab.model.streams import v1, v2, v3, v4, v4_tokens
from lab.model.streams.attnres import AttnRes, BlockAttnRes
from lab.model.streams.denseformer import DenseFormer
from lab.model.streams.hyper import ConstrainedHyperConnections, HyperConnections
from lab.model.streams.laurel import Laurel
from lab.model.streams.lime import LayerIntegratedMemory
from lab.model.streams.muddformer import MUDDFormer
from lab.model.streams.parallel import Parallel, ParallelTwoNorms
from lab.model.streams.resformer import ValueResidual
from lab.model.streams.stream import Plain
from lab.model.streams.unet import UNet

STREAMS = {
    "plain": Plain,
    "parallel": Parallel,
    "parallel-two": ParallelTwoNorms,
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


def check(model, specs: list) -> None:
    """Refuses a stream that means nothing on this model. specs: of each entry of the layer pattern."""
    name = model.stream.name
    stream, named = STREAMS[name], f"model.stream.name = {name!r}"
    if model.layers < stream.needs:
        raise UserError(
            f"model.layers = {model.layers}: {named} combines layers with earlier ones; choose at least {stream.needs} "
            "layers, or the stream 'plain'"
        )
    for spec in specs:
        if stream.mixers is not None:
            choose(f"model.mixer.name under {named}", spec.mixer.name, stream.mixers)
            stretched.check_stream(spec, named)
        if not stream.adds:
            fitting = [position for position, row in POSITIONS.items() if not row.added]
            choose(f"model.position.name under {named}", spec.position.name, fitting)
        choose(f"model.placement.name under {named}", spec.placement.name, stream.placements)
    if stream.mixers is not None and stream.grows:
        check_alike(specs, named)
    stream.check(model)


def check_alike(specs: list, named: str) -> None:
    """Refuses layers whose heads a stream cannot combine."""
    for field in ("name", "heads", "kv_heads", "head_dim", "v_head_dim"):
        values = list(dict.fromkeys(spec.mixer[field] for spec in specs))
        if len(values) > 1:
            raise UserError(
                f"model.pattern has the values {', '.join(map(str, values))} of mixer.{field}: {named} combines heads "
                "of different layers; choose one for all entries"
            )


def check_scan(model, run) -> None:
    """Refuses to scan over layers where the state of the stream grows with them."""
    if run.scan and STREAMS[model.stream.name].grows:
        raise UserError(
            f"run.scan = True: model.stream.name = {model.stream.name!r} has a state that grows with the layers, which "
            "cannot be scanned; choose run.scan = False"
        )


def check_rows(model, field: str, tokens: int) -> None:
    """Refuses rows that are longer than a stream has weights for; `field`: what makes them as long."""
    if "length" in STREAMS[model.stream.name].options and tokens > model.stream.length:
        raise UserError(
            f"{field} makes rows of {tokens} tokens: model.stream.name = {model.stream.name!r} has weights for "
            f"model.stream.length = {model.stream.length}; choose shorter rows, or that length"
        )
