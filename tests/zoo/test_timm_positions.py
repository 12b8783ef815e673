"""Positions, masks and class rows of timm's transformers go where their tokens go."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import transom
from tests.zoo.timm_probes import REDUCED, TOTAL, Keep, Note, Probe, Shuffle, far, images, run
from tests.zoo.timm_zoo import FITS, GRID, PATCH, own
from transom.errors import TokensError


def _manual(model: Any, block: Any, h: Tensor, home: Tensor, front: int, i: int) -> Tensor:
    """Attention over h (N, D) of one image, token by token, from its definition."""
    m = block.attn
    count, heads = len(h), m.num_heads
    bias = 0.0
    if m.qkv is None:
        q, k, v = (project(h) for project in (m.q_proj, m.k_proj, m.v_proj))
    else:
        if getattr(m, "q_bias", None) is not None:
            bias = torch.cat([m.q_bias, torch.zeros_like(m.q_bias), m.v_bias])
        elif m.qkv.bias is not None:
            bias = m.qkv.bias
        q, k, v = (h @ m.qkv.weight.T + bias).chunk(3, -1)
    q, k, v = (t.reshape(count, heads, -1) for t in (q, k, v))
    rope = getattr(model, "rope", None)
    if rope is not None:
        table = rope.get_embed()
        table = table[i] if table.dim() == 4 else table
        q, k = (_rotated(t, table, home, front, getattr(m, "rotate_half", False)) for t in (q, k))
    out = torch.zeros_like(v)
    for head in range(heads):
        for a in range(count):
            logits = [float(q[a, head] @ k[b, head]) * m.scale for b in range(count)]
            logits = [
                logit + _between(model, m, head, int(home[a]), int(home[b]), front)
                for b, logit in enumerate(logits)
            ]
            weights = torch.tensor(logits, dtype=torch.float64).softmax(0)
            out[a, head] = sum(weights[b] * v[b, head] for b in range(count))
    return m.proj(getattr(m, "norm", nn.Identity())(out.flatten(1)))


def _rotated(t: Tensor, table: Tensor, home: Tensor, front: int, half: bool) -> Tensor:
    """Each pair of channels of t (N, H, d) turned by the angle of its patch."""
    out, width = t.clone(), t.shape[-1]
    for a in range(front, len(t)):
        for head in range(t.shape[1]):
            row = table[head] if table.dim() == 3 else table
            sin, cos = row[int(home[a]) - front].chunk(2)
            for c in range(width // 2):
                one, two = (c, c + width // 2) if half else (2 * c, 2 * c + 1)
                x, y = t[a, head, one], t[a, head, two]
                out[a, head, one] = x * cos[one] - y * sin[one]
                out[a, head, two] = y * cos[two] + x * sin[two]
    return out


def _between(model: Any, m: Any, head: int, a: int, b: int, front: int) -> float:
    """Relative position bias from the token that stood at a to the one that stood at b."""
    tables = [
        getattr(holder, "relative_position_bias_table", None)
        for holder in (m, getattr(m, "rel_pos", None), getattr(model, "rel_pos_bias", None))
    ]
    total = 0.0
    for table in tables:
        if table is None:
            continue
        if a < front or b < front:
            # the last three rows: to the class token, from it, and it to itself
            row = -1 if a == b else (-3 if a < front else -2)
        else:
            (ya, xa), (yb, xb) = divmod(a - front, GRID), divmod(b - front, GRID)
            row = (ya - yb + GRID - 1) * (2 * GRID - 1) + xa - xb + GRID - 1
        total += float(table[row, head])
    return total


@pytest.mark.parametrize(
    "family",
    [
        "eva02",
        "eva-post-norm",
        "rope-mixed",
        "perception-encoder",
        "beit",
        "beit-both",
        "beit-shared",
        "relpos-bias",
    ],
)
@torch.no_grad()
def test_positions_follow_their_tokens(family: str) -> None:
    """Tokens kept out of order, against attention written out pair by pair."""
    model: Any = own(FITS[family]).double()
    own(lambda: run(model, images().double()))
    places = (30, 3, 17, 22, 8)
    transom.apply(model, Probe((Keep(places),)), restore="never")
    block, seen = model.blocks[1], []
    block.attn.register_forward_hook(lambda m, args, out: seen.extend((args[0], out)))
    with transom.trace(model) as trace:
        model.forward_features(images().double())
    h, got = seen
    front = trace.tokens[0].layout.prefix
    home = torch.tensor([*range(front), *(front + place for place in places)])
    assert h.shape[1] == len(home)
    for one in range(len(h)):
        expected = _manual(model, block, h[one], home, front, 1)
        torch.testing.assert_close(got[one], expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("family", ["vit-differential", "vit-things-differential", "beit-both"])
@torch.no_grad()
def test_class_row_is_what_the_class_token_gets(family: str) -> None:
    """Values that tell tokens apart show how much of each reaches the class token."""
    model: Any = own(FITS[family]).double()
    seen: list[Tensor] = []
    transom.apply(model, Probe((Note(seen),), drops=False), check=False)
    x = images(1).double()
    first = model.blocks[0]
    attention = [b.attn for b in first.attns] if hasattr(first, "attns") else [first.attn]
    total = TOTAL + 1
    expected = torch.zeros(total, dtype=torch.float64)
    for m in attention:
        h: list[Tensor] = []
        m.register_forward_hook(lambda m, args, out, h=h: h.append(args[0]))
        run(model, x)
        q, k, _ = m.qkv(h[0][0]).chunk(3, -1)
        if family == "beit-both":
            bias = torch.cat([m.q_bias, m.k_bias, m.v_bias])
            q, k, _ = (m.qkv(h[0][0]) + bias).chunk(3, -1)
        heads = m.num_heads * (1 if family == "beit-both" else 2)
        q, k = (t.reshape(total, heads, -1).transpose(0, 1) for t in (q, k))
        if family != "beit-both":
            q, k = m.q_norm(q), m.k_norm(k)
        logits = q[:, :1] @ k.mT * m.scale
        if family == "beit-both":
            logits = logits + (m._get_rel_pos_bias() + model.rel_pos_bias())[0, :, :1]
            probs = logits.softmax(-1)
        else:
            one, two = logits.softmax(-1).unflatten(0, (-1, 2)).unbind(1)
            probs = one - m._compute_lambda() * two
        expected += probs.mean(0)[0] / len(attention)
    torch.testing.assert_close(seen[0][0], expected, atol=1e-12, rtol=1e-10)


@torch.no_grad()
def test_rotations_of_images_of_another_size() -> None:
    model = own(FITS["dinov3"])
    x = torch.randn(2, 3, 32, 64)
    transom.apply(model, "tome", r=4)
    with transom.trace(model) as trace:
        model(x)
    assert trace.lengths == [33, 29, 25]
    transom.remove(model)
    transom.apply(model, Probe((Shuffle(0), Shuffle(1)), drops=False))
    shuffled = model(x)
    transom.remove(model)
    assert far([shuffled], [model(x)]) < 1e-4


def _packed(x: list[Tensor]) -> dict[str, Tensor]:
    """Images of different sizes as the padded batch that NaFlexVit takes."""
    found = []
    for image in x:
        h, w = image.shape[1] // PATCH, image.shape[2] // PATCH
        patches = image.unflatten(1, (h, PATCH)).unflatten(3, (w, PATCH)).permute(1, 3, 2, 4, 0)
        place = torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"), -1)
        found.append((patches.reshape(h * w, -1), place.reshape(h * w, 2)))
    longest = max(len(patches) for patches, _ in found)
    batch: dict[str, list[Tensor]] = {"patches": [], "patch_coord": [], "patch_valid": []}
    for patches, place in found:
        spare = longest - len(patches)
        batch["patches"].append(nn.functional.pad(patches, (0, 0, 0, spare)))
        batch["patch_coord"].append(nn.functional.pad(place, (0, 0, 0, spare)))
        batch["patch_valid"].append(torch.arange(longest) < len(patches))
    return {name: torch.stack(values) for name, values in batch.items()}


@pytest.mark.parametrize("key_only", [False, True])
@pytest.mark.parametrize("method", ["none", "tome", "pitome", "random", "evit"])
@pytest.mark.parametrize("family", ["naflex", "naflex-map", "naflex-rope", "naflex-mixed"])
@torch.no_grad()
def test_images_of_different_sizes(family: str, method: str, key_only: bool) -> None:
    """Each image of a padded batch is reduced as if it were alone."""
    if method == "evit" and family != "naflex":
        pytest.skip("evit needs a class token")
    model: Any = own(FITS[family])
    model.use_key_only_attn_mask = key_only
    x = [torch.randn(3, 48, 48), torch.randn(3, 32, 40)]
    plain = own(lambda: model(_packed(x)))
    transom.apply(model, method, **({"r": 4} if method == "tome" else {}))
    together = model(_packed(x))
    if method == "none":
        assert far([together], [plain]) <= 1e-6
    elif method != "random":
        assert far([together], [plain]) > 1e-3
    for one, image in zip(together, x, strict=True):
        torch.testing.assert_close(model(_packed([image]))[0], one, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_masks_that_are_no_padding_are_refused() -> None:
    for family in ("vit", "vit-parallel-scaling", "vit-parallel-differential", "eva02"):
        model, x = own(FITS[family]), images()
        mask = torch.ones(TOTAL + 1, TOTAL + 1, dtype=torch.bool).tril()
        expected = model(x, attn_mask=mask)
        own(partial(model, x, is_causal=True))
        transom.apply(model, "none")
        assert far([model(x, attn_mask=mask)], [expected]) <= 1e-6
        assert far([model(x, is_causal=True)], [expected]) <= 1e-5
        transom.remove(model)
        transom.apply(model, "tome", r=REDUCED)
        with pytest.raises(TokensError, match="no padding mask"):
            model(x, attn_mask=mask)
        with pytest.raises(TokensError, match="no padding mask"):
            model(x, is_causal=True)
