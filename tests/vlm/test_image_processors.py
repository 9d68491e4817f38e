"""Image processors against timm's transforms, LLaVA's padding and transformers' own, on the same images."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModel,
    BitImageProcessor,
    ConvNextImageProcessor,
    EfficientNetImageProcessor,
    Siglip2ImageProcessor,
    SiglipImageProcessor,
    TimmWrapperConfig,
    TimmWrapperImageProcessor,
    ViTImageProcessor,
)

from tests.tiny import image, image_processor
from vlm.image_processors import (
    from_naflex,
    from_timm,
    image_size_of,
    load_image_processor,
    padding,
    set_image_size,
)

TIMM_CONFIG = {"input_size": (3, 32, 32), "crop_pct": 0.875, "interpolation": "bicubic", "crop_mode": "center"}


def photo(width=90, height=60):
    """Smooth, as photographs are: resizes differ by how they round, not by what they see."""
    y, x = np.mgrid[:height, :width]
    rgb = [128 + 100 * np.sin(x / 9), 128 + 100 * np.cos(y / 7), 128 + 100 * np.sin((x + y) / 11)]
    return Image.fromarray(np.stack(rgb, axis=-1).astype(np.uint8))


def pixels(processor, picture):
    return processor(picture, return_tensors="pt")["pixel_values"][0]


# --- size


def test_images_of_different_sizes_are_refused_until_a_size_is_set():
    keeps_proportions = ViTImageProcessor(size={"shortest_edge": 32})
    with pytest.raises(ValueError, match=r"keeps each image's proportions.*set image_size"):
        image_size_of(keeps_proportions)
    set_image_size(keeps_proportions, 48)
    assert image_size_of(keeps_proportions) == (48, 48)


@pytest.mark.parametrize(
    "made",
    [
        image_processor,
        lambda: ViTImageProcessor(size={"height": 32, "width": 32}),
        lambda: BitImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}),
        lambda: ConvNextImageProcessor(size={"shortest_edge": 32}),
        lambda: ConvNextImageProcessor(size={"shortest_edge": 384}),
        lambda: from_timm(TimmWrapperImageProcessor(TIMM_CONFIG)),
    ],
)
def test_a_size_is_set(made):
    processor = made()
    set_image_size(processor, 64)
    assert image_size_of(processor) == (64, 64)
    if isinstance(processor, ConvNextImageProcessor):
        with pytest.raises(ValueError, match="makes squares only, not 32 x 64"):
            set_image_size(processor, {"height": 32, "width": 64})
    else:
        set_image_size(processor, {"height": 32, "width": 64})
        assert image_size_of(processor) == (32, 64)


def test_an_image_processor_without_a_size_says_so():
    with pytest.raises(ValueError, match="image_size cannot be set: TimmWrapperImageProcessor has a size of its own"):
        set_image_size(TimmWrapperImageProcessor(TIMM_CONFIG), 64)


# --- what cannot be saved, or is not of one size


@pytest.mark.parametrize("changes", [{}, {"crop_mode": "squash"}, {"crop_pct": 1.0, "interpolation": "bilinear"}])
def test_timms_transform_is_kept(changes):
    theirs = TimmWrapperImageProcessor(TIMM_CONFIG | changes | {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)})
    ours, wanted = pixels(from_timm(theirs), photo()), pixels(theirs, photo())
    assert ours.shape == wanted.shape == (3, 32, 32)
    assert (ours - wanted).abs().max() < 2.5 / 255 / 0.4  # Pillow and torchvision round differently, by a level or two


@pytest.mark.parametrize("changes", [{"crop_mode": "border"}, {"input_size": (3, 32, 48)}])
def test_timms_other_transforms_are_refused(changes):
    with pytest.raises(ValueError, match="only squares, by crop_mode center or squash"):
        from_timm(TimmWrapperImageProcessor(TIMM_CONFIG | changes))


def test_timms_image_processor_is_loaded_as_one_that_can_be_saved(tmp_path):
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 4}
    config = TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args=arguments, pretrained_cfg=TIMM_CONFIG)
    AutoModel.from_config(config).save_pretrained(tmp_path / "vision")
    processor = load_image_processor(str(tmp_path / "vision"))
    assert image_size_of(processor) == (32, 32)
    processor.save_pretrained(tmp_path / "saved")
    again = AutoImageProcessor.from_pretrained(tmp_path / "saved")
    assert torch.equal(pixels(again, photo()), pixels(processor, photo()))


def test_naflex_becomes_squares_of_as_many_patches():
    processor = from_naflex(Siglip2ImageProcessor(patch_size=8, max_num_patches=20))
    assert image_size_of(processor) == (32, 32)
    same = SiglipImageProcessor(size={"height": 32, "width": 32}, resample=2)
    assert torch.equal(pixels(processor, photo()), pixels(same, photo()))


# --- padding


def llava_pad(picture, mean):
    """`expand2square` of LLaVA's mm_utils.py."""
    width, height = picture.size
    side = max(width, height)
    square = Image.new("RGB", (side, side), tuple(int(x * 255) for x in mean))
    square.paste(picture, ((side - width) // 2, (side - height) // 2))
    return square


@pytest.mark.parametrize("size", [(90, 60), (60, 90), (50, 50), (61, 40)])
@pytest.mark.parametrize("made", [image_processor, lambda: ViTImageProcessor(size={"height": 32, "width": 32})])
def test_padding_is_llavas(made, size):
    processor = made()
    picture = photo(*size)
    padded = pixels(padding(processor), picture)
    assert torch.equal(padded, pixels(processor, llava_pad(picture, processor.image_mean)))
    assert (size[0] == size[1]) == torch.equal(padded, pixels(processor, picture))


def test_padding_loses_nothing_to_a_crop():
    """DINOv2's image processor resizes to 256 and keeps the middle 224."""
    crops = BitImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}, resample=0)
    frame = np.full((40, 80, 3), 128, dtype=np.uint8)
    frame[:, :4] = frame[:, -4:] = 255
    picture = Image.fromarray(frame)
    white = (torch.ones(3) - torch.tensor(crops.image_mean)) / torch.tensor(crops.image_std)
    assert not torch.isclose(pixels(crops, picture)[0], white[0]).any()
    padded = pixels(padding(crops), picture)
    assert padded.shape == (3, 32, 32)
    assert torch.isclose(padded[0, 16, [0, -1]], white[0]).all()
    assert padded[:, 0].abs().max() < 1 / 255 / min(crops.image_std), "the mean is zero when normalised"


def test_padding_is_saved(tmp_path):
    image_processor().save_pretrained(tmp_path / "vision")
    padded = load_image_processor(str(tmp_path / "vision"), image_size=48, image_aspect_ratio="pad")
    assert image_size_of(padded) == (48, 48)
    padded.save_pretrained(tmp_path / "saved")
    again = AutoImageProcessor.from_pretrained(tmp_path / "saved")
    assert torch.equal(pixels(again, photo()), pixels(padded, photo()))


def test_what_cannot_be_padded_is_refused():
    with pytest.raises(ValueError, match="pad makes squares, and image_size is 32 x 48"):
        padding(ViTImageProcessor(size={"height": 32, "width": 48}))
    own = EfficientNetImageProcessor(size={"height": 32, "width": 32}, include_top=True)
    with pytest.raises(ValueError, match="does not go with EfficientNetImageProcessor"):
        padding(own)


def test_batches_of_any_proportions():
    pictures = [photo(90, 60), photo(60, 90), image(0)]
    padded = padding(image_processor())
    together = padded(pictures, return_tensors="pt")["pixel_values"]
    for row, picture in zip(together, pictures, strict=True):
        assert torch.equal(row, pixels(padded, picture))
