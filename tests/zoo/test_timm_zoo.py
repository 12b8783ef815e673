"""Every family of timm, torchvision and open_clip fits exactly, or is refused with the reason."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import transom
from tests.common.cases import METHODS, anatomy, same, strongest
from tests.common.hosts import tensors
from tests.common.probes import WriteOut
from tests.zoo.timm_probes import REDUCED, TOTAL, Look, Probe, Shuffle, far, images, run
from tests.zoo.timm_zoo import DEPTH, FITS, GRID, PATCH, REFUSED, own
from transom.errors import FitError, HostError

# Norms that compute in single precision, whatever the model is in.
SINGLE = ("deepseek-encoder",)


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
    and family not in ("vit-hybrid", "cct")  # convolutions see the neighbours
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
        except HostError as error:
            if "which is closed in this" not in str(error):
                raise
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
