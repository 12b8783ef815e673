"""A frozen ViT with one cheap pathway a task."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from transom.errors import HostError, SettingsError, TokensError
from transom.ops import attention, matching, merging


@dataclass(frozen=True)
class Lanes:
    """Pathways beside a frozen ViT.

    Attributes:
        class_mask: classes of each task, in the order in which the tasks come.
        num_selectors: S, tokens that pool the patches in each pathway.
        num_prompts: K, learned keys and values of each task and layer.
        num_prompt_layers: first layers with prompts.
        dandr: drop the summaries behind each layer and put the selectors back; without it the
            patches are summarised in the first layer only, and the summaries travel on.
        normalize: scale the class token to length one in front of the head.
        head_mode: "concat" sums the pathways, each for its own classes; "task" chooses the
            pathway whose key is nearest to the frozen class token.
        tome: instead of selectors, merge the patches to at most so many tokens; 0 for selectors.
        init: of selectors, prompts and keys: "orthogonal" or "uniform" in [-1, 1].
    """

    class_mask: tuple[tuple[int, ...], ...]
    num_selectors: int = 20
    num_prompts: int = 20
    num_prompt_layers: int = 5
    dandr: bool = True
    normalize: bool = True
    head_mode: Literal["concat", "task"] = "concat"
    tome: int = 0
    init: Literal["orthogonal", "uniform"] = "orthogonal"

    def __post_init__(self) -> None:
        object.__setattr__(self, "class_mask", tuple(tuple(task) for task in self.class_mask))
        classes = [c for task in self.class_mask for c in task]
        if not classes or not all(self.class_mask) or len(set(classes)) != len(classes):
            raise SettingsError(
                f"class_mask is {self.class_mask!r}; expected the classes of each task, each "
                "class in one task"
            )
        for name, least in (("num_selectors", 1), ("num_prompts", 1), ("num_prompt_layers", 0)):
            if getattr(self, name) < least:
                raise SettingsError(f"{name} is {getattr(self, name)!r}; expected >= {least}")
        if self.head_mode not in ("concat", "task"):
            raise SettingsError(f"head_mode is {self.head_mode!r}; expected 'concat' or 'task'")
        if self.init not in ("orthogonal", "uniform"):
            raise SettingsError(f"init is {self.init!r}; expected 'orthogonal' or 'uniform'")
        if self.tome < 0 or self.tome == 1:
            raise SettingsError(f"tome is {self.tome!r}; expected 0, or at least 2 tokens")

    @property
    def tasks(self) -> int:
        """Number of tasks."""
        return len(self.class_mask)


class Laned(NamedTuple):
    """What a model with pathways returns.

    logits: (B, classes).
    task_tokens: (B, T, C) class tokens in front of the head; in training, and with head "task",
        all tokens (B, T, 1 + S, C) behind the last norm.
    frozen_cls: (B, C) class token of the frozen ViT.
    similarity: scalar, mean cosine of frozen_cls and the key; 1 without keys.
    task: (B,) pathway that made the logits; zeros with head "concat" and in training.
    """

    logits: Tensor
    task_tokens: Tensor
    frozen_cls: Tensor
    similarity: Tensor
    task: Tensor


def summarise(selectors: Tensor, x: Tensor) -> Tensor:
    """Soft pooling of all tokens by selectors: softmax_N(s xᵀ C^-1/2) x, one head, full width.

    Args:
        selectors: (T, B, S, C), normed.
        x: (B, N, C), normed, class token included; gets no gradient.

    Returns:
        (T, B, S, C).
    """
    x = x.detach()[None]
    return F.scaled_dot_product_attention(selectors, x, x, scale=x.shape[-1] ** -0.5)


def merged_down(x: Tensor, most: int) -> Tensor:
    """Tokens merged in halves by ToMe's matching on the tokens themselves, to at most `most`.

    Every round takes plain means, and the class token neither leaves nor receives.

    Args:
        x: (B, N, C).
        most: at least 2.

    Returns:
        (B, M, C) with M <= most.
    """
    x = x.detach()
    while x.shape[1] > most:
        x = merging.merge(x, matching.bipartite(x, x.shape[1] // 2, 1))
    return x


def lane_attention(attn: Any, u: Tensor, prompts: Tensor | None = None) -> Tensor:
    """The frozen attention inside each pathway, with prompts in front of keys and values.

    Args:
        attn: timm's Attention of the host.
        u: (T, B, M, C), normed.
        prompts: (2, T, K, H, d); None for none.

    Returns:
        (T, B, M, C).
    """
    lanes, batch = u.shape[:2]
    qkv = attn.qkv(u).unflatten(-1, (3, attn.num_heads, -1))
    q, k, v = qkv.permute(3, 0, 1, 4, 2, 5).flatten(1, 2)  # each (T·B, H, M, d)
    q, k = attn.q_norm(q), attn.k_norm(k)
    if prompts is not None:
        front = prompts.transpose(2, 3)[:, :, None].expand(-1, -1, batch, -1, -1, -1)
        front_k, front_v = front.flatten(1, 2).to(k.dtype)
        k, v = torch.cat([front_k, k], 2), torch.cat([front_v, v], 2)
    dropout = attn.attn_drop.p if attn.training else 0.0
    y = attention.attend(q, k, v, dropout=dropout, scale=attn.scale)
    y = attn.proj(attn.norm(y.transpose(1, 2).flatten(2)))
    out: Tensor = attn.proj_drop(y).unflatten(0, (lanes, batch))
    return out


def lane_branch(
    attn: Any,
    x: Tensor,
    tokens: Tensor,
    prompts: Tensor | None,
    lanes: Lanes,
    first: bool,
) -> Tensor:
    """What the attention branch adds to the tokens of each pathway.

    Args:
        attn: timm's Attention of the host.
        x: (B, N, C) of the frozen stream, normed.
        tokens: (T, B, 1 + S, C) of the pathways, normed.
        prompts: (2, T, K, H, d); None for none.
        lanes: settings.
        first: whether this is the first layer.

    Returns:
        (T, B, 1 + S, C); with tome (T, B, 1, C), for the class token alone.
    """
    if lanes.tome:
        u = merged_down(x, lanes.tome).expand(tokens.shape[0], -1, -1, -1)
        return lane_attention(attn, u, prompts)[:, :, :1]
    front, selectors = tokens[:, :, :1], tokens[:, :, 1:]
    if not lanes.dandr:
        u = torch.cat([front, summarise(selectors, x)], 2) if first else tokens
        return lane_attention(attn, u, prompts)
    u = torch.cat([front, summarise(selectors, x)], 2)
    # only the class token gathers; as released, the normed selectors are the branch's output
    return torch.cat([lane_attention(attn, u, prompts)[:, :, :1], selectors], 2)


class MultiLane(VisionTransformer):
    """timm's VisionTransformer with pathways; names of parameters are the official ones.

    Only selectors, prompts, head and keys are trained, see :meth:`learnable`.

    Args:
        lanes: settings.
        **settings: of timm's VisionTransformer.

    Raises:
        SettingsError: a class or a layer of `lanes` does not exist.
        HostError: the ViT has no class token, or pools its patches.
    """

    class_mask: Tensor

    def __init__(self, lanes: Lanes, **settings: Any) -> None:
        super().__init__(**settings)
        self.lanes = lanes
        if self.cls_token is None or self.global_pool != "token" or self.num_prefix_tokens != 1:
            raise HostError(
                "multi-lane copies and reads one class token; expected a ViT with class_token, "
                "no registers and global_pool='token'"
            )
        if lanes.num_prompt_layers > len(self.blocks):
            raise SettingsError(
                f"num_prompt_layers is {lanes.num_prompt_layers}; the ViT has {len(self.blocks)}"
            )
        last = max(c for task in lanes.class_mask for c in task)
        if last >= self.num_classes:
            raise SettingsError(
                f"class_mask names class {last}, but the head has {self.num_classes} classes"
            )
        self.task = 0
        width, tasks = self.embed_dim, lanes.tasks
        self.selectors = _drawn(lanes.init, tasks, lanes.num_selectors, width)
        for attn in self._prompted():
            heads = attn.num_heads
            shape = (2, tasks, lanes.num_prompts, heads, width // heads)
            attn.prompts = _drawn(lanes.init, *shape)
        if lanes.head_mode == "task":
            self.task_identifier = nn.Module()
            self.task_identifier.register_parameter("keys", _drawn(lanes.init, tasks, width))
        mask = torch.zeros(tasks, self.num_classes, dtype=torch.bool)
        for row, classes in zip(mask, lanes.class_mask, strict=True):
            row[list(classes)] = True
        self.register_buffer("class_mask", mask, persistent=False)

    def next_task(self) -> None:
        """Open the next pathway as a copy of the current one; make a new optimizer afterwards.

        Raises:
            SettingsError: there is no further task.
        """
        if self.task + 1 >= self.lanes.tasks:
            raise SettingsError(f"there are {self.lanes.tasks} tasks, and the last one is current")
        self.task += 1
        with torch.no_grad():
            for value in self._of_tasks():
                value[self.task] = value[self.task - 1]

    def _prompted(self) -> Iterator[Any]:
        """Attention of the layers with prompts."""
        for block in list(self.blocks)[: self.lanes.num_prompt_layers]:
            yield block.attn

    def _of_tasks(self) -> Iterator[Tensor]:
        """What each pathway has for its own, task first; keys are drawn apart and stay so."""
        yield self.selectors
        for attn in self._prompted():
            yield attn.prompts.transpose(0, 1)

    def learnable(self) -> list[nn.Parameter]:
        """Freeze everything else, and return what is trained."""
        self.requires_grad_(False)
        found = [self.selectors, *self.head.parameters()]
        found += [attn.prompts for attn in self._prompted()]
        if self.lanes.head_mode == "task":
            found.append(self.task_identifier.get_parameter("keys"))
        for parameter in found:
            parameter.requires_grad_(True)
        return found

    def _now(self) -> slice:
        """Pathways that run: the current one in training, else all seen so far."""
        return slice(self.task if self.training else 0, self.task + 1)

    def stream(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Both streams behind the last norm: frozen (B, N, C) and pathways (T, B, 1 + S, C)."""
        now = self._now()
        with torch.no_grad():
            x = self.norm_pre(self._pos_embed(self.patch_embed(image)))
        chosen = self.selectors[now]
        # the class token of a pathway has no position, as released
        assert self.cls_token is not None
        front = self.cls_token.expand(len(chosen), len(x), -1, -1)
        z = torch.cat([front, chosen[:, None].expand(-1, len(x), -1, -1)], 2)
        blocks: Iterator[Any] = iter(self.blocks)
        for i, block in enumerate(blocks):
            x, z = self._block(block, x, z, now, i == 0)
        with torch.no_grad():
            x = self.norm(x)
        return x, self.norm(z)

    def _block(
        self, block: Any, x: Tensor, z: Tensor, now: slice, first: bool
    ) -> tuple[Tensor, Tensor]:
        prompts = getattr(block.attn, "prompts", None)
        prompts = None if prompts is None else prompts[:, now]
        with torch.no_grad():
            h = block.norm1(x)
        y = lane_branch(block.attn, h, block.norm1(z), prompts, self.lanes, first)
        z = z + block.drop_path1(block.ls1(y))
        z = z + block.drop_path2(block.ls2(block.mlp(block.norm2(z))))
        with torch.no_grad():
            x = x + block.drop_path1(block.ls1(lane_attention(block.attn, h[None])[0]))
            x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
        return x, z

    def _nearest(self, frozen: Tensor) -> tuple[Tensor, Tensor]:
        """Pathway of each item, counted within those that run, and the mean cosine to its key."""
        none = torch.zeros(len(frozen), dtype=torch.long, device=frozen.device)
        if self.lanes.head_mode != "task":
            return none, frozen.new_ones(())
        keys = F.normalize(self.task_identifier.get_parameter("keys")[self._now()], dim=-1)
        near = F.normalize(frozen, dim=-1) @ keys.mT
        best, task = near.max(-1)
        return task, best.mean()

    def forward(self, image: Tensor) -> Laned:  # type: ignore[override]
        """Logits of images (B, 3, H, W).

        Training gives those of the current task's pathway, for all classes; evaluation those of
        all pathways seen so far.

        Raises:
            TokensError: the head was removed.
        """
        if not isinstance(self.head, nn.Linear):
            raise TokensError("the shared head was removed; make it with num_classes > 0")
        x, z = self.stream(image)
        frozen = x[:, 0]
        task, near = self._nearest(frozen)
        z = z.transpose(0, 1)  # (B, T, 1 + S, C)
        front = z[:, :, 0]
        if self.training or self.lanes.head_mode == "task":
            chosen = front[torch.arange(len(front), device=front.device), task]
            return Laned(self.head(self._scaled(chosen)), z, frozen, near, task)
        front = self._scaled(front)
        logits = self.head(front) * self.class_mask[self._now()]
        return Laned(logits.sum(1), front, frozen, near, task)

    def _scaled(self, front: Tensor) -> Tensor:
        return F.normalize(front, dim=-1) if self.lanes.normalize else front


def _drawn(init: str, *shape: int) -> nn.Parameter:
    value = nn.Parameter(torch.empty(shape))
    if init == "orthogonal":
        nn.init.orthogonal_(value)
    else:
        nn.init.uniform_(value, -1, 1)
    return value


def lane_loss(
    out: Laned, targets: Tensor, classes: Sequence[int], *, keyed: bool = False
) -> Tensor:
    """Loss of the current task.

    Multi-label targets (B, classes) of 0 and 1: sigmoid cross-entropy over all classes with
    logits and targets of other tasks set to zero. Single-label targets (B,): cross-entropy with
    the logits of other tasks at -inf.

    Args:
        out: of the model in training.
        targets: as above.
        classes: of the current task.
        keyed: subtract the cosine to the current key (head "task").

    Returns:
        A scalar.
    """
    own = torch.zeros(out.logits.shape[-1], dtype=torch.bool, device=out.logits.device)
    own[list(classes)] = True
    if targets.dim() == 2:
        aim = targets.to(out.logits.dtype) * own
        loss = F.binary_cross_entropy_with_logits(out.logits * own, aim)
    else:
        loss = F.cross_entropy(out.logits.masked_fill(~own, -torch.inf), targets)
    return loss - out.similarity if keyed else loss


def with_lanes(host: VisionTransformer, lanes: Lanes, num_classes: int | None = None) -> MultiLane:
    """A model with pathways from a trained ViT of timm, which is left as it is.

    Args:
        host: a plain VisionTransformer with a class token.
        lanes: settings.
        num_classes: of the new shared head; None for the largest class of `lanes` and one more.

    Returns:
        With the host's weights, a fresh head and fresh pathways, on its device and in its dtype.

    Raises:
        HostError: the host is no plain ViT, or has parameters the copy would lack.
    """
    if type(host) is not VisionTransformer:
        raise HostError(f"got {type(host).__name__}; expected timm's plain VisionTransformer")
    if host.cls_token is None or host.num_prefix_tokens != 1:
        raise HostError(
            f"the host has {host.num_prefix_tokens} prefix token(s); expected one class token and "
            "no registers"
        )
    block: Any = host.blocks[0]
    if num_classes is None:
        num_classes = 1 + max(c for task in lanes.class_mask for c in task)
    made = MultiLane(
        lanes,
        img_size=host.patch_embed.img_size,
        patch_size=host.patch_embed.patch_size,
        in_chans=host.patch_embed.proj.in_channels,
        num_classes=num_classes,
        global_pool=host.global_pool,
        embed_dim=host.embed_dim,
        depth=len(host.blocks),
        num_heads=block.attn.num_heads,
        mlp_ratio=block.mlp.fc1.out_features / host.embed_dim,
        qkv_bias=block.attn.qkv.bias is not None,
        qk_norm=not isinstance(block.attn.q_norm, nn.Identity),
        init_values=None if isinstance(block.ls1, nn.Identity) else 1.0,
        pre_norm=not isinstance(host.norm_pre, nn.Identity),
        no_embed_class=host.no_embed_class,
        norm_layer=_like(block.norm1),
    )
    state = {n: v for n, v in host.state_dict().items() if not n.startswith("head.")}
    found = made.load_state_dict(state, strict=False)
    own = ("head.", "selectors", "task_identifier.")
    missing = [n for n in found.missing_keys if not (n.startswith(own) or n.endswith("prompts"))]
    if missing or found.unexpected_keys:
        raise HostError(
            f"the copy of the host lacks {[*missing, *found.unexpected_keys]}; multi-lane knows "
            "plain pre-norm ViTs only"
        )
    like = next(host.parameters())
    return made.to(device=like.device, dtype=like.dtype).train(host.training)


def _like(norm: nn.Module) -> partial[nn.LayerNorm]:
    """What makes norms of this kind."""
    if not isinstance(norm, nn.LayerNorm):
        raise HostError(f"the norms are {type(norm).__name__}; expected LayerNorm")
    return partial(type(norm), eps=norm.eps)
