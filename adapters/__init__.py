"""The bridge: projectors make visual tokens of patch embeddings, cross-attention lets a decoder look at them."""

from vlm.adapters.cross_attention import (
    FlamingoCrossAttention,
    GatedCrossAttention,
    MllamaCrossAttention,
    VisionStates,
)
from vlm.adapters.projectors import PROJECTORS, build_projector, unknown_name

__all__ = [
    "PROJECTORS",
    "FlamingoCrossAttention",
    "GatedCrossAttention",
    "MllamaCrossAttention",
    "VisionStates",
    "build_projector",
    "unknown_name",
]
