"""The bridge: projectors make visual tokens of patch embeddings, cross-attention lets a decoder look at them."""

from vlm.adapters.cross_attention import (
    FlamingoCrossAttention,
    GatedCrossAttention,
    IdeficsCrossAttention,
    MllamaCrossAttention,
    VisionStates,
)
from vlm.adapters.projectors import LARGEST, PROJECTORS, build_projector, check_options, unknown_name
from vlm.adapters.tiles import AnyresMerger, TilePositions

__all__ = [
    "LARGEST",
    "PROJECTORS",
    "AnyresMerger",
    "FlamingoCrossAttention",
    "GatedCrossAttention",
    "IdeficsCrossAttention",
    "MllamaCrossAttention",
    "TilePositions",
    "VisionStates",
    "build_projector",
    "check_options",
    "unknown_name",
]
