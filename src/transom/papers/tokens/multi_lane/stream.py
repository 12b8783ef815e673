"""A multi-label stream of tasks, learning it in order, and scoring what has been seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from transom.errors import DataError, SettingsError
from transom.papers.tokens.multi_lane.model import MultiLane, lane_loss


@dataclass(frozen=True)
class Task:
    """One task of a stream.

    Attributes:
        classes: new in this task.
        images: (M, 3, h, w) to learn from; each shows at least one of `classes`.
        labels: (M, all classes) float, 1 where a class of this task is shown. Classes of other
            tasks are not told, though they may be in the picture.
    """

    classes: tuple[int, ...]
    images: Tensor
    labels: Tensor


def mosaics(
    images: Tensor,
    labels: Tensor,
    classes: Sequence[int],
    count: int,
    *,
    own: Sequence[int] | None = None,
    side: int = 2,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Pictures with several labels, put together from single-label images such as CIFAR-10's.

    Each has `side`² tiles, whose classes are drawn evenly.

    Args:
        images: (M, 3, h, w).
        labels: (M,) class of each image.
        classes: of the tiles.
        count: pictures.
        own: at least one tile of each picture is of one of these; None for no such wish.
        side: tiles in a row and in a column.
        seed: of the draw.

    Returns:
        Pictures (count, 3, side·h, side·w), and (count, 1 + largest class) float labels, 1 where a
        class is shown.

    Raises:
        DataError: the labels do not fit the images, or a class has no image.
        SettingsError: count or side is below 1.
    """
    if images.dim() != 4 or labels.shape != images.shape[:1]:
        raise DataError(
            f"images are {tuple(images.shape)} and labels {tuple(labels.shape)}; expected "
            "(M, 3, h, w) and (M,)"
        )
    if count < 1 or side < 1:
        raise SettingsError(f"count is {count} and side {side}; expected at least 1 of each")
    members = {int(c): (labels == c).nonzero()[:, 0] for c in classes}
    empty = [c for c, rows in members.items() if not len(rows)]
    if empty:
        raise DataError(f"no image has class {empty[0]}, which was asked for")
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    shown = torch.tensor(list(classes))[draw(len(classes), count, side * side)]
    if own is not None:
        place = draw(side * side, count)
        shown[torch.arange(count), place] = torch.tensor(list(own))[draw(len(own), count)]
    which = torch.stack([members[c][draw(len(members[c]))] for c in shown.flatten().tolist()])
    tiles = images[which].unflatten(0, (count, side, side))  # (count, row, column, 3, h, w)
    pictures = tiles.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
    return pictures, torch.zeros(count, 1 + max(classes)).scatter_(1, shown, 1.0)


def mosaic_stream(
    images: Tensor,
    labels: Tensor,
    class_mask: Sequence[Sequence[int]],
    count: int,
    *,
    side: int = 2,
    seed: int = 0,
) -> list[Task]:
    """One task of mosaics for each row of class_mask; see :func:`mosaics`.

    Tiles may be of any class of the stream, at least one is of the task.

    Args:
        images: (M, 3, h, w).
        labels: (M,) class of each image.
        class_mask: classes of each task.
        count: mosaics of each task.
        side: tiles in a row and in a column.
        seed: of the draw; each task draws anew.

    Returns:
        Tasks with the labels of their own classes only.
    """
    everything = [c for task in class_mask for c in task]
    tasks = []
    for i, own in enumerate(class_mask):
        pictures, told = mosaics(
            images, labels, everything, count, own=own, side=side, seed=seed * len(class_mask) + i
        )
        mine = torch.zeros(told.shape[1]).index_fill_(0, torch.tensor(list(own)), 1.0)
        tasks.append(Task(tuple(own), pictures, told * mine))
    return tasks


def average_precision(scores: Tensor, labels: Tensor) -> Tensor:
    """Average precision of each class: mean precision at the rank of every right item.

    Args:
        scores: (M, C), higher for more certain.
        labels: (M, C), nonzero where right.

    Returns:
        (C,) in [0, 1]; NaN for a class that no item has.
    """
    order = scores.argsort(dim=0, descending=True, stable=True)
    right = (labels.gather(0, order) > 0).to(torch.float64)
    rank = torch.arange(1, len(right) + 1, device=right.device)[:, None]
    precision = right.cumsum(0) / rank
    return (precision * right).sum(0) / right.sum(0)


@dataclass
class Scores:
    """Mean average precision after each task, in percent.

    Attributes:
        each: one number a task, over all classes seen until then.
    """

    each: list[float] = field(default_factory=list)

    @property
    def average(self) -> float:
        """Mean over the tasks."""
        return sum(self.each) / len(self.each)

    @property
    def last(self) -> float:
        """After the last task, over all classes."""
        return self.each[-1]


@torch.no_grad()
def score(model: MultiLane, images: Tensor, labels: Tensor, batch: int = 256) -> float:
    """Mean average precision in percent over the classes of all tasks seen so far.

    Args:
        model: with its current task.
        images: (M, 3, h, w) of the test set.
        labels: (M, classes), every class told.
        batch: images at a time.

    Raises:
        DataError: none of the classes seen has a right image.
    """
    trained = model.training
    model.eval()
    logits = torch.cat([model(part).logits for part in images.split(batch)])
    model.train(trained)
    seen = [c for task in model.lanes.class_mask[: model.task + 1] for c in task]
    found = average_precision(logits[:, seen], labels[:, seen])
    if found.isnan().all():
        raise DataError(f"no image of the test set shows one of the classes {seen}")
    return 100 * float(found[~found.isnan()].mean())


def learn(
    model: MultiLane,
    stream: Sequence[Task],
    test: tuple[Tensor, Tensor],
    *,
    epochs: int = 30,
    lr: float = 0.03,
    batch: int = 128,
    seed: int = 0,
) -> Scores:
    """Learn the tasks in order, each from its own data alone, and score after each one.

    Adam with a cosine schedule, made anew for each task.

    Args:
        model: at its first task.
        stream: one task for each of the model's.
        test: images (M, 3, h, w) and labels (M, classes) of all tasks.
        epochs: of each task.
        lr: learning rate at the start of each task.
        batch: images a step.
        seed: of the order of images.

    Returns:
        mAP after each task.

    Raises:
        SettingsError: the stream has other tasks than the model.
    """
    given = tuple(task.classes for task in stream)
    if given != model.lanes.class_mask[model.task :]:
        raise SettingsError(
            f"the stream has tasks {given}, but the model goes on with "
            f"{model.lanes.class_mask[model.task :]}"
        )
    generator = torch.Generator().manual_seed(seed)
    parameters, scores = model.learnable(), Scores()
    for i, task in enumerate(stream):
        if i:
            model.next_task()
        optimizer = torch.optim.Adam(parameters, lr=lr)
        steps = epochs * -(-len(task.images) // batch)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        model.train()
        for _ in range(epochs):
            for rows in torch.randperm(len(task.images), generator=generator).split(batch):
                loss = lane_loss(
                    model(task.images[rows]),
                    task.labels[rows],
                    task.classes,
                    keyed=model.lanes.head_mode == "task",
                )
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
        scores.each.append(score(model, *test))
    return scores
