"""What the hierarchical backbones of SLAB share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Sequence
from typing import Any, ClassVar

from timm.layers import to_2tuple
from torch import Tensor, nn

from transom.errors import SettingsError
from transom.networks import Staged, one_a_stage

Size = tuple[int, int]
Make = Callable[[int], nn.Module]


class Pyramid(Staged):
    """Stages over maps of falling size, the mean of the last one, and a linear head.

    Args:
        widths: channels of each stage.
        names: module of each stage.
        num_classes: of the head; 0 for none.
        global_pool: "avg", or "" for maps.
        drop_rate: dropout in front of the head.
        attn_type: a letter a stage: L for linear, S for softmax attention.
        given: further settings that have one value a stage.

    Attributes:
        grids: (h, w) of the map of each stage.

    Raises:
        SettingsError: a setting does not have one value a stage, or a letter is unknown.
    """

    matcher: ClassVar[dict[str, Any]]

    grids: list[Size]

    def __init__(
        self,
        widths: Sequence[int],
        names: Sequence[str],
        num_classes: int,
        global_pool: str,
        drop_rate: float,
        attn_type: str,
        **given: Sequence[Any],
    ) -> None:
        one_a_stage(len(widths), attn_type=attn_type, **given)
        if set(attn_type) - set("LS"):
            raise SettingsError(
                f"attn_type is {attn_type!r}; expected L for linear or S for softmax attention "
                "in each stage"
            )
        info = [
            {"num_chs": width, "reduction": 4 * 2**i, "module": name}
            for i, (width, name) in enumerate(zip(widths, names, strict=True))
        ]
        super().__init__(num_classes, global_pool, info)
        self.head_drop = nn.Dropout(drop_rate)

    def stage(self, i: int) -> Any:
        """Blocks of a stage."""
        return self.get_submodule(self.feature_info[i]["module"])

    @abstractmethod
    def enter(self, x: Tensor, i: int) -> Tensor:
        """Images (B, 3, H, W), or tokens (B, N, C) of the stage before, as tokens of stage i."""

    @abstractmethod
    def resize(self, size: Size) -> None:
        """Take images of this size from now on."""

    def set_input_size(self, img_size: int | Size | None = None) -> None:
        """Take images of another size from now on; tables of positions are interpolated.

        Args:
            img_size: pixels, one number or (H, W).
        """
        if img_size is not None:
            self.resize(to_2tuple(img_size))

    def trunk(
        self, x: Tensor, count: int, take: Collection[int] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        found = []
        for i in range(count):
            x = self.enter(x, i)
            for block in self.stage(i):
                x = self.run(block, x)
            if i in take:
                found.append(x.unflatten(1, self.grids[i]))
        return x.unflatten(1, self.grids[count - 1]), found

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
