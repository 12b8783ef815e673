"""What timm expects of a model, written once for the architectures that rooms bring.

A :class:`Network` runs units, and knows their head, pooling, checkpointing, intermediate features
and pruning. Units are blocks of one width (:class:`Isotropic`), or stages of growing width, over
maps (:class:`Staged`) or over tokens (:class:`TokenNetwork`). A room writes only what is its
paper's: how the units are made and run (`trunk`), and what stands behind the last one (`final`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Sequence
from typing import Any, ClassVar

from timm.layers import trunc_normal_
from timm.models import checkpoint
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from transom.errors import SettingsError, TokensError

Grid = tuple[int, int]
Format = str  # "NCHW", "NHWC" or "NLC"


def classifier(width: int, classes: int) -> nn.Module:
    """A linear head from a narrow normal distribution; the identity for 0 classes."""
    if classes <= 0:
        return nn.Identity()
    head = nn.Linear(width, classes)
    trunc_normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    return head


def narrow(module: nn.Module) -> None:
    """For ``Module.apply``: linear maps from a narrow normal distribution, their biases 0."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def fan_out(module: nn.Module) -> None:
    """For ``Module.apply``: convolutions by the number of their outputs, their biases 0."""
    if isinstance(module, nn.Conv2d):
        outputs = module.weight.shape[0] * module.weight[0, 0].numel() // module.groups
        nn.init.normal_(module.weight, std=(2 / outputs) ** 0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def rising(last: float, count: int) -> list[float]:
    """Rates of stochastic depth: linear from 0 to `last` over `count` blocks."""
    return [last * i / max(1, count - 1) for i in range(count)]


def one_a_stage(count: int, **given: Sequence[Any]) -> None:
    """Check that every sequence has one entry a stage.

    Raises:
        SettingsError: one has not; it is named.
    """
    for name, values in given.items():
        if len(values) != count:
            raise SettingsError(f"{name} is {values!r}; expected {count} values, one a stage")


def patch_grid(size: int | Sequence[int], patch: int) -> Grid:
    """The grid (h, w) of square patches.

    Args:
        size: of the images, one number or height and width, pixels.
        patch: side of a patch, pixels.

    Raises:
        SettingsError: the size is no multiple of the patch.
    """
    h, w = (size, size) if isinstance(size, int) else size
    if h < 1 or w < 1 or h % patch or w % patch:
        raise SettingsError(f"img_size is {size}; expected multiples of the patch, {patch} pixels")
    return h // patch, w // patch


def image_grid(images: Tensor, patch: int) -> Grid:
    """The grid (h, w) of square patches of images (B, C, H, W).

    Raises:
        TokensError: their size is no multiple of the patch.
    """
    height, width = images.shape[-2:]
    if height % patch or width % patch:
        raise TokensError(
            f"got an image of {height} x {width} pixels; expected multiples of the patch, "
            f"{patch}: resize the image"
        )
    return height // patch, width // patch


class Network(nn.Module):
    """Head, pooling, checkpointing, intermediate features and pruning.

    Args:
        num_classes: outputs of the head; 0 for none.
        global_pool: one of `pools`.
        feature_info: what timm wants to know of each unit.

    Attributes:
        pools: values of `global_pool`; "" leaves features unpooled.
        formats: of intermediate features, the network's own first.
        grows: whether norm and head fit the last unit only.
        num_features: width behind the last unit.
        head_hidden_size: width that the head sees.
        grad_checkpointing: whether blocks are computed again in the backward pass.

    Raises:
        SettingsError: the pooling is unknown.
    """

    pools: ClassVar[tuple[str, ...]] = ("avg", "")
    formats: ClassVar[tuple[Format, ...]] = ("NHWC", "NCHW")
    grows: ClassVar[bool] = True

    head: nn.Module
    head_drop: nn.Dropout
    norm: nn.Module

    def __init__(
        self, num_classes: int, global_pool: str, feature_info: list[dict[str, Any]]
    ) -> None:
        super().__init__()
        self.check_pool(global_pool, num_classes)
        self.num_classes = num_classes
        self.global_pool = global_pool
        self.feature_info = feature_info
        self.num_features = self.head_hidden_size = self.embed_dim = feature_info[-1]["num_chs"]
        self.grad_checkpointing = False

    @property
    def body(self) -> Any:
        """The module that holds blocks, norm and head."""
        return self

    @abstractmethod
    def trunk(self, x: Tensor, count: int, take: Collection[int] = ()) -> tuple[Any, list[Any]]:
        """Run the first `count` units.

        Args:
            x: images (B, C, H, W).
            count: of units, at least 1.
            take: units whose features are wanted.

        Returns:
            What leaves the last of them, and what leaves each unit of `take`, in rising order.
        """

    def final(self, x: Any) -> Any:
        """What stands between the last unit and the head, which is nothing here."""
        return x

    @abstractmethod
    def normed(self, x: Any, unit: int) -> Any:
        """Features of a unit with the norm of :meth:`final`, where it fits them."""

    @abstractmethod
    def shown(self, x: Any, format: Format) -> Tensor:
        """Features of a unit in a format."""

    def bare(self, x: Any) -> Tensor:
        """Features of a unit without what travels with them."""
        y: Tensor = x
        return y

    def prefix(self, x: Any) -> Tensor:
        """Class tokens within the features of a unit."""
        raise SettingsError(f"{type(self).__name__} has no prefix tokens to return")

    @abstractmethod
    def cut(self, count: int) -> None:
        """Drop all units but the first `count`."""

    def heads(self) -> dict[str, nn.Module | None]:
        """Fresh heads by attribute of the body, for `num_classes` and `head_hidden_size`."""
        return {"head": classifier(self.head_hidden_size, self.num_classes)}

    def check_pool(self, name: str, num_classes: int) -> None:
        """Refuse a pooling that is unknown or does not go with the number of classes."""
        if name not in self.pools:
            raise SettingsError(f"global_pool is {name!r}; expected one of {list(self.pools)}")

    def run(self, block: Callable[..., Any], *args: Any) -> Any:
        """One block, checkpointed if that is switched on."""
        return checkpoint(block, *args) if self.grad_checkpointing else block(*args)

    def forward_features(self, x: Tensor) -> Any:
        """Features in front of the head, for images (B, C, H, W)."""
        return self.final(self.trunk(x, len(self.feature_info))[0])

    @abstractmethod
    def forward_head(self, x: Any, pre_logits: bool = False) -> Any:
        """Logits of the features, or what the head sees of them."""

    def forward(self, x: Tensor) -> Any:
        """Logits of images (B, C, H, W)."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: Format = "NCHW",
        intermediates_only: bool = False,
        return_prefix_tokens: bool = False,
    ) -> Any:
        """Features behind chosen units, as timm's models give them.

        Args:
            x: images (B, C, H, W).
            indices: units by number, the last so many, or all for None.
            norm: put the final norm over them, where it fits.
            stop_early: leave out the units behind the last one asked for.
            output_fmt: "NCHW" for maps, or another of `formats`.
            intermediates_only: return the list alone.
            return_prefix_tokens: pair each with its class tokens, if the network has some.

        Returns:
            (features, list), or the list. The features are those of :meth:`forward_features`, or
            of the unit where it stopped.

        Raises:
            SettingsError: the format is not one of `formats`.
        """
        if output_fmt not in self.formats:
            raise SettingsError(
                f"output_fmt is {output_fmt!r}; expected one of {list(self.formats)}"
            )
        units = len(self.feature_info)
        wanted, last = feature_take_indices(units, indices)
        count = last + 1 if stop_early else units
        y, found = self.trunk(x, count, wanted)
        shown: list[Any]
        if norm:
            found = [self.normed(one, i) for one, i in zip(found, sorted(wanted), strict=True)]
        shown = [self.shown(one, output_fmt) for one in found]
        if return_prefix_tokens:
            shown = [(y, self.prefix(one)) for y, one in zip(shown, found, strict=True)]
        if intermediates_only:
            return shown
        return (self.final(y) if count == units or not self.grows else self.bare(y)), shown

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what :meth:`forward_intermediates` does not need.

        Args:
            indices: as there.
            prune_norm: drop the final norm too.
            prune_head: drop the head; it goes in any case where it no longer fits.

        Returns:
            The units that were asked for.
        """
        wanted, last = feature_take_indices(len(self.feature_info), indices)
        shorter = last + 1 < len(self.feature_info)
        self.cut(last + 1)
        self.feature_info = self.feature_info[: last + 1]
        if prune_norm or (shorter and self.grows):
            self.drop_norm()
        if prune_head or (shorter and self.grows):
            self.drop_head()
        return list(wanted)

    def drop_norm(self) -> None:
        """Put the identity in the place of the final norm, if there is one."""
        if hasattr(self.body, "norm"):
            self.body.norm = nn.Identity()

    def drop_head(self) -> None:
        """Leave the features of the last unit there is as they are."""
        self.num_features = self.head_hidden_size = self.feature_info[-1]["num_chs"]
        self.reset_classifier(0, "")

    def get_classifier(self) -> Any:
        """The head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Another head, untrained.

        Args:
            num_classes: 0 for none.
            global_pool: one of `pools`; None keeps it.

        Raises:
            SettingsError: the pooling is unknown.
        """
        pool = self.global_pool if global_pool is None else global_pool
        self.check_pool(pool, num_classes)
        self.global_pool, self.num_classes = pool, num_classes
        like = next(self.parameters())
        for name, head in self.heads().items():
            setattr(self.body, name, head if head is None else head.to(like).train(self.training))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that are not decayed, beside those of one dimension."""
        return set()


class Staged(Network):
    """Stages of growing width that end in maps: (B, h, w, C), or (B, C, h, w) by `formats`."""

    def normed(self, x: Any, unit: int) -> Any:
        return self.final(x) if unit == len(self.feature_info) - 1 else x

    def shown(self, x: Any, format: Format) -> Tensor:
        own = self.formats[0]
        y: Tensor = x if format == own else x.permute(0, 3, 1, 2)
        return y

    def forward_head(self, x: Any, pre_logits: bool = False) -> Any:
        """Logits (B, K) of the last map, or the pooled map (B, C)."""
        if self.global_pool == "avg":
            x = x.mean((1, 2) if self.formats[0] == "NHWC" else (2, 3))
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)


class TokenNetwork(Network):
    """Units over tokens, and a norm behind the last.

    What leaves a unit is a tuple that begins with tokens (B, P + h w, D) and the grid (h, w) of
    their patches.

    Attributes:
        num_prefix_tokens: class tokens P in front of the patches.
    """

    formats: ClassVar[tuple[Format, ...]] = ("NLC", "NCHW")

    num_prefix_tokens: int = 0
    blocks: nn.ModuleList

    def normed(self, x: Any, unit: int) -> Any:
        fits = x[0].shape[-1] == self.num_features
        return (self.body.norm(x[0]), x[1]) if fits else x

    def shown(self, x: Any, format: Format) -> Tensor:
        tokens: Tensor = x[0][:, self.num_prefix_tokens :]
        return tokens if format == "NLC" else tokens.mT.unflatten(2, x[1]).contiguous()

    def bare(self, x: Any) -> Tensor:
        tokens: Tensor = x[0]
        return tokens

    def prefix(self, x: Any) -> Tensor:
        if not self.num_prefix_tokens:
            return super().prefix(x)
        tokens: Tensor = x[0]
        return tokens[:, : self.num_prefix_tokens]

    def no_weight_decay(self) -> set[str]:
        """Class tokens and positions: the parameters of no module within the network."""
        return {name for name, _ in self.named_parameters(recurse=False)}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort parameters into layers."""
        return {
            "stem": r"^tokens|^cls_token|^pos_embed|^patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }


class Isotropic(TokenNetwork):
    """Blocks of one width over tokens."""

    grows: ClassVar[bool] = False

    def final(self, x: Any) -> Any:
        """The normed tokens."""
        return self.body.norm(x[0])

    def forward_head(self, x: Any, pre_logits: bool = False) -> Any:
        """Logits (B, K) of normed tokens, or the pooled tokens (B, D)."""
        x = x.mean(1) if self.global_pool == "avg" else x
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def cut(self, count: int) -> None:
        self.body.blocks = self.body.blocks[:count]
