"""The mixers by name: what model.mixer.name, or an entry of model.pattern, may say."""

from lab.model.attention import Attention
from lab.model.delta import GatedDelta
from lab.model.differential import Differential
from lab.model.forgetting import Forgetting
from lab.model.latent import LatentAttention
from lab.model.shared_kv import FullyShared, GroupedTied, LatentShared, PartlyShared

MIXERS = {
    "attention": Attention,  # MHA, GQA, MQA; partial RoPE; VO-RoPE
    "mla": LatentAttention,  # with kv_heads > 1: GLA
    "s1": PartlyShared,
    "s2": FullyShared,
    "s3": LatentShared,
    "gta": GroupedTied,
    "differential": Differential,
    "forgetting": Forgetting,
    "delta": GatedDelta,
}
