"""Attention work, and a cache laid over tensor-parallel devices, against counting what each device must hold."""

from types import SimpleNamespace

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from lab import model as lab_model
from lab.model import accounting
from lab.study.define import plan

POWERS = st.sampled_from((1, 2, 4, 8))
ARRAYS = st.lists(st.tuples(POWERS, st.integers(1, 600)), min_size=1, max_size=3)


def stand_in(*cached, layers=None, work=0, state=0):
    """A model as far as accounting looks at its caches: one entry of the layer pattern for each of `cached`."""
    mixers = [SimpleNamespace(cached=tuple(arrays), work_per_key=work, state_numbers=state) for arrays in cached]
    blocks = [SimpleNamespace(mixer=mixer) for mixer in mixers]
    stream = SimpleNamespace(cached=lambda mixers: (), work_per_token=lambda blocks, visible: 0.0)
    return SimpleNamespace(layers=layers or len(mixers), blocks=blocks, stream=stream)


def held(groups: int, devices: int) -> set[int]:
    """How many groups devices hold, were each to keep those that its share of the query heads reads."""
    heads = groups * devices
    reads = [{head // devices for head in range(heads)[d * groups : (d + 1) * groups]} for d in range(devices)]
    return {len(found) for found in reads}


@given(st.lists(ARRAYS, min_size=1, max_size=3), POWERS)
def test_a_device_holds_the_groups_that_its_heads_read(pattern, devices):
    layers = [sum(width * held(groups, devices).pop() for groups, width in arrays) for arrays in pattern]
    assert accounting.cache_per_device(stand_in(*pattern), devices) == pytest.approx(sum(layers) / len(layers))


@given(ARRAYS)
def test_one_device_holds_all(arrays):
    model = stand_in(arrays)
    assert accounting.cache_per_device(model, 1) == accounting.cache_per_token_per_layer(model)


@given(st.integers(1, 12), POWERS)
def test_groups_that_do_not_divide_have_no_share(groups, devices):
    told = accounting.cache_per_device(stand_in([(8, 16), (groups, 3)]), devices)
    assert (told is None) == (groups % devices != 0 and devices % groups != 0)
    assert (told is None) >= (len(held(groups, devices)) > 1)  # devices that would hold unequal shares


@pytest.mark.parametrize(("cached", "shares", "copies"), [
    ([(1, 512), (1, 64)], (576, 576, 576, 576), (1, 2, 4, 8)),  # MLA: every device holds the whole latent
    ([(1, 256), (1, 256)], (512, 512, 512, 512), (1, 2, 4, 8)),
    ([(2, 128), (2, 128)], (512, 256, 256, 256), (1, 1, 2, 4)),
    ([(16, 128), (16, 128)], (4096, 2048, 1024, 512), (1, 1, 1, 1)),
    ([(3, 10)], (30, None, None, None), (1, None, None, None)),
    ([], (0, 0, 0, 0), (None,) * 4),
])  # fmt: skip
def test_shares_and_copies_of_the_published_caches(cached, shares, copies):
    row = plan.over_devices(stand_in(cached))
    counts = tuple(map(str, plan.DEVICES))
    assert row == {
        "cache_per_device": dict(zip(counts, shares, strict=True)),
        "cache_copies": dict(zip(counts, copies, strict=True)),
    }


def test_means_are_over_layers_not_over_entries_of_the_pattern(monkeypatch):
    model = stand_in([(2, 8)], [], layers=3, work=10, state=6)
    monkeypatch.setattr(accounting, "layers", lambda model: [*model.blocks, model.blocks[0]])
    model.blocks[1].mixer.work_per_key, model.blocks[0].mixer.state_numbers = 40, 0
    assert accounting.attention_work(model) == (10 + 40 + 10) / 3 == 20
    assert accounting.cache_per_token_per_layer(model) == pytest.approx(2 * 16 / 3)
    assert accounting.state_per_layer(model) == 6 / 3


@pytest.mark.parametrize(
    ("overrides", "work"), [({}, 4 * (8 + 8)), (dict(model__mixer__heads=2, model__mixer__head_dim=24), 2 * 48)]
)
def test_attention_work_is_heads_times_both_widths(overrides, work):
    model = lab_model.abstract(tiny.config(**overrides).model)
    assert accounting.attention_work(model) == work
    assert accounting.state_per_layer(model) == 0
