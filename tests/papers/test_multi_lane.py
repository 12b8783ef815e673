"""MULTI-LANE: old tasks stay as they are, a pathway is cheap, and a stream is learned in order."""

from __future__ import annotations

import functools
import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from transom.errors import DataError, HostError, SettingsError
from transom.papers.tokens.multi_lane import (
    Lanes,
    MultiLane,
    Task,
    average_precision,
    lane_loss,
    learn,
    merged_down,
    mosaic_stream,
    mosaics,
    score,
    summarise,
    with_lanes,
)

CIFAR = Path(__file__).parents[3] / "shared" / "data" / "cifar10-test.parquet"
MASK = ((5, 6), (7, 8), (9,))


def lanes(**changes: Any) -> Lanes:
    settings = {"num_selectors": 4, "num_prompts": 4, "num_prompt_layers": 2, **changes}
    return Lanes(**{"class_mask": MASK, **settings})


def vit(size: int = 8, **changes: Any) -> VisionTransformer:
    torch.manual_seed(0)
    small = {"patch_size": 2, "embed_dim": 32, "depth": 3, "num_heads": 4, "num_classes": 10}
    return VisionTransformer(img_size=size, **{**small, **changes}).eval()


def made(size: int = 8, **changes: Any) -> MultiLane:
    torch.manual_seed(1)
    return with_lanes(vit(size), lanes(**changes), 10).eval()


def digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.from_numpy(found.images).float()[:, None].expand(-1, 3, -1, -1) / 8 - 1
    return images.contiguous(), torch.from_numpy(found.target).long()


@functools.cache
def pretrained() -> VisionTransformer:
    """A tiny ViT that has learned the first half of the digits."""
    images, labels = digits()
    known = (labels < 5).nonzero()[:, 0]
    model = vit()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(120):
        rows = known[torch.randint(len(known), (64,), generator=generator)]
        loss = F.cross_entropy(model(images[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def stream() -> tuple[list[Task], tuple[Tensor, Tensor]]:
    """New digits, two tasks of two and one of one; every other picture is for the test."""
    images, labels = digits()
    tasks = []
    for classes in MASK:
        rows = [i for i in range(0, len(labels), 2) if int(labels[i]) in classes]
        others = [i for i in range(0, len(labels), 2) if int(labels[i]) >= 5 and i not in rows]
        rows += others[: len(rows)]  # pictures without a class of the task, as mosaics have tiles
        told = F.one_hot(labels[rows], 10).float()
        told *= torch.zeros(10).index_fill_(0, torch.tensor(classes), 1.0)
        tasks.append(Task(classes, images[rows], told))
    new = (labels >= 5).nonzero()[:, 0]
    new = new[new % 2 == 1]
    return tasks, (images[new], F.one_hot(labels[new], 10).float())


def test_old_tasks_are_not_touched_and_new_ones_are_learned() -> None:
    torch.manual_seed(2)
    tasks, test = stream()
    model = with_lanes(pretrained(), lanes(), 10)
    before = {n: p.clone() for n, p in model.state_dict().items()}
    first: list[Tensor] = []
    scores = []
    for i in range(3):
        if i:
            model.next_task()
        scores += learn_one(model, tasks[i], test)
        model.eval()
        with torch.no_grad():
            together = model(test[0]).logits
            for j, logits in enumerate(first):
                model.task = j  # the same pathways as then, so that rounding is the same too
                again = model(test[0]).logits[:, list(MASK[j])]
                assert torch.equal(again, logits), "an old task interferes"
                torch.testing.assert_close(together[:, list(MASK[j])], logits)
        model.task = i
        first.append(together[:, list(MASK[i])])
    learned = {"selectors", "head.weight", "head.bias"}
    changed = {n for n, p in model.state_dict().items() if not torch.equal(p, before[n])}
    assert changed == learned | {f"blocks.{i}.attn.prompts" for i in range(2)}
    assert min(scores) > 40, scores  # chance is a fifth


def learn_one(model: MultiLane, task: Task, test: tuple[Tensor, Tensor]) -> list[float]:
    """The protocol for one task, whichever is current."""
    optimizer = torch.optim.Adam(model.learnable(), lr=0.03)
    model.train()
    generator = torch.Generator().manual_seed(0)
    for _ in range(8):
        for rows in torch.randperm(len(task.images), generator=generator).split(64):
            loss = lane_loss(model(task.images[rows]), task.labels[rows], task.classes)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return [score(model, *test)]


def flops(model: MultiLane, size: int) -> list[int]:
    """Of one image, after each task."""
    counts = []
    for task in range(3):
        model.task = task
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.zeros(1, 3, size, size))
        counts.append(counter.get_total_flops())
    return counts


def test_a_pathway_costs_its_own_tokens() -> None:
    small, large = flops(made(16), 16), flops(made(32), 32)  # 65 and 257 tokens
    pathway = [counts[1] - counts[0] for counts in (small, large)]
    assert small[2] - small[1] == pathway[0]
    frozen = [counts[0] - added for counts, added in zip((small, large), pathway, strict=True)]
    assert frozen[1] > 3.9 * frozen[0]
    assert pathway[1] < 2 * pathway[0]  # only the summary looks at the patches
    assert pathway[0] < 0.15 * frozen[0]


def test_the_frozen_stream_is_the_host() -> None:
    host, x = vit(), torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(
        with_lanes(host, lanes()).eval()(x).frozen_cls, host.forward_features(x)[:, 0]
    )


def test_summaries_are_written_out() -> None:
    torch.manual_seed(0)
    s, x = torch.randn(2, 3, 4, 8), torch.randn(3, 7, 8, requires_grad=True)
    weight = (torch.einsum("tbsc,bnc->tbsn", s, x) * 8**-0.5).softmax(-1)
    expected = torch.einsum("tbsn,bnc->tbsc", weight, x)
    out = summarise(s.requires_grad_(), x)
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    assert x.grad is None


@pytest.mark.parametrize(
    "changes", [{"dandr": False}, {"tome": 6}, {"head_mode": "task"}, {"normalize": False}]
)
def test_variants(changes: dict[str, Any]) -> None:
    model, x = made(**changes), torch.randn(4, 3, 8, 8)
    model.task = 1
    plain = made()
    plain.task = 1
    out = model(x)
    assert not torch.allclose(out.logits, plain(x).logits, atol=1e-4)
    if changes.get("head_mode") == "task":
        keys = F.normalize(model.task_identifier.keys[:2], dim=-1)
        near = F.normalize(out.frozen_cls, dim=-1) @ keys.mT
        assert torch.equal(out.task, near.argmax(-1))
        torch.testing.assert_close(out.similarity, near.amax(-1).mean())
        front = F.normalize(out.task_tokens[torch.arange(4), out.task, 0], dim=-1)
        torch.testing.assert_close(out.logits, model.head(front))
    model.train()
    loss = lane_loss(model(x), torch.tensor([7, 8, 7, 8]), MASK[1], keyed=True)
    loss.backward()
    assert torch.isfinite(loss)


def test_without_drop_and_replace_the_patches_are_seen_once() -> None:
    model, x = made(dandr=False), torch.randn(1, 3, 8, 8)
    calls = []
    inner = summarise

    def counted(*args: Tensor) -> Tensor:
        calls.append(1)
        return inner(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transom.papers.tokens.multi_lane.model.summarise", counted)
        model(x)
        assert len(calls) == 1
        made()(x)
        assert len(calls) == 1 + 3


def test_merged_down() -> None:
    x = torch.randn(2, 17, 8)
    out = merged_down(x, 6)
    assert out.shape[1] <= 6
    assert torch.equal(out[:, 0], x[:, 0])
    assert torch.equal(merged_down(x, 17), x)


def test_the_loss_is_that_of_the_task() -> None:
    model, x = made().train(), torch.randn(4, 3, 8, 8)
    out = model(x)
    told = torch.ones(4, 10)
    loss = lane_loss(out, told, (5, 6))
    own = F.softplus(-out.logits[:, 5:7]).sum() / 40
    torch.testing.assert_close(loss, own + 8 / 10 * torch.tensor(2.0).log())
    single = lane_loss(out, torch.tensor([5, 6, 5, 6]), (5, 6))
    torch.testing.assert_close(
        single, F.cross_entropy(out.logits[:, 5:7], torch.tensor([0, 1, 0, 1]))
    )


def test_a_new_task_starts_from_the_last() -> None:
    model = made()
    assert not torch.equal(model.selectors[0], model.selectors[1])
    model.next_task()
    assert torch.equal(model.selectors[0], model.selectors[1])
    prompts: Any = model.blocks[0].attn.prompts
    assert torch.equal(prompts[:, 0], prompts[:, 1])
    model.next_task()
    with pytest.raises(SettingsError, match="last one"):
        model.next_task()


def test_average_precision() -> None:
    from sklearn.metrics import average_precision_score

    torch.manual_seed(0)
    scores, labels = torch.randn(50, 4), (torch.rand(50, 4) < 0.3).float()
    expected = average_precision_score(labels.numpy(), scores.numpy(), average=None)
    assert average_precision(scores, labels).tolist() == pytest.approx(list(expected))


@pytest.mark.slow
def test_mosaics_of_digits_are_learned_in_order() -> None:
    images, labels = digits()
    test = mosaics(images[1::2], labels[1::2], [0, 1, 2, 3], 200, seed=5)
    mask = ((0, 1), (2, 3))
    tasks = mosaic_stream(images[::2], labels[::2], mask, 300)
    for task in tasks:
        assert task.images.shape == (300, 3, 16, 16)
        others = [c for c in range(4) if c not in task.classes]
        assert (task.labels[:, list(task.classes)].sum(1) > 0).all()
        assert (task.labels[:, others] == 0).all()
    torch.manual_seed(0)
    host = vit(16)
    optimizer = torch.optim.AdamW(host.parameters(), lr=2e-3)
    seen = mosaics(images[::2], labels[::2], [4, 5, 6, 7, 8, 9], 600, seed=9)
    for step in range(250):  # digits 4 to 9 are what the frozen ViT knows
        rows = slice(64 * step % 576, 64 * step % 576 + 64)
        loss = F.binary_cross_entropy_with_logits(host(seen[0][rows]), seen[1][rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model = with_lanes(host, lanes(class_mask=mask))
    chance = 100 * float(test[1][:, :4].mean())
    scores = learn(model, tasks, test, epochs=10, batch=32)
    assert len(scores.each) == 2
    assert scores.average == pytest.approx(sum(scores.each) / 2)
    assert scores.last > chance + 5, (scores, chance)


def cifar(part: str, count: int) -> tuple[Tensor, Tensor]:
    """The first images (count, 3, 32, 32) uint8 of a part of CIFAR-10, and their classes."""
    import numpy as np
    import pyarrow.parquet as pq
    from PIL import Image

    table = pq.read_table(CIFAR.with_name(f"cifar10-{part}.parquet")).slice(0, count).to_pylist()
    pixels = [np.asarray(Image.open(io.BytesIO(row["image"]))) for row in table]
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
    return images, torch.tensor([row["label"] for row in table])


NEEDS_CIFAR = pytest.mark.skipif(not CIFAR.exists(), reason="needs CIFAR-10 beside the project")


@pytest.mark.slow
@NEEDS_CIFAR
def test_mosaics_of_cifar_are_learned_in_order() -> None:
    """The incremental protocol: three tasks, all classes seen scored after each one.

    The frozen ViT is the one that ships, which learned all ten classes one by one; what is new to
    it are pictures of four of them.
    """
    from transom.measure.models import create

    mean, std = (torch.tensor(x)[:, None, None] for x in ((0.49, 0.48, 0.45), (0.25, 0.24, 0.26)))
    parts = [cifar(part, count) for part, count in (("train", 1200), ("test", 600))]
    train, held = [((images / 255 - mean) / std, labels) for images, labels in parts]
    mask = ((0, 1, 2), (3, 4, 5), (6, 7, 8, 9))
    tasks = mosaic_stream(*train, mask, 120)
    test = mosaics(*held, range(10), 100, seed=5)
    host: Any = create("transom/cifar10-vit")
    host.set_input_size(img_size=64)
    torch.manual_seed(0)
    model = with_lanes(host, lanes(class_mask=mask, num_selectors=8))
    scores = learn(model, tasks, test, epochs=3, batch=30)
    assert len(scores.each) == 3
    assert scores.average == pytest.approx(sum(scores.each) / 3)
    assert scores.last == scores.each[-1]
    chance = 100 * float(test[1].mean())
    assert scores.last > chance + 8, (scores, chance)


@NEEDS_CIFAR
def test_mosaics_of_cifar() -> None:
    images, labels = cifar("test", 200)
    pictures, told = mosaics(images, labels, range(10), 20)
    assert pictures.shape == (20, 3, 64, 64)
    for picture, row in zip(pictures, told, strict=True):
        shown = set()
        for tile in (picture[:, y : y + 32, x : x + 32] for y in (0, 32) for x in (0, 32)):
            same = (images == tile).flatten(1).all(1).nonzero()[:, 0]
            assert len(same)
            shown.add(int(labels[same[0]]))
        assert shown == set(row.nonzero()[:, 0].tolist())
    again = mosaics(images, labels, range(10), 20)
    assert torch.equal(again[0], pictures)


def test_bad_input() -> None:
    with pytest.raises(SettingsError, match="one task"):
        Lanes(((0, 1), (1, 2)))
    with pytest.raises(SettingsError, match="class 9"):
        with_lanes(vit(), lanes(), 8)
    with pytest.raises(SettingsError, match="num_prompt_layers"):
        with_lanes(vit(), lanes(num_prompt_layers=4))
    with pytest.raises(HostError, match="no registers"):
        with_lanes(vit(reg_tokens=2), lanes())
    with pytest.raises(HostError, match="plain"):
        with_lanes(torch.nn.Linear(2, 2), lanes())  # type: ignore[arg-type]
    with pytest.raises(DataError, match="class 3"):
        mosaics(torch.zeros(2, 3, 4, 4), torch.tensor([0, 1]), [3], 4)
    with pytest.raises(SettingsError, match="stream has tasks"):
        learn(made(), [], (torch.zeros(1, 3, 8, 8), torch.zeros(1, 10)))
