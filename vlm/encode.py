"""`vlm encode`: what any vision encoder sees in many images, in one safetensors file.

features    [images, D] pooled vectors, or [images, h * w, D] patch embeddings
metadata    encoder; output: pooled or patches; and as JSON images: the files, in the order of the features,
            image_size and grid: [height, width], and with patches vision_feature_layer
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.progress import track

from vlm.data.image_files import find_images
from vlm.data.images import ImageError
from vlm.errors import UserError, nearest
from vlm.files import new_file

DTYPES = ("float32", "bfloat16", "float16")


def run(
    patterns: Sequence[str],
    *,
    encoder: str,
    output: Path,
    patches: bool = False,
    vision_feature_layer: list[int] | None = None,
    image_size: int | None = None,
    dtype: str = "float32",
    console: Console,
) -> None:
    """Find the images, load `encoder` (a Hub name or a folder), and write `output`, naming images that do not open.

    Raises UserError if `output` is there already, for an encoder that cannot be loaded or does not give what is asked
    of it, and if no image opens.
    """
    if vision_feature_layer and not patches:
        raise UserError("--vision-feature-layer goes with --patches: an encoder pools its last layer alone")
    if dtype not in DTYPES:
        raise UserError(f"there is no --dtype {dtype}; {nearest(dtype, DTYPES)}")
    with new_file(output):
        found = find_images(patterns)
        found.show_left_out(console)
        images = found.paths
        with console.status("loading the encoder"):  # and libraries, which takes seconds
            import torch

            from vlm.data.encoding import BATCH_IMAGES, encode_images
            from vlm.data.feature_file import FeatureFile
            from vlm.encoder import encode
            from vlm.precision import default_device

            device = default_device()
            tower, image_processor, size = _load(encoder, image_size=image_size, pooled=not patches)
            tower.to(device, getattr(torch, dtype)).eval()

        @torch.no_grad()
        def features_of(pixel_values: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
            try:
                seen = encode(tower, pixel_values.to(device, tower.dtype), vision_feature_layer or None)
            except ValueError as error:
                raise UserError(f"{encoder}: {error}") from None
            if patches:
                return seen.patches, seen.grid
            if seen.pooled is None:
                raise UserError(f"{encoder} does not pool what it sees into one vector; use --patches")
            return seen.pooled, seen.grid

        about = {"encoder": encoder, "output": "patches" if patches else "pooled", "image_size": json.dumps(size)}
        if patches:
            about["vision_feature_layer"] = json.dumps(vision_feature_layer)
        broken: dict[str, ImageError] = {}
        # A CPU that encodes has nothing to spare.
        workers = 0 if device == "cpu" else min(8, os.cpu_count() or 1)
        batches = encode_images(
            {image: image for image in images}, _Whole(image_processor), features_of, broken=broken, num_workers=workers
        )
        total = -(-len(images) // BATCH_IMAGES)
        with FeatureFile(output, images) as file:
            for batch in track(batches, "encoding images", total, console=console, disable=not console.is_terminal):
                file.write(batch.images, batch.features, about | {"grid": json.dumps(batch.grid)})
        for error in broken.values():
            console.print(f"left out: {error}", markup=False, highlight=False, soft_wrap=True)
        if not file.shape:
            raise UserError(f"no image could be opened, of {len(images)}; {output} was not written")
        text = f"{file.shape[0]} encoded"
        text += f", {len(broken)} could not be opened" if broken else ""
        shape = " x ".join(map(str, file.shape))
        console.print(f"{text}: {output}, features {shape} {dtype}", markup=False, highlight=False, soft_wrap=True)


@dataclass
class _Whole:
    """Images as they are, in the words of `VLMProcessor`."""

    image_processor: Any
    tiler = None

    def prepare_images(self, images: Sequence[Any]) -> Any:
        return self.image_processor(images, return_tensors="pt")


def _load(name: str, *, image_size: int | None, pooled: bool) -> tuple[Any, Any, tuple[int, int]]:
    """Encoder, image processor, and the size in pixels that images are brought to."""
    import torch

    from vlm.build import load_vision
    from vlm.encoder import encode
    from vlm.image_processors import image_size_of
    from vlm.loading import reading

    try:
        tower, image_processor = load_vision(name, image_size=image_size, pooled=pooled)
        with reading(name, "a blank image", kind="a vision encoder"), torch.no_grad():
            encode(tower.eval(), image_processor(Image.new("RGB", (64, 64)), return_tensors="pt")["pixel_values"])
        return tower, image_processor, image_size_of(image_processor)
    except UserError as error:
        raise UserError(f"{error}{'; --patches does without' if 'pooler' in str(error) else ''}") from None
