"""CCT, CVT and ViT-Lite: their pooling, and class tokens in front of maps."""

from __future__ import annotations

import pytest
import torch

from transom.errors import SettingsError
from transom.papers.tokens.cct.network import CompactTransformer


def network(*, seq_pool: bool = True) -> CompactTransformer:
    torch.manual_seed(0)
    return CompactTransformer(
        16, 4, convolutional=False, seq_pool=seq_pool, embed_dim=8, depth=3, num_heads=2
    ).eval()


@torch.no_grad()
def test_a_class_token_is_no_part_of_the_map() -> None:
    model, x = network(seq_pool=False), torch.randn(2, 3, 16, 16)
    tokens, [(shown, front)] = model.forward_intermediates(
        x, 1, norm=True, return_prefix_tokens=True
    )
    torch.testing.assert_close(torch.cat([front, shown.flatten(2).mT], 1), tokens)
    torch.testing.assert_close(model.forward_head(tokens, pre_logits=True), front[:, 0])


@torch.no_grad()
def test_sequence_pooling_is_a_weighted_mean() -> None:
    model, x = network(), torch.randn(2, 3, 16, 16)
    tokens = model.forward_features(x)
    pool = model.classifier.attention_pool
    weights = (tokens @ pool.weight[0] + pool.bias).softmax(1)
    expected = torch.einsum("bn,bnd->bd", weights, tokens)
    torch.testing.assert_close(model.forward_head(tokens, pre_logits=True), expected)
    with pytest.raises(SettingsError, match="no prefix tokens"):
        model.forward_intermediates(x, return_prefix_tokens=True)


@torch.no_grad()
def test_layers_and_head_can_go() -> None:
    model, x = network(), torch.randn(2, 3, 16, 16)
    _, [expected] = model.forward_intermediates(x, [1], norm=True, output_fmt="NLC")
    assert model.prune_intermediate_layers([1]) == [1]
    assert not any(
        name.startswith(("classifier.blocks.2", "classifier.fc")) for name in model.state_dict()
    )
    torch.testing.assert_close(model(x), expected)
    model.reset_classifier(3, "own")
    assert model.get_classifier().out_features == 3
    assert model(x).shape == (2, 3)
    with pytest.raises(SettingsError, match="global_pool is 'avg'"):
        model.reset_classifier(3, "avg")


@torch.no_grad()
def test_positions_are_those_of_another_size() -> None:
    model = network()
    assert model.forward_features(torch.randn(1, 3, 24, 16)).shape == (1, 24, 8)
