"""What the hierarchical backbones of SLAB share: timm's interface over four maps."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch.nn.functional as F
from timm.layers import trunc_normal_
from timm.models import checkpoint
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from transom.errors import SettingsError


def rising(rate: float, count: int) -> list[float]:
    """Stochastic depth of each of `count` blocks: from 0 to `rate`."""
    return [rate * i / max(1, count - 1) for i in range(count)]


class Pyramid(nn.Module):
    """Stages of blocks over maps of falling size, the mean of the last one, and a linear head.

    Attributes:
        feature_info: what timm wants to know of each stage.
        grad_checkpointing: whether blocks are computed again in the backward pass.
    """

    matcher: ClassVar[dict[str, Any]]

    def __init__(
        self, widths: Sequence[int], names: Sequence[str], num_classes: int, drop_rate: float
    ) -> None:
        """Prepare the interface.

        Args:
            widths: channels of each stage.
            names: module of each stage.
            num_classes: of the head; 0 for none.
            drop_rate: dropout in front of it.
        """
        super().__init__()
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = self.embed_dim = widths[-1]
        self.global_pool = "avg"
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        self.feature_info = [
            {"num_chs": width, "reduction": 4 * 2**i, "module": name}
            for i, (width, name) in enumerate(zip(widths, names, strict=True))
        ]

    @abstractmethod
    def stages(self, x: Tensor, count: int) -> list[Tensor]:
        """Maps (B, h, w, C) behind each of the first `count` stages, for images (B, 3, H, W)."""

    def last(self, x: Tensor) -> Tensor:
        """Norm behind the last stage, if there is one."""
        return x

    def run(self, block: Callable[..., Tensor], *args: Any) -> Tensor:
        """One block, checkpointed if that is switched on."""
        if self.grad_checkpointing:
            out: Tensor = checkpoint(block, *args)
            return out
        return block(*args)

    def init_weights(self) -> None:
        """Linear maps from a narrow normal distribution, biases 0; the rest as built."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) to the last map (B, h, w, C), normed."""
        return self.last(self.stages(x, len(self.feature_info))[-1])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The last map to logits (B, classes), or to what the head gets (B, C)."""
        head: Any = self.head
        if self.global_pool == "avg":
            x = x.mean((1, 2))
        x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) to logits (B, classes)."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Maps of several stages, as timm's models give them.

        Args:
            x: (B, 3, H, W).
            indices: stages to return; the last n for a number, all for None.
            norm: whether the last map goes through the final norm.
            stop_early: whether stages behind the last one asked for are left out.
            output_fmt: "NCHW" or "NHWC".
            intermediates_only: whether the final features are left out.

        Returns:
            The maps, or the final features (B, h, w, C) and the maps.

        Raises:
            SettingsError: the format is another.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise SettingsError(f"output_fmt is {output_fmt!r}; expected 'NCHW' or 'NHWC'")
        depth = len(self.feature_info)
        wanted, highest = feature_take_indices(depth, indices)
        maps = self.stages(x, highest + 1 if stop_early and intermediates_only else depth)
        final = self.last(maps[-1]) if len(maps) == depth else None
        out = [final if norm and i == depth - 1 and final is not None else maps[i] for i in wanted]
        if output_fmt == "NCHW":
            out = [m.permute(0, 3, 1, 2).contiguous() for m in out]
        if intermediates_only or final is None:
            return out
        return final, out

    def get_classifier(self) -> nn.Module:
        """The head."""
        head: Any = self.head
        return head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Another head.

        Args:
            num_classes: 0 for none.
            global_pool: "avg" or "" for maps; None keeps it.

        Raises:
            SettingsError: the pooling is another.
        """
        if global_pool not in (None, "avg", ""):
            raise SettingsError(f"global_pool is {global_pool!r}; expected 'avg' or ''")
        if global_pool is not None:
            self.global_pool = global_pool
        self.num_classes = num_classes
        like = next(self.parameters())
        self.head = self.classifier(num_classes).to(device=like.device, dtype=like.dtype)

    def classifier(self, num_classes: int) -> nn.Module:
        """A fresh head."""
        if not num_classes:
            return nn.Identity()
        head = nn.Linear(self.num_features, num_classes)
        trunc_normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)
        return head

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """How parameters group into layers, for layer-wise learning rates."""
        return dict(self.matcher)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Switch gradient checkpointing."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Position tables."""
        ends = ("positional_encoding", "relative_position_bias_table")
        return {
            name
            for name, _ in self.named_parameters()
            if name.endswith(ends) or name.startswith("pos_embed")
        }
