"""DPN: image tokens are pooled in 2-D inside a decoder, by a stride that a router picks a prompt.

Behind some layers the image tokens, as a map (H, W, D), are max-pooled. With h (B, N, D) as the
layer leaves it, and c the mean of h over the tokens of a word <ROUTER> in the question:

    p = softmax(W2 GELU(W1 LN(c)) / 10)          one probability a stride, W1: D -> D / 4, no biases
    e = argmax p                                 in training: drawn from p
    v <- p_e pool(v, stride_e)                   also for stride 1

(B, N, D) becomes (B, N - n + n', D) with n' = floor(H / s_h) floor(W / s_w). Tokens that are left
are counted anew where positions enter the attention, and each layer continues from the length of
its own cache. Routing loss: hinge on scale[argmax p] max p, which pushes towards stronger pooling.

Source: Ai et al., Dynamic Pyramid Network for Efficient Multimodal Large Language Model, 2025;
official code aihao2000/DPN-LLaVA@92239ca. Checked against a transcription of its functions:
router, pooling in evaluation and training, a decoder with cached decoding, the loss. Not checked:
its training and its benchmark figures, which need LLaVA-1.5-7B.

Differences, all deliberate: prompts of a batch may pool by different strides also in evaluation
(the shorter ones are padded in front, and padding is hidden); without a <ROUTER> word the last
token is the summary; the routing loss averages over samples and layers, as all layers of the
official code share one list by accident (`shared=False` gives the evident intention).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transom.errors import SettingsError, TokensError
from transom.hosts.base import Host
from transom.ops.matching import Matching
from transom.registry import Method, Offer, Takes, Training
from transom.slots import Ask, Fill
from transom.tokens import Tokens

Size = tuple[int, int]

TEMPERATURE = 10.0
LEAST = 18  # pooled tokens below which training draws again


class Router(nn.Module):
    """Scores for each stride from the summary of a question.

    Args:
        dim: channels D.
        experts: number of strides.
    """

    def __init__(self, dim: int, experts: int) -> None:
        super().__init__()
        self.mlp1 = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, dim // 4, bias=False), nn.GELU()
        )
        self.predictor = nn.Linear(dim // 4, experts, bias=False)

    def forward(self, c: Tensor) -> Tensor:
        """Logits (B, E) from c (B, D); probabilities are softmax(logits / 10)."""
        return self.predictor(self.mlp1(c))


def summary(h: Tensor, chosen: Tensor) -> Tensor:
    """Mean (B, D) of h (B, N, D) over the chosen tokens (B, N) bool."""
    weight = chosen.to(h.dtype)
    return (weight[:, None] @ h)[:, 0] / weight.sum(1, keepdim=True)


def draw(probs: Tensor, strides: Sequence[Size], sizes: Sequence[Size]) -> Tensor:
    """Strides drawn from probs (B, E), except those that leave fewer than 18 tokens.

    Args:
        probs: (B, E).
        strides: of the experts.
        sizes: map of each prompt.

    Returns:
        (B,) int64.
    """
    allowed = torch.tensor(
        [[(h // s[0]) * (w // s[1]) >= LEAST for s in strides] for h, w in sizes],
        device=probs.device,
    )
    # a map that is too small for all keeps its tokens
    areas = [a * b for a, b in strides]
    allowed[~allowed.any(1), areas.index(min(areas))] = True
    return torch.multinomial(probs.detach() * allowed, 1)[:, 0]


class Pooled(NamedTuple):
    """One prompt after pooling.

    x: (n', D) image tokens, row by row.
    size: (H', W') of their map.
    cells: (H', W', s_h * s_w) old places among the image tokens that each new one stands for.
    """

    x: Tensor
    size: Size
    cells: Tensor


def pool(v: Tensor, size: Size, stride: Size, function: str = "max") -> Pooled:
    """Pool image tokens by a stride; what is left over at the right and bottom falls away.

    Args:
        v: (n, D), row by row.
        size: (H, W) with H W = n.
        stride: (s_h, s_w); (1, 1) changes nothing.
        function: "max" or "average".

    Returns:
        See :class:`Pooled`.
    """
    height, width = size
    places = torch.arange(height * width, device=v.device).view(height, width)
    rows, columns = height // stride[0], width // stride[1]
    cut = places[: rows * stride[0], : columns * stride[1]]
    cells = cut.view(rows, stride[0], columns, stride[1]).transpose(1, 2).flatten(2)
    groups = v[cells.flatten()].view(rows * columns, stride[0] * stride[1], -1)
    pooled = groups.amax(1) if function == "max" else groups.mean(1)
    return Pooled(pooled, (rows, columns), cells)


def routing_loss(
    probs: Sequence[Tensor],
    scales: Sequence[float] = (0.0, 1.0, 2.0),
    margin: float = 1.5,
    shared: bool = True,
) -> Tensor:
    """Hinge that pushes routers towards stronger pooling; the total loss takes 0.001 of it.

    Args:
        probs: (B, E) of each pooling layer.
        scales: worth of each stride.
        margin: worth that is enough.
        shared: one mean over all layers and samples (as released) instead of one a layer.

    Returns:
        A scalar.
    """
    worths = []
    for p in probs:
        best, expert = p.max(-1)
        worths.append(best * p.new_tensor(scales)[expert])
    if shared:
        return F.relu(margin - torch.cat(worths).mean())
    return torch.stack([F.relu(margin - worth.mean()) for worth in worths]).mean()


class Pool(nn.Module):
    """Token step behind a layer: pools the image by a stride that the router picks.

    Attributes:
        router: None for always the last stride.
        strides: of the experts.
        earlier: strides of the experts of earlier pooling layers, to know the map from its size.
        word: id of <ROUTER>; None takes the last token.
        function: "max" or "average".
        grid: (rows, columns) of the image at first; None for a square.
    """

    def __init__(
        self,
        router: Router | None,
        strides: Sequence[Size],
        earlier: Sequence[Sequence[Size]],
        word: int | None,
        function: str,
        grid: Size | None,
    ) -> None:
        super().__init__()
        self.router = router
        self.strides = tuple(strides)
        self.earlier = tuple(earlier)
        self.word = word
        self.function = function
        self.grid = grid

    def forward(self, tokens: Tokens, attended: Ask) -> Tokens:
        visual = tokens.record.images("dpn")
        if visual is None:
            return tokens
        counts = visual.sum(1).tolist()
        if min(counts) < max(a * b for a, b in self.strides):
            return tokens
        self._expect_one(visual)
        sizes = [self._size(count) for count in counts]
        if self.router is None:
            expert = torch.full((len(counts),), len(self.strides) - 1)
            worth = tokens.x.new_ones(len(counts))
        else:
            probs = (self.router(summary(tokens.x, self._summary(tokens))) / TEMPERATURE).softmax(
                -1
            )
            if attended.memory is not None:
                attended.memory["probs"] = probs
            expert = draw(probs, self.strides, sizes) if self.training else probs.argmax(-1)
            worth = probs.gather(1, expert[:, None])[:, 0]
        return self._pooled(tokens, visual, sizes, expert.tolist(), worth)

    def _expect_one(self, visual: Tensor) -> None:
        """Refuse prompts whose image tokens are not one piece."""
        begins = visual[:, 1:] & ~visual[:, :-1]
        pieces = begins.sum(1) + visual[:, 0]
        if int(pieces.max()) > 1:
            raise TokensError(
                f"prompt {int(pieces.argmax())} holds {int(pieces.max())} images, but DPN pools "
                "one map a prompt; give one image a prompt"
            )

    def _summary(self, tokens: Tokens) -> Tensor:
        words = tokens.record.words
        chosen = torch.zeros_like(tokens.x[..., 0], dtype=torch.bool)
        if self.word is None:
            chosen[:, -1] = True
            return chosen
        if words is None or not (words == self.word).any(1).all():
            raise TokensError(
                f"a prompt has no word {self.word}, which DPN's router reads; append it to every "
                "question, or fit with router_token=None to read the last token"
            )
        return words == self.word

    def _size(self, count: int) -> Size:
        """The map that `count` image tokens make: the first grid, pooled by earlier strides."""
        for path in product(*self.earlier):
            height, width = self.grid or (0, 0)
            if self.grid is None:
                grown = count
                for a, b in path:
                    grown *= a * b
                height = width = round(grown**0.5)
            for a, b in path:
                height, width = height // a, width // b
            if height * width == count:
                return height, width
        raise TokensError(
            f"{count} image tokens make no map: they are no square, and the grid is "
            f"{self.grid}; fit with image_grid=(rows, columns), and give one image a prompt"
        )

    def _pooled(
        self, tokens: Tokens, visual: Tensor, sizes: list[Size], expert: list[int], worth: Tensor
    ) -> Tokens:
        rows: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        for b, size in enumerate(sizes):
            image = visual[b].nonzero()[:, 0]
            done = pool(tokens.x[b, image], size, self.strides[expert[b]], self.function)
            cells = done.cells.flatten(0, 1)
            start, end = int(image[0]), int(image[-1]) + 1
            places = torch.arange(tokens.count, device=image.device)
            keep = torch.cat([places[:start], image[cells[:, 0]], places[end:]])
            x = torch.cat([tokens.x[b, :start], done.x * worth[b], tokens.x[b, end:]])
            source = image[cells[:, 1:].flatten()]
            new = start + torch.arange(len(cells), device=image.device)
            into = new.repeat_interleave(cells.shape[1] - 1)
            rows.append((x, keep, source, into))
        return self._together(tokens, rows)

    def _together(self, tokens: Tokens, rows: Sequence[tuple[Tensor, ...]]) -> Tokens:
        """One batch again: shorter prompts are padded in front, and the padding is hidden."""
        length, most = max(len(r[0]) for r in rows), max(len(r[2]) for r in rows)
        even = all(len(r[0]) == length for r in rows)
        xs, keeps, sources, intos, real = [], [], [], [], []
        for x, keep, source, into in rows:
            missing = length - len(x)
            front, lead = x[:1].expand(missing, -1), keep[:1].expand(missing)
            xs.append(torch.cat([front, x]))
            keeps.append(torch.cat([lead, keep]))
            # a source that is there twice flows to the same place
            fill = source[:1] if len(source) else keep[:1]
            goal = into[:1] if len(into) else keep.new_zeros(1)
            sources.append(torch.cat([source, fill.expand(most - len(source))]))
            intos.append(torch.cat([into, goal.expand(most - len(into))]) + missing)
            real.append(torch.arange(length, device=x.device) >= missing)
        matching = Matching(torch.stack(keeps), torch.stack(sources), torch.stack(intos))
        moved = Tokens(tokens.x, tokens.record)._after(torch.stack(xs), matching, None)
        record = moved.record
        if not even:
            valid = torch.stack(real)
            valid = valid if record.valid is None else valid & record.valid
            record = replace(record, valid=valid)
        return Tokens(moved.x, record)


class Routing(Training):
    """Adds the routing loss of all routers.

    Args:
        coefficient, margin, shared: as in :meth:`DPN.training`.
    """

    def __init__(self, coefficient: float, margin: float, shared: bool) -> None:
        self.coefficient = coefficient
        self.margin = margin
        self.shared = shared
        self.probs: list[Tensor] = []
        self.hooks: list[Any] = []

    def at_step(self, model: nn.Module, step: int, total: int) -> Mapping[str, Any]:
        self.probs.clear()
        if step == total:
            for hook in self.hooks:
                hook.remove()
            self.hooks.clear()
        elif not self.hooks:
            own = [m for m in model.modules() if isinstance(m, Router)]
            self.hooks = [router.register_forward_hook(self._note) for router in own]
        return {}

    def extra_loss(self, model: nn.Module, outputs: Tensor) -> Tensor | None:
        """The loss of the pass just made; None where no router was asked."""
        if not self.probs:
            return None
        loss = routing_loss(self.probs, margin=self.margin, shared=self.shared)
        self.probs = []
        return self.coefficient * loss

    def _note(self, module: nn.Module, given: Any, logits: Tensor) -> None:
        # not again when checkpointing recomputes a layer in the backward pass
        if module.training and logits.requires_grad:
            self.probs.append((logits / TEMPERATURE).softmax(-1))


@dataclass(frozen=True)
class DPN(Method):
    """Dynamic pyramid network.

    Attributes:
        layers: behind which layers images are pooled, counted from 0; None: about a quarter, half
            and three quarters of the depth, as released for 32 layers.
        strides: the strides to choose from behind each of these layers: one pair a choice.
        router_token: id of the word whose token the routers read; None reads the last token.
        adaptive: whether routers choose; else the last stride is taken always, untrained.
        pooling: "max" or "average".
        image_grid: (rows, columns) of the image tokens; None when they are a square.
    """

    layers: tuple[int, ...] | None = None
    strides: tuple[tuple[tuple[int, int], ...], ...] = (
        ((1, 1), (2, 2), (4, 4)),
        ((1, 1), (2, 2), (4, 4)),
        ((1, 1), (2, 2)),
    )
    router_token: int | None = None
    adaptive: bool = True
    pooling: str = "max"
    image_grid: tuple[int, int] | None = None
    takes: ClassVar[Takes] = "decoder"

    def __post_init__(self) -> None:
        if self.layers is not None:
            layers = self.layers
            if list(layers) != sorted(set(layers)) or any(i < 0 for i in layers):
                raise SettingsError(f"layers is {layers}; expected rising numbers of layers from 0")
            if len(self.strides) != len(layers):
                raise SettingsError(
                    f"strides has {len(self.strides)} entries for {len(layers)} pooling layers; "
                    "expected the strides to choose from for each of them"
                )
        given = [s for choices in self.strides for s in choices]
        if not all(self.strides) or any(len(s) != 2 or min(s) < 1 for s in given):
            raise SettingsError(
                f"strides is {self.strides!r}; expected pairs (rows, columns) of at least 1"
            )
        if self.pooling not in ("max", "average"):
            raise SettingsError(f"pooling is {self.pooling!r}; expected 'max' or 'average'")

    @property
    def needs_training(self) -> bool:
        """Whether routers are there to be trained."""
        return self.adaptive

    def fit(self, host: Host) -> list[Fill]:
        layers = self.layers
        if layers is None:
            parts = len(self.strides)
            layers = tuple(
                sorted({max(0, host.depth * (i + 1) // (parts + 1) - 1) for i in range(parts)})
            )
        if layers and layers[-1] >= host.depth:
            raise SettingsError(
                f"layers names {layers[-1]}, but this decoder has layers 0 to {host.depth - 1}"
            )
        strides = self.strides[: len(layers)]
        chosen = dict(zip(layers, range(len(layers)), strict=True))
        fills = []
        for i in range(host.depth):
            step = None
            if i in chosen:
                place = chosen[i]
                router = Router(host.width, len(strides[place])) if self.adaptive else None
                earlier = strides[:place] if self.adaptive else [s[-1:] for s in strides[:place]]
                step = Pool(
                    router,
                    strides[place],
                    earlier,
                    self.router_token,
                    self.pooling,
                    self.image_grid,
                )
            fills.append(Fill(after=step, asks=False, drops=True, renumbers=True))
        return fills

    def training(
        self, coefficient: float = 0.001, margin: float = 1.5, shared: bool = True, **options: Any
    ) -> Training:
        """The routing loss of the paper.

        Args:
            coefficient: of the routing loss beside that of the words.
            margin: budget: worth of the strides, averaged, from which on nothing is asked for.
            shared: as in :func:`routing_loss`.
            **options: none.

        Raises:
            SettingsError: an option is unknown, or a number out of range.
        """
        if options:
            raise SettingsError(
                f"dpn's training has no {list(options)}; it has coefficient, margin and shared"
            )
        if coefficient < 0 or margin < 0:
            raise SettingsError(
                f"dpn's training has coefficient {coefficient} and margin {margin}; expected at "
                "least 0"
            )
        return Routing(coefficient, margin, shared)

    @classmethod
    def grid(cls, depth: int, patches: int) -> list[dict[str, Any]]:
        # untrained: halve the sides once behind a late, a middle or an early layer
        places = (max(0, round(depth * part) - 1) for part in (0.75, 0.5, 0.25))
        return [{"layers": (i,), "strides": (((2, 2),),), "adaptive": False} for i in places]


OFFERS = (Offer("objective", "dpn-routing", routing_loss),)
