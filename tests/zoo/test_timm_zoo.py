"""Every family of timm, torchvision and open_clip fits exactly, or is refused with the reason."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import transom
from tests.common.cases import METHODS, anatomy, same, strongest
from tests.common.hosts import tensors
from tests.common.probes import WriteOut
from tests.zoo.timm_zoo import (
    DEPTH,
    FITS,
    GRID,
    PATCH,
    REFUSED,
    SIDE,
    ImageTower,
    own,
    randomised,
)
from transom.errors import FitError, HostError, TokensError
from transom.hosts import Host
from transom.registry import Method
from transom.slots import Ask, Fill
from transom.tokens import Tokens

# Norms that compute in single precision, whatever the model is in.
SINGLE = ("deepseek-encoder",)
REDUCED = 8
"""Tokens ToMe removes in every block below."""
TOTAL = GRID * GRID


def images(count: int = 2, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, SIDE, SIDE, generator=generator)


def run(model: nn.Module, x: Tensor) -> list[Tensor]:
    """What a model makes of images; of two towers only the one that sees them."""
    encode: Callable[[Tensor], Any] = getattr(model, "encode_image", model)
    return tensors(encode(x))


def far(got: list[Tensor], expected: list[Tensor]) -> float:
    """Largest difference of two outputs of the same shapes."""
    assert [t.shape for t in got] == [t.shape for t in expected]
    return max(float((a - b).detach().abs().max()) for a, b in zip(got, expected, strict=True))


@dataclass(frozen=True)
class Look:
    """Token step: asks for keys and sizes, and changes nothing."""

    def __call__(self, tokens: Tokens, attended: Ask) -> Tokens:
        row, key = attended.class_row(), attended.key
        assert row.shape == key.shape[:2] == tokens.x.shape[:2]
        return tokens


@dataclass(frozen=True)
class Shuffle:
    """Token step: another order of the patch tokens for each image; nothing is lost."""

    seed: int

    def __call__(self, tokens: Tokens, attended: Ask) -> Tokens:
        generator = torch.Generator().manual_seed(self.seed)
        behind = torch.rand(len(tokens.x), tokens.count - tokens.prefix, generator=generator)
        front = torch.arange(tokens.prefix).expand(len(tokens.x), -1)
        return tokens.keep(torch.cat([front, behind.argsort(1) + tokens.prefix], 1))


@dataclass(frozen=True)
class Keep:
    """Token step: the patch tokens at `places` stay, in that order."""

    places: tuple[int, ...]

    def __call__(self, tokens: Tokens, attended: Ask) -> Tokens:
        stay = [*range(tokens.prefix), *(tokens.prefix + p for p in self.places)]
        return tokens.keep(torch.tensor(stay).expand(len(tokens.x), -1))


@dataclass(frozen=True)
class Probe(Method):
    """Token steps for the first blocks; the others get none."""

    steps: tuple[Any, ...]
    drops: bool = True
    slug: ClassVar[str] = "probe"

    def fit(self, host: Host) -> list[Fill]:
        fills = [Fill(tokens=step, size_bias=True, drops=self.drops) for step in self.steps]
        return fills + [Fill()] * (host.depth - len(fills))


@pytest.mark.parametrize("family", FITS)
@torch.no_grad()
def test_fits(family: str) -> None:
    """Nothing changes until something is asked; then it does; then it is gone again."""
    model, x = own(FITS[family]), images()
    before, expected = anatomy(model), run(model, x)
    for neutral in ({"method": "none"}, {"method": "tome", "r": 0}):
        transom.apply(model, **neutral)
        assert far(run(model, x), expected) <= 1e-6
        transom.remove(model)

    transom.apply(model, "tome", r=REDUCED)
    host = transom.fittings(model)[0].host
    with transom.trace(model) as trace:
        got = run(model, x)
    assert [t.shape for t in got] == [t.shape for t in expected]
    assert far(got, expected) > 1e-3, "the method changes nothing"
    total = host.prefix + TOTAL
    assert trace.lengths == [total - REDUCED * (i + 1) for i in range(DEPTH)]
    for record in trace.tokens:
        assert record.layout == transom.tokens.Layout(host.prefix, (GRID, GRID), total)
        assert record.index is not None
        front, behind = record.index[:, : host.prefix], record.index[:, host.prefix :]
        assert (front == torch.arange(host.prefix)).all(), "a prefix token moved or was merged"
        assert (behind >= host.prefix).all(), "a patch went into a prefix token"

    transom.remove(model)
    assert anatomy(model) == before
    assert same(run(model, x), expected)


@pytest.mark.parametrize("family", FITS)
@torch.no_grad()
def test_the_attention_is_the_hosts(family: str) -> None:
    """Asked for q and k, in any order of the tokens, in double precision."""
    model, x = own(FITS[family]).double(), images().double()
    expected, tolerance = own(lambda: run(model, x)), 1e-6 if family in SINGLE else 1e-9
    transom.apply(model, Probe((Look(),) * DEPTH, drops=False), check=False)
    assert far(run(model, x), expected) < tolerance
    transom.remove(model)

    # for hosts that show their tokens the original order comes back
    steps = tuple(Shuffle(seed) for seed in range(DEPTH))
    transom.apply(model, Probe(steps, drops=False), check=False)
    assert far(run(model, x), expected) < tolerance, "a position did not follow its token"


# Hosts in which equal patches are equal tokens once nothing is added to them.
WITHOUT_POSITIONS = [
    family
    for family in FITS
    if not family.startswith(("eva02", "eva-post", "beit", "relpos", "naflex", "qwen", "deepseek"))
    and family not in ("beit3", "dinov3", "rope-mixed", "perception-encoder", "sapiens2")
    and family != "vit-hybrid"
]


@pytest.mark.parametrize("family", WITHOUT_POSITIONS)
@torch.no_grad()
def test_equal_tokens_merge_without_loss(family: str) -> None:
    """A token that stands for two counts twice, whatever the host does to its heads."""
    model = own(FITS[family]).double()
    for name, parameter in model.named_parameters():
        if ("pos" in name and "embed" in name) or "positional" in name:
            parameter.zero_()
    x = images().double().unflatten(-1, (GRID // 2, 2, PATCH))
    x[..., 1, :] = x[..., 0, :]  # neighbours are twins
    x = x.flatten(-3)
    expected = run(model, x)
    transom.apply(model, "tome", r=(TOTAL // 2,))
    with transom.trace(model) as trace:
        got = run(model, x)
    assert trace.lengths[0] == trace.tokens[0].layout.prefix + TOTAL // 2
    assert far(got, expected) < 1e-7  # sizes are counted in single precision


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


@dataclass(frozen=True)
class Note:
    """Token step: keeps the attention of the class token; changes nothing."""

    seen: list[Tensor]

    def __call__(self, tokens: Tokens, attended: Ask) -> Tokens:
        self.seen.append(attended.class_row())
        return tokens


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


SOME = (
    *("vit-parallel-scaling", "vit-parallel-things", "vit-differential", "dinov3", "rope-mixed"),
    *("beit-both", "relpos-mlp", "naflex-map", "cait", "torchvision-vit", "openai-clip-form"),
)


@pytest.mark.parametrize("restore", [None, "never", "end", "every"])
@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("none", "slice")])
@torch.no_grad()
def test_every_method_runs(method: str, restore: Any) -> None:
    """And an image does not depend on its batch, wherever tokens are restored."""
    for family in SOME:
        if family == "naflex-map" and restore == "never":
            continue  # it lays its tokens out again
        model, x = own(FITS[family]), images()
        expected = run(model, x)
        try:
            transom.apply(model, method, restore=restore, **strongest(method, DEPTH, TOTAL))
        except FitError:
            continue
        got = run(model, x)
        assert 1e-3 < far(got, expected) < 100
        assert far(run(model, x[1:]), [t[1:] for t in got]) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("family", FITS)
@torch.no_grad()
def test_copies_and_compiles(family: str) -> None:
    model, x = own(FITS[family]), images()
    transom.apply(model, "tome", r=REDUCED, check=False)
    expected = run(model, x)
    for double in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301
        assert same(run(double, x), expected)
        transom.remove(double)
        assert not transom.fittings(double)
    torch._dynamo.reset()
    encode = getattr(model, "encode_image", model)
    compiled = torch.compile(encode, backend="eager", fullgraph=True)
    assert far(tensors(compiled(x)), expected) < 1e-5


@pytest.mark.parametrize("family", REFUSED)
def test_refused(family: str) -> None:
    build, word = REFUSED[family]
    model = own(build)
    before = anatomy(model)
    with pytest.raises(HostError, match=word):
        transom.apply(model, "tome", r=REDUCED)
    assert anatomy(model) == before


def test_enough_families() -> None:
    assert len(FITS) + len(REFUSED) >= 27
    assert len(FITS) >= 27


def test_talking_heads_close_the_attention() -> None:
    model = own(FITS["cait"])
    before = anatomy(model)
    with pytest.raises(HostError, match=r"write-out fills the slot 'attention'.*talking heads"):
        transom.apply(model, WriteOut())
    assert anatomy(model) == before


MAPS = [
    family
    for family in FITS
    if family not in ("torchvision-vit", "openai-clip-form", "open-clip-both-towers")
]


@pytest.mark.parametrize("family", MAPS)
@torch.no_grad()
def test_maps_between_the_blocks(family: str) -> None:
    """forward_intermediates gives the maps it gave, restored to the grid."""
    model: Any = own(FITS[family])
    x = images()

    def maps() -> list[Tensor]:
        return tensors(model.forward_intermediates(x, intermediates_only=True))

    expected = maps()
    transom.apply(model, "none")
    assert far(maps(), expected) <= 1e-6
    transom.remove(model)
    for method, settings in (("tome", {"r": REDUCED}), ("random", {"keep_rate": 0.5})):
        transom.apply(model, method, **settings)
        assert far(maps(), expected) > 1e-3
        transom.remove(model)


@pytest.mark.parametrize(
    "family",
    ["vit-parallel-things", "eva02", "rope-mixed", "beit-shared", "relpos-mlp", "naflex-rope"]
    + [f for f in ("open-clip",) if f in FITS],
)
def test_training_with_the_hosts_checkpointing(family: str) -> None:
    """Gradients are the same with and without, for a method that moves tokens."""
    model: Any = own(FITS[family]).double()
    own(lambda: run(model, images().double()))
    transom.apply(model, "tome", r=REDUCED)
    seen = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model.zero_grad()
        run(model, images().double())[0].square().sum().backward()
        seen.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(seen[0]) > 10
    assert far(seen[1], seen[0]) < 1e-8


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


MULTIHEAD = [f for f in ("torchvision-vit", "openai-clip-form", "open-clip") if f in FITS]


@pytest.mark.parametrize("family", MULTIHEAD)
def test_the_fast_path_stays_what_it_is(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain calls take PyTorch's fast path as often as before; hooks on the attention fire."""
    calls, fired = [], []
    native = torch._native_multi_head_attention

    def counted(*args: Any) -> Any:
        calls.append(1)
        return native(*args)

    monkeypatch.setattr(torch, "_native_multi_head_attention", counted)
    model, x = own(FITS[family]), images()
    attention = [m for m in model.modules() if isinstance(m, nn.MultiheadAttention)]
    attention[0].register_forward_hook(lambda *args: fired.append(1))
    with torch.no_grad():
        expected = run(model, x)
        fast = len(calls)
        assert fast == (0 if family == "openai-clip-form" else DEPTH)
        transom.apply(model, "none", check=False)
        assert same(run(model, x), expected)
        assert len(calls) == 2 * fast
        transom.remove(model)
        transom.apply(model, "tome", r=REDUCED, check=False)
        reduced = run(model, x)
        assert len(calls) == 2 * fast
        assert len(fired) == 3
    # with gradients PyTorch leaves the fast path
    assert far(run(model, x), reduced) < 1e-5
    transom.remove(model)
    with torch.no_grad():
        assert same(run(model, x), expected)
    assert len(calls) == 3 * fast


@torch.no_grad()
def test_towers_that_take_the_batch_second() -> None:
    """(N, B, D) and (B, N, D) are two ways to write the same."""
    second, first = ImageTower(), ImageTower(batch_first=True)
    randomised(second)
    first.load_state_dict(second.state_dict())
    first.eval()
    x, outs = images(3), []
    for model in (first, second):
        transom.apply(model, "tome", r=REDUCED)
        outs.append(model(x))
    assert far(outs[:1], outs[1:]) < 1e-5

    # a loop of one's own sees the form it knows
    h = torch.randn(TOTAL + 1, 3, 32)
    for i, block in enumerate(second.transformer.resblocks):
        h = block(h)
        assert h.shape == (TOTAL + 1 - REDUCED * (i + 1), 3, 32)


@pytest.mark.skipif("open-clip-both-towers" not in FITS, reason="open_clip is not installed")
@torch.no_grad()
def test_the_text_tower_is_left_alone() -> None:
    model: Any = own(FITS["open-clip-both-towers"])
    words = torch.randint(1, 64, (2, 8))
    expected = model.encode_text(words)
    transom.apply(model, "tome", r=REDUCED)
    assert transom.fittings(model)[0].host.name == "visual"
    assert torch.equal(model.encode_text(words), expected)
    assert len(model(images(), words)) == 3
