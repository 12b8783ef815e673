"""Where tokens go: prefix, sizes, provenance, odd grids, and the way back to the full sequence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import transom
from tests.common.cases import CORE, DROPS, MERGES, METHODS, close, fitted, pairs
from tests.common.hosts import DEPTH, HOSTS, PATCH, WIDTH, call, images

# Number of leading tokens that are no patches.
PREFIXES = {"timm-average": 0, "timm-class": 1, "timm-distilled": 2, "timm-registers": 5}
ON_CORE = [(method, host) for method in METHODS for host in CORE]


@pytest.mark.parametrize(("method", "host"), pairs())
@torch.no_grad()
def test_an_image_does_not_depend_on_its_batch(method: str, host: str) -> None:
    model, x = fitted(HOSTS[host](), method), images(host, 3)
    together, alone = call(model, x), call(model, x[1:2])
    for a, b in zip(together, alone, strict=True):
        if len(a) == len(x):
            torch.testing.assert_close(a[1:2], b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("host", ["timm-average", "hf-dinov2", "hf-dinov2-backbone"])
@torch.no_grad()
def test_what_kth_matching_drops_is_restored(host: str) -> None:
    """Of 16 patches and k = 3 the last belongs to no group: it keeps the features it last had."""
    model, x = HOSTS[host](), images(host, 3)
    plain = call(model, x)
    transom.apply(model, "tome", kth=3, where=[1])
    together, alone = call(model, x), call(model, x[2:])
    assert [t.shape for t in together] == [t.shape for t in plain]
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a[2:], b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("method", "host"), ON_CORE)
@torch.no_grad()
def test_the_record_adds_up(method: str, host: str) -> None:
    model = fitted(HOSTS[host](), method)
    view, x = transom.fittings(model)[0].host, images(host)
    with transom.trace(model) as trace:
        call(model, x)
    total = view.prefix + view.grid[0] * view.grid[1]
    assert len(trace.lengths) == len(trace.tokens) == view.depth
    assert trace.lengths == sorted(trace.lengths, reverse=True)
    assert trace.lengths[0] <= total
    for count, record in zip(trace.lengths, trace.tokens, strict=True):
        assert record.layout.count == total
        assert record.layout.prefix == view.prefix
        assert record.layout.grid == view.grid
        assert record.index is not None
        assert record.index.shape == (len(x), total)
        assert record.index.dtype == torch.int64
        _consistent(record.index, record.size, count)


def _consistent(index: Tensor, size: Tensor | None, count: int) -> None:
    """Every token has an origin; sizes, where they are counted, count origins."""
    for item in range(len(index)):
        origins = index[item][index[item] >= 0].bincount(minlength=count)
        assert len(origins) == count
        assert (origins > 0).all(), "a token stands for nothing"
        if size is not None:
            assert torch.equal(origins.float(), size[item, :, 0])


@pytest.mark.parametrize("host", PREFIXES)
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_odd_grids_and_prefix_tokens(method: str, host: str) -> None:
    """5 x 7 patches behind 0, 1, 2 or 5 prefix tokens, which stay in front and alone."""
    model = HOSTS[host](img_size=(5 * PATCH, 7 * PATCH))
    settings = transom.registry.methods()[method].grid(DEPTH, 35)[-1]
    model = fitted(model, method, **settings)
    prefix = PREFIXES[host]
    with transom.trace(model) as trace:
        model(torch.randn(2, 3, 40, 56))
    for count, record in zip(trace.lengths, trace.tokens, strict=True):
        assert record.layout == transom.tokens.Layout(prefix, (5, 7), prefix + 35)
        assert record.index is not None
        front, behind = record.index[:, :prefix], record.index[:, prefix:]
        assert (front == torch.arange(prefix)).all(), "a prefix token moved or was merged"
        assert ((behind >= prefix) | (behind == -1)).all(), "a patch went into a prefix token"
        assert record.size is None or (record.size[:, :prefix] == 1).all()
        assert count > prefix


@pytest.mark.parametrize(
    ("host", "size", "options"),
    [
        ("timm-dynamic", (40, 56), {}),
        ("timm-dynamic", (24, 64), {}),
        ("hf-vit", (40, 56), {"interpolate_pos_encoding": True}),
        ("hf-dinov2", (40, 56), {}),
        ("hf-clip-vision", (40, 56), {"interpolate_pos_encoding": True}),
        ("hf-siglip", (56, 24), {"interpolate_pos_encoding": True}),
    ],
)
@pytest.mark.parametrize("method", [MERGES, DROPS])
@torch.no_grad()
def test_other_sizes_at_call_time(
    method: str, host: str, size: tuple[int, int], options: dict[str, Any]
) -> None:
    model, x = HOSTS[host](), torch.randn(2, 3, *size)
    shapes = [t.shape for t in call(model, x, **options)]
    fitted(model, method)
    with transom.trace(model) as trace:
        assert [t.shape for t in call(model, x, **options)] == shapes
    patches = size[0] * size[1] // PATCH**2
    assert trace.tokens[0].layout.count - trace.tokens[0].layout.prefix == patches


@pytest.mark.parametrize("restore", ["never", "end", "every"])
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_restore_timm(method: str, restore: Any) -> None:
    model: Any = HOSTS["timm-registers"]()
    x = images("timm-registers")
    plain, maps = model.forward_intermediates(x)
    fitted(model, method, restore=restore)
    with transom.trace(model) as trace:
        features = model.forward_features(x)
    left = trace.lengths[-1] if restore == "never" else plain.shape[1]
    assert features.shape == (2, left, WIDTH)
    if restore != "never" and trace.tokens[-1].size is not None:
        # what was merged comes back as copies of the token it lives in
        index = trace.tokens[-1].index
        assert index is not None
        where = [(index[0] == i).nonzero()[:, 0] for i in range(trace.lengths[-1])]
        for group in where:
            assert (features[0, group] == features[0, group[:1]]).all()
    _same_maps(model, x, plain.shape, maps)


def _same_maps(model: Any, x: Tensor, shape: torch.Size, maps: list[Tensor]) -> None:
    """forward_intermediates has its plain shapes in all its forms."""
    last, got = model.forward_intermediates(x)
    assert last.shape == shape
    assert [m.shape for m in got] == [m.shape for m in maps]
    early = model.forward_intermediates(x, indices=[0, 1], stop_early=True, intermediates_only=True)
    close(early, got[:2])
    named = model.forward_intermediates(
        x, indices=1, output_dict=True, return_prefix_tokens=True, norm=True, output_fmt="NLC"
    )
    assert named["image_intermediates"][0].shape == (2, 16, WIDTH)
    assert named["image_intermediates_prefix"][0].shape == (2, 5, WIDTH)
    assert [m.shape for m in model.get_intermediate_layers(x, 2)] == [(2, 16, WIDTH)] * 2


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_restore_transformers(method: str) -> None:
    model: Any = HOSTS["hf-dinov2"]()
    x = images("hf-dinov2")
    fitted(model, method, restore="every")
    out = model(x, output_hidden_states=True)
    assert [h.shape for h in out.hidden_states] == [(2, 17, WIDTH)] * (DEPTH + 1)
    transom.remove(model)
    fitted(model, method, restore="never")
    with transom.trace(model) as trace:
        out = model(x, output_hidden_states=True)
    assert [h.shape[1] for h in out.hidden_states[1:]] == trace.lengths
    assert out.last_hidden_state.shape == (2, trace.lengths[-1], WIDTH)
    assert out.pooler_output.shape == (2, WIDTH)


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_maps_of_a_backbone(method: str) -> None:
    model: Any = HOSTS["hf-dinov2-backbone"]()
    x = images("hf-dinov2-backbone")
    plain = model(x).feature_maps
    fitted(model, method)
    maps = model(x).feature_maps
    assert [m.shape for m in maps] == [m.shape for m in plain] == [(2, WIDTH, 4, 4)] * 3
    if transom.registry.methods()[method]().needs_training:
        return  # untrained parts owe the host's features nothing
    for a, b in zip(maps, plain, strict=True):
        # what was not reduced yet is where it was
        assert torch.cosine_similarity(a.flatten(), b.flatten(), 0) > 0.5


@torch.no_grad()
def test_dropped_tokens_keep_their_last_features() -> None:
    """After every block: what was dropped in block 0 is what left its attention."""
    model: Any = HOSTS["timm-class"]()
    x = images("timm-class")
    block = model.blocks[0]
    attended: list[Tensor] = []
    handle = block.norm2.register_forward_pre_hook(lambda m, args: attended.append(args[0]))
    model(x)
    handle.remove()
    transom.apply(model, DROPS, keep_rate=0.5, layers=(0,), restore="every")
    with transom.trace(model) as trace:
        features = model.forward_intermediates(x, output_fmt="NLC", intermediates_only=True)
    index = trace.tokens[0].index
    assert index is not None
    gone = index[0, 1:] < 0
    assert gone.sum() == 8
    for map_ in features:
        torch.testing.assert_close(map_[0, gone], attended[0][0, 1:][gone])


@torch.no_grad()
def test_every_restoration_changes_no_class_token() -> None:
    """A host's loop may carry the full sequence or the reduced one; the blocks see the same."""
    x = images("timm-registers")
    for method in (MERGES, DROPS):
        outs = []
        for restore in ("never", "every"):
            model = fitted(HOSTS["timm-registers"](), method, restore=restore)
            outs.append(call(model, x))
        close(outs[0], outs[1], 1e-5)


def test_forward_head_and_a_changed_classifier() -> None:
    model: Any = HOSTS["timm-average"]()
    x = images("timm-average")
    transom.apply(model, MERGES, r=3)
    with torch.no_grad():
        assert torch.equal(model.forward_head(model.forward_features(x)), model(x))
        model.reset_classifier(7)
        assert model(x).shape == (2, 7)
    assert isinstance(model.get_classifier(), nn.Linear)
