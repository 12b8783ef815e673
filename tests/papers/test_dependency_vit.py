"""DependencyViT: what reversed attention, its tree and its pruning promise."""

from __future__ import annotations

import networkx
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

import transom
from tests.common.hosts import HOSTS, images
from transom.errors import DataError, SettingsError, TokensError
from transom.papers.tokens.dependency_vit import (
    DependencyViT,
    ReversedAttention,
    dependency_mask,
    draw_tree,
    grow,
)
from transom.papers.tokens.dependency_vit import backbone as backbones
from transom.papers.tokens.dependency_vit.attention import sending
from transom.papers.tokens.dependency_vit.backbone import Flow
from transom.papers.tokens.dependency_vit.method import mixers
from transom.papers.tokens.dependency_vit.pruning import fractions, kept


def small(**changes) -> DependencyViT:
    torch.manual_seed(0)
    settings = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 4}
    model = DependencyViT(**{**settings, "num_classes": 3, "init_values": 0.5, **changes}).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "head_selector" in name or "message_controller" in name or "qkv" in name:
                weight.mul_(15)
    return model


def written_out(module: ReversedAttention, x: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    """Token by token and head by head: the output of one image (N, D) and its graph (N, N)."""
    count, width = x.shape
    d = width // module.heads
    q, k, v = (module.qkv(x)[:, i * width : (i + 1) * width] for i in range(3))
    y, graph = torch.zeros(count, width), torch.zeros(count, count)
    for j in range(count):
        p = (module.head_selector(x[j]) / module.temperature).softmax(0)
        mlp = module.message_controller
        m_j = m[j] * torch.sigmoid(mlp.fc2.weight @ F.gelu(mlp.fc1.weight @ x[j]))
        for g in range(module.heads):
            part = slice(g * d, (g + 1) * d)
            share = (k[:, part] @ q[j, part] / d**0.5).softmax(0) * p[g] * m_j
            y[:, part] += share[:, None] * v[j, part]
            graph[:, j] += share
    return module.proj(y), graph


@torch.no_grad()
def test_it_is_what_is_written_out() -> None:
    torch.manual_seed(0)
    module, x, m = ReversedAttention(16, 4, qkv_bias=True), torch.randn(2, 7, 16), torch.rand(2, 7)
    y, after = module(x, m)
    for b in range(2):
        expected, graph = written_out(module, x[b], m[b])
        torch.testing.assert_close(y[b], expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(module.depend(x, after)[b], graph, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_every_sender_gives_all_it_has_and_says_less_and_less() -> None:
    model = small()
    flow = Flow(torch.randn(2, 16, 32))
    before = torch.ones(2, 16)
    for block in model.blocks:
        h = block.norm1(flow.x)
        q, k, _ = block.attn.split(h)
        torch.testing.assert_close(sending(q, k, 0.3).mT.sum(-2), torch.ones(2, 4, 16))
        graph = block.attn.depend(h, block.attn.control(h, flow.m))
        flow = block(flow)
        torch.testing.assert_close(graph.sum(1), flow.m)  # p over heads sums to 1, so m is left
        assert (flow.m < before).all()
        before = flow.m


def test_pruning_removes_equal_parts_of_the_original_tokens() -> None:
    left, counts = 196, []
    for fraction in fractions(4, 0.16):
        left = kept(left, fraction)
        counts.append(left)
    # floors add up to at most one token a step
    expected = [196 * (1 - 0.16 * i) for i in range(1, 5)]
    assert all(0 <= e - c < i + 1 for i, (e, c) in enumerate(zip(expected, counts, strict=True), 1))
    assert kept(1, 0.1) == 1


@torch.no_grad()
def test_the_backbone_prunes_the_quietest() -> None:
    model = small(prune_layers=(2,), prune_ratio=0.5)
    x = torch.randn(2, 3, 32, 32)
    flow = model.blocks[0](model.embed(x))
    _, m = model.blocks[1].attn(model.blocks[1].norm1(flow.x), flow.m)
    after = model.blocks[1](flow)
    assert after.x.shape[1] == 8
    stay = torch.zeros_like(m, dtype=torch.bool).scatter(1, after.place, True)
    assert (m.masked_fill(~stay, 2).amin(1) > m.masked_fill(stay, -1).amax(1)).all()


@pytest.mark.parametrize(
    "settings",
    [
        {"prune_layers": (5,), "prune_ratio": 0.1},
        {"prune_layers": (0,), "prune_ratio": 0.1},
        {"prune_layers": (3, 2), "prune_ratio": 0.1},
        {"prune_layers": (1, 2), "prune_ratio": 0.5},
        {"num_heads": 5},
        {"head_selector_temperature": 0.0},
    ],
)
def test_settings_out_of_range_are_refused(settings) -> None:
    with pytest.raises(SettingsError):
        small(**settings)


def test_pruning_layers_of_a_host_that_are_not_there_are_refused() -> None:
    with pytest.raises(SettingsError, match="layer 9"):
        transom.apply(HOSTS["timm-class"](), "dependency-vit", prune_ratio=0.1, prune_layers=(9,))


@pytest.mark.parametrize("host", ["timm-class", "timm-average", "hf-clip-vision"])
@torch.no_grad()
def test_a_host_passes_m_on_and_prunes_by_it(host: str) -> None:
    model, x = HOSTS[host](), images(host)
    transom.apply(model, "dependency-vit", prune_ratio=0.25, prune_layers=(1, 2), restore="never")
    with transom.trace(model) as trace:
        model(x)
    prefix = trace.tokens[0].layout.prefix
    patches = trace.tokens[0].layout.count - prefix
    assert trace.lengths[0] - prefix == kept(patches, 0.75)
    first, *later = [record.voice for record in trace.tokens]
    for before, after in zip([first, *later], later, strict=False):
        assert after[:, prefix:].max() < before[:, prefix:].max()
        assert (after[:, :prefix] == 0).all(), "prefix tokens send nothing"


@torch.no_grad()
def test_the_host_is_the_backbone_when_it_has_its_parameters() -> None:
    """Same parameters, average pooling, and m = 1 at the end: the features must agree."""
    own = small(num_classes=0)
    host = timm.models.VisionTransformer(
        img_size=32,
        patch_size=8,
        embed_dim=32,
        depth=4,
        num_heads=4,
        num_classes=0,
        class_token=False,
        global_pool="avg",
        fc_norm=False,
        qkv_bias=False,
        init_values=0.5,
    ).eval()
    state = {k: v for k, v in own.state_dict().items() if k in host.state_dict()}
    host.load_state_dict(state, strict=True)
    transom.apply(host, "dependency-vit")
    for mixer, block in zip(mixers(host), own.blocks, strict=True):
        mixer.head_selector.load_state_dict(block.attn.head_selector.state_dict())
        mixer.message_controller.load_state_dict(block.attn.message_controller.state_dict())
    x = torch.randn(2, 3, 32, 32)
    flow = own.embed(x)
    for block in own.blocks:
        flow = block(flow)
    torch.testing.assert_close(host.forward_features(x), own.norm(flow.x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(dependency_mask(host, x), dependency_mask(own, x))


def test_gradients_reach_the_controllers_of_all_blocks_of_a_host() -> None:
    model, x = HOSTS["timm-average"](), images("timm-average")
    transom.apply(model, "dependency-vit", prune_ratio=0.25, prune_layers=(2,))
    out = model(x)
    out.square().sum().backward()
    for mixer in mixers(model):
        assert mixer.message_controller.fc1.weight.grad.abs().max() > 0
        assert mixer.head_selector.weight.grad.abs().max() > 0


@torch.no_grad()
def test_the_graph_of_a_pruned_model_ends_where_its_tokens_end() -> None:
    model, x = small(prune_layers=(1,), prune_ratio=0.5), torch.randn(2, 3, 32, 32)
    place = model.blocks[0](model.embed(x)).place
    gone = torch.ones(2, 16, dtype=torch.bool).scatter(1, place, False)
    first, later = dependency_mask(model, x, (0,)), dependency_mask(model, x, (1, 2, 3))
    assert (first > 0).all()
    assert (later.sum(1) == 0).equal(gone)
    assert (later.sum(2) == 0).equal(gone)
    torch.testing.assert_close(dependency_mask(model, x), first + later)
    with pytest.raises(SettingsError, match="layers 0 to 3"):
        dependency_mask(model, x, (4,))


@torch.no_grad()
def test_an_ordinary_host_can_be_read() -> None:
    model, x = HOSTS["timm-class"](), images("timm-class")
    mask = dependency_mask(model, x)
    count = model.patch_embed.num_patches
    assert mask.shape == (2, count, count)
    sent = mask.sum(1)
    heads = sum(block.attn.num_heads for block in model.blocks)
    assert (sent < heads).all() and (sent > 0).all()  # a part went to the class token
    assert not transom.fittings(model)


@torch.no_grad()
def test_merged_patches_have_no_edges_of_their_own() -> None:
    model, x = HOSTS["timm-class"](), images("timm-class")
    transom.apply(model, "dependency-vit")
    transom.apply(model, "tome", r=2)
    with pytest.raises(TokensError, match="merged"):
        dependency_mask(model, x)


@pytest.mark.parametrize("count", [1, 2, 5, 9, 16])
def test_the_tree_is_the_best_one(count: int) -> None:
    rng = np.random.default_rng(count)
    for _ in range(15):
        mask = rng.random((count, count))
        tree = grow(mask)
        assert sorted(tree.order) == list(range(count))
        assert tree.parents[tree.root] == -1 and (tree.parents < 0).sum() == 1
        assert tree.root == mask.sum(1).argmax()
        if count == 1:
            continue
        graph = networkx.DiGraph()
        graph.add_weighted_edges_from(
            (i, j, mask[i, j])
            for i in range(count)
            for j in range(count)
            if i != j and j != tree.root
        )
        best = networkx.maximum_spanning_arborescence(graph).size(weight="weight")
        assert tree.share.sum() == pytest.approx(best)


def test_subtrees_and_parts_of_a_known_tree() -> None:
    mask = np.full((7, 7), 0.01)
    for child, parent in ((1, 0), (2, 0), (3, 1), (4, 1), (5, 2), (6, 5)):
        mask[parent, child] = 1
    mask[0, 0] = 5
    tree = grow(torch.from_numpy(mask))
    assert tree.parents.tolist() == [-1, 0, 0, 1, 1, 2, 5]
    assert tree.depths.tolist() == [0, 1, 1, 2, 2, 2, 3]
    assert tree.subtree(2).tolist() == [2, 5, 6]
    assert tree.parts(0).tolist() == [0] * 7
    assert tree.parts(1).tolist() == [0, 1, 2, 1, 1, 2, 2]
    assert tree.leaves.tolist() == [3, 4, 6]
    with pytest.raises(TokensError, match="0 to 6"):
        tree.subtree(7)
    with pytest.raises(SettingsError, match="level"):
        tree.parts(-1)


@pytest.mark.parametrize("mask", [np.ones((2, 3)), np.full((2, 2), np.nan), np.ones((0, 0))])
def test_what_is_no_graph_is_refused(mask) -> None:
    with pytest.raises(TokensError):
        grow(mask)


def test_the_drawing_joins_children_to_parents() -> None:
    mask = np.full((6, 6), 0.01)
    mask[0, 1:] = 1  # all below the first of 2 x 3 patches
    tree = grow(mask)
    image = np.zeros((20, 30, 3), dtype=np.uint8)
    drawn = draw_tree(image, tree, (2, 3))
    assert (image == 0).all()
    assert (drawn[5, 5] == 255).all(), "the root"
    assert (drawn[5, 8:26].sum(-1) > 0).all(), "the line along the first row"
    assert (drawn[8:16, 5].sum(-1) > 0).all(), "the line down the first column"
    assert (drawn[:4] == 0).all() and (drawn[17:] == 0).all()
    with pytest.raises(TokensError, match="grid"):
        draw_tree(image, tree, (2, 2))
    with pytest.raises(DataError, match="uint8"):
        draw_tree(image / 1.0, tree, (2, 3))
    with pytest.raises(DataError, match="at least one pixel"):
        draw_tree(image[:1], tree, (2, 3))


def planted(count: int, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Noise of 6 x 6 patches, four of which show one of four textures; also where they are."""
    lines = (torch.arange(8) % 2 * 2.0 - 1)[:, None].expand(8, 8)
    coarse = (torch.arange(8) // 2 % 2 * 2.0 - 1)[:, None].expand(8, 8)
    textures = torch.stack([lines, lines.T, lines * lines.T, coarse])
    x = 0.7 * torch.randn(count, 3, 24, 24, generator=rng)
    label = torch.randint(0, 4, (count,), generator=rng)
    rows, columns = torch.randint(0, 5, (2, count), generator=rng).tolist()
    inside = torch.zeros(count, 6, 6, dtype=torch.bool)
    for i, (r, c) in enumerate(zip(rows, columns, strict=True)):
        x[i, :, 4 * r : 4 * r + 8, 4 * c : 4 * c + 8] += textures[label[i]]
        inside[i, r : r + 2, c : c + 2] = True
    return x, label, inside.flatten(1)


def test_a_trained_lite_model_keeps_the_object(monkeypatch) -> None:
    torch.manual_seed(1)
    model = DependencyViT(
        img_size=24,
        patch_size=4,
        num_classes=4,
        embed_dim=32,
        depth=4,
        num_heads=4,
        mlp_ratio=2,
        init_values=1.0,
        prune_layers=(1,),
        prune_ratio=0.4,
    )
    rng = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3, weight_decay=0.01)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=120)
    for _ in range(120):
        x, label, _ = planted(48, rng)
        optimizer.zero_grad()
        F.cross_entropy(model(x), label).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
    model.eval()
    x, label, inside = planted(512, torch.Generator().manual_seed(99))
    with torch.no_grad():
        place = model.blocks[0](model.embed(x)).place
        stays = inside.gather(1, place).sum() / inside.sum()
        right = (model(x).argmax(1) == label).float().mean()
        monkeypatch.setattr(
            backbones, "loudest", lambda m, keep: torch.rand_like(m).argsort(-1)[:, :keep]
        )
        control = (model(x).argmax(1) == label).float().mean()
    assert stays > 0.75, "21 of 36 patches stay, so chance is 0.58"
    assert right > 0.97
    assert right - control > 0.03, "patches at random would do as well"
