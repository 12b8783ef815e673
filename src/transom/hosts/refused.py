"""Model families that cannot be hosts, and why.

Only asked when no adapter finds a host, so that a model which contains one of these beside a host
is not refused for it.
"""

from __future__ import annotations

from torch import nn

WINDOWS = (
    "its attention runs inside windows of a fixed grid, so there is no place where tokens could "
    "be merged or dropped without tearing windows apart"
)
STAGES = (
    "it shrinks its token grid between stages, which needs every token of the grid in its place"
)
CONVOLVES = (
    "its blocks run convolutions or pooling over the token grid, which needs every token in its "
    "place"
)
CONVIT = (
    "its gated attention adds a positional softmax over the full grid, and its class token joins "
    "in the middle of the stack"
)

REASONS: dict[str, str] = {
    # windows
    "SwinTransformer": WINDOWS,  # of torchvision; timm's is a host whose tokens stay
    "SwinTransformerV2Cr": WINDOWS,
    "MaxxVit": WINDOWS,
    "MaxVit": WINDOWS,
    "GlobalContextVit": WINDOWS,
    "Nest": WINDOWS,
    "DaVit": WINDOWS,
    "TinyVit": WINDOWS,
    "HieraDet": WINDOWS,
    "Twins": WINDOWS,
    "EfficientVitMsra": WINDOWS,
    # a grid that shrinks
    "PoolingVisionTransformer": STAGES,
    "Levit": STAGES,
    "LevitDistilled": STAGES,
    "MultiScaleVit": STAGES,
    "Hiera": STAGES,
    "PyramidVisionTransformerV2": STAGES,
    "EfficientFormer": STAGES,
    "EfficientFormerV2": STAGES,
    "Visformer": STAGES,
    "FocalNet": STAGES,
    "MetaFormer": STAGES,
    "FastVit": STAGES,
    "EdgeNeXt": STAGES,
    "NextViT": STAGES,
    "EfficientVit": STAGES,
    "EfficientVitLarge": STAGES,
    "SwiftFormer": STAGES,
    "SHViT": STAGES,
    "IFormer": STAGES,
    "MobileNetV5": STAGES,
    "CSATv2": STAGES,
    # a grid that is convolved
    "Xcit": "its attention runs over channels and " + CONVOLVES,
    "CoaT": CONVOLVES,
    "VOLO": "its outlook attention folds neighbourhoods of the grid: " + CONVOLVES,
    # others
    "ConVit": CONVIT,
    "CrossVit": "it runs two sequences of patches of different size that exchange class tokens",
    "TNT": "every token carries a sequence of pixel tokens of its own that would have to be merged",
    "MlpMixer": "it mixes tokens with learned weights for each place of the grid and no attention",
    "Gemma4VitEncoder": (
        "its pooler averages patches by their coordinates and needs every one of them in its place"
    ),
    "Gemma4VitClassifier": (
        "its pooler averages patches by their coordinates and needs every one of them in its place"
    ),
    "ModifiedResNet": "it is a convolutional network and has no tokens between its blocks",
}
LIBRARIES = ("timm", "torchvision", "open_clip")


def reason(model: nn.Module) -> str | None:
    """Why a model cannot be a host.

    Args:
        model: in which no adapter found a host.

    Returns:
        A sentence that names the module; None when the family is not known at all.
    """
    for name, module in model.named_modules():
        for cls in type(module).__mro__:
            if cls.__name__ in REASONS and cls.__module__.partition(".")[0] in LIBRARIES:
                where = f"{name} ({type(module).__name__})" if name else type(module).__name__
                return f"{where} cannot be a host: {REASONS[cls.__name__]}"
    return None
