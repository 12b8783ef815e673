"""What the hierarchical backbones of SLAB share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from transom.networks import Staged


class Pyramid(Staged):
    """Stages over maps of falling size, the mean of the last one, and a linear head.

    Args:
        widths: channels of each stage.
        names: module of each stage.
        num_classes: of the head; 0 for none.
        global_pool: "avg", or "" for maps.
        drop_rate: dropout in front of the head.
    """

    matcher: ClassVar[dict[str, Any]]

    def __init__(
        self,
        widths: Sequence[int],
        names: Sequence[str],
        num_classes: int,
        global_pool: str,
        drop_rate: float,
    ) -> None:
        info = [
            {"num_chs": width, "reduction": 4 * 2**i, "module": name}
            for i, (width, name) in enumerate(zip(widths, names, strict=True))
        ]
        super().__init__(num_classes, global_pool, info)
        self.head_drop = nn.Dropout(drop_rate)

    def final(self, x: Tensor) -> Tensor:
        """The norm behind the last stage, if there is one."""
        return self.norm(x) if hasattr(self, "norm") else x

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """How parameters group into layers, for layer-wise learning rates."""
        return dict(self.matcher)

    def no_weight_decay(self) -> set[str]:
        """Position tables."""
        ends = ("positional_encoding", "relative_position_bias_table")
        return {
            name
            for name, _ in self.named_parameters()
            if name.endswith(ends) or name.startswith("pos_embed")
        }
