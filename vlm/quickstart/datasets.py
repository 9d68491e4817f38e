"""Two small, free data sets in the formats that the readers know: Tux Paint's stamps and easy-VQA."""

from __future__ import annotations

import io
import json
import lzma
import random
import tarfile
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from vlm.errors import UserError

STAMPS_PREFIX = "usr/share/tuxpaint/stamps/"
STAMP_SIZE = 448  # px, the side of the written squares at most: twice what the quickstart's encoder looks at
IMAGE_SUFFIXES = (".svg", ".png")

# Names for prompts ("Describe the image in German."), keyed by the package's own language codes.
LANGUAGES = {
    "af": "Afrikaans",
    "ar": "Arabic",
    "ast": "Asturian",
    "be": "Belarusian",
    "bg": "Bulgarian",
    "ca": "Catalan",
    "cs": "Czech",
    "cy": "Welsh",
    "da": "Danish",
    "de": "German",
    "el": "Greek",
    "eo": "Esperanto",
    "es": "Spanish",
    "eu": "Basque",
    "fi": "Finnish",
    "fr": "French",
    "ga": "Irish",
    "gl": "Galician",
    "he": "Hebrew",
    "hi": "Hindi",
    "hr": "Croatian",
    "hu": "Hungarian",
    "id": "Indonesian",
    "is": "Icelandic",
    "it": "Italian",
    "ja": "Japanese",
    "ko": "Korean",
    "lt": "Lithuanian",
    "lv": "Latvian",
    "nb": "Norwegian",
    "nl": "Dutch",
    "pl": "Polish",
    "pt": "Portuguese",
    "pt_BR": "Brazilian Portuguese",
    "ro": "Romanian",
    "ru": "Russian",
    "sk": "Slovak",
    "sl": "Slovenian",
    "sq": "Albanian",
    "sr": "Serbian",
    "sv": "Swedish",
    "tr": "Turkish",
    "uk": "Ukrainian",
    "vi": "Vietnamese",
    "zh_CN": "Chinese",
    "zh_TW": "Traditional Chinese",
}


class DataError(UserError):
    """A data file does not hold what it should."""


@dataclass
class StampCounts:
    """What became of the package's images."""

    kept: int = 0
    twins: int = 0  # PNG and SVG of one drawing: one is kept
    dropped: dict[str, str] = field(default_factory=dict)  # name -> why

    def __str__(self) -> str:
        line = f"{self.kept} stamps ({self.twins} of them drawn twice, as SVG and PNG: one kept)"
        if self.dropped:
            line += f"; {len(self.dropped)} dropped: " + ", ".join(f"{n} ({why})" for n, why in self.dropped.items())
        return line


def deb_members(deb: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of the regular files in a Debian package's data archive, without dpkg.

    A .deb is an `ar` archive: an 8-byte magic, then members with a 60-byte header each, padded to even offsets.

    Raises:
        DataError: not a .deb, or its data is compressed with something other than xz or gzip.
    """
    with open(deb, "rb") as file:
        if file.read(8) != b"!<arch>\n":
            raise DataError(f"{deb.name} is not a Debian package: it does not begin as an ar archive.")
        while len(header := file.read(60)) == 60:
            name, size = header[:16].decode("ascii").strip().rstrip("/"), int(header[48:58])
            if not name.startswith("data.tar"):
                file.seek(size + size % 2, io.SEEK_CUR)
                continue
            if name not in {"data.tar.xz", "data.tar.gz", "data.tar"}:
                raise DataError(f"{deb.name} is compressed as {name}; only xz and gzip can be read here.")
            with tarfile.open(fileobj=io.BytesIO(file.read(size)), mode="r:*") as archive:
                for member in archive:
                    if member.isfile() and (content := archive.extractfile(member)) is not None:
                        yield member.name.removeprefix("./"), content.read()
            return
    raise DataError(f"{deb.name} holds no data archive.")


def convert_stamps(deb: Path, target: Path) -> StampCounts:
    """Write Tux Paint's stamps as an image folder.

    Writes `images/<category>/...png` (RGB on white, square, at most 448 px), `metadata.jsonl` with rows
    {"file_name", "category", "captions": [English caption]} and `translations.jsonl` with rows
    {"file_name", "captions": {language code: caption}}.
    """
    captions: dict[str, list[str]] = {}
    images: dict[str, dict[str, bytes]] = defaultdict(dict)
    try:
        for name, content in deb_members(deb):
            if not name.startswith(STAMPS_PREFIX):
                continue
            path = PurePosixPath(name.removeprefix(STAMPS_PREFIX))
            stem = str(path.with_suffix(""))
            if path.suffix == ".txt":
                captions[stem] = content.decode("utf-8", errors="replace").splitlines()
            elif path.suffix in IMAGE_SUFFIXES:
                images[stem][path.suffix] = content
    except (tarfile.TarError, lzma.LZMAError, EOFError) as e:
        raise DataError(f"{deb.name} is damaged: {e}.") from e

    counts = StampCounts()
    rows, translations = [], []
    for stem in sorted(images):
        english, others = _parse_captions(captions.get(stem, []))
        if not english:
            counts.dropped[stem] = "no caption"
            continue
        try:
            image = _square_on_white(_rasterise(images[stem]))
        except (ValueError, OSError) as e:
            counts.dropped[stem] = str(e)
            continue
        file_name = f"images/{stem}.png"
        (target / file_name).parent.mkdir(parents=True, exist_ok=True)
        image.save(target / file_name)
        rows.append({"file_name": file_name, "category": stem.split("/")[0], "captions": [english]})
        translations.append({"file_name": file_name, "captions": {"en": english} | others})
        counts.kept += 1
        counts.twins += len(images[stem]) - 1
    _write_jsonl(target / "metadata.jsonl", rows)
    _write_jsonl(target / "translations.jsonl", translations)
    return counts


def _parse_captions(lines: Sequence[str]) -> tuple[str, dict[str, str]]:
    """Split a stamp's text file: the first line is English, the rest are `<language>.utf8=<caption>`."""
    english = _one_line(lines[0]) if lines else ""
    others = {}
    for line in lines[1:]:
        key, separator, text = line.partition(".utf8=")
        if separator and (text := _one_line(text)):
            others[key.strip()] = text
    return english, others


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _rasterise(files: dict[str, bytes]) -> Image.Image:
    """The drawing as an image: the SVG when there is one, except one with text, whose look depends on fonts."""
    svg, png = files.get(".svg"), files.get(".png")
    if svg is None or (png is not None and b"<text" in svg):
        assert png is not None
        return Image.open(io.BytesIO(png))
    try:
        import resvg_py
    except ImportError as e:
        raise ImportError("Drawing the stamps needs resvg-py: pip install 'vlm-bridge[quickstart]'") from e
    # 96 dpi is what CSS says; without it a size in points is refused. System fonts differ between machines.
    drawn = resvg_py.svg_to_bytes(svg_string=svg.decode("utf-8"), width=STAMP_SIZE, dpi=96.0, skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(drawn)))


def _square_on_white(image: Image.Image) -> Image.Image:
    """Composite on white, shrink to STAMP_SIZE at most, and pad to a square so that no centre crop cuts anything."""
    rgba = image.convert("RGBA")
    flat = Image.new("RGB", rgba.size, "white")
    flat.paste(rgba, mask=rgba.getchannel("A"))
    if np.asarray(flat).min() > 225:
        raise ValueError("nothing visible on white")
    flat.thumbnail((STAMP_SIZE, STAMP_SIZE), Image.Resampling.LANCZOS)
    side = max(flat.size)
    square = Image.new("RGB", (side, side), "white")
    square.paste(flat, ((side - flat.width) // 2, (side - flat.height) // 2))
    return square


def normalise_caption(caption: str) -> str:
    """Caption without case, repeated spaces and final full stop: what makes two captions the same for a split."""
    return " ".join(caption.casefold().split()).rstrip(" .")


def write_stamp_splits(
    root: str | Path,
    seed: int = 0,
    n_test: int = 100,
    languages: Iterable[str] = (),
    train_name: str = "train.jsonl",
    test_name: str = "test.jsonl",
) -> tuple[Path, Path]:
    """Split the stamps' metadata in two so that no English caption is on both sides, and return (train, test) paths.

    Images that share a normalised caption (often two drawings of one thing) go to one side together. Rows keep the
    English caption first; each of `languages` (codes of `translations.jsonl`, as "de") adds
    {"prompt": "Describe the image in German.", "caption": ...} where the stamp has a translation of its own.

    Raises:
        DataError: an unknown language, or `n_test` leaves nothing to train on.
    """
    root = Path(root)
    languages = list(languages)
    if unknown := [code for code in languages if code not in LANGUAGES]:
        raise DataError(f"No prompt is known for {', '.join(unknown)}. Known languages: {', '.join(LANGUAGES)}.")
    rows = _read_jsonl(root / "metadata.jsonl")
    if not 0 < n_test < len(rows):
        raise DataError(f"n_test is {n_test}, but must be between 1 and {len(rows) - 1}: there are {len(rows)} stamps.")
    translations = {row["file_name"]: row["captions"] for row in _read_jsonl(root / "translations.jsonl")}

    groups: dict[str, list[dict]] = defaultdict(list)
    for row in rows:
        groups[normalise_caption(row["captions"][0])].append(row)
    keys = sorted(groups)
    random.Random(seed).shuffle(keys)
    in_test: set[str] = set()
    n_taken = 0
    for key in keys:
        if n_taken + len(groups[key]) <= n_test:
            in_test.add(key)
            n_taken += len(groups[key])

    paths = (root / train_name, root / test_name)
    for path, is_test in zip(paths, (False, True), strict=True):
        chosen = [row for row in rows if (normalise_caption(row["captions"][0]) in in_test) == is_test]
        _write_jsonl(path, (_with_languages(row, translations[row["file_name"]], languages) for row in chosen))
    return paths


def _with_languages(row: dict, translations: dict[str, str], languages: Sequence[str]) -> dict:
    english = row["captions"][0]
    extra = [
        {"prompt": f"Describe the image in {LANGUAGES[code]}.", "caption": translations[code]}
        for code in languages
        if translations.get(code, english) != english  # an untranslated caption is a copy of the English one
    ]
    return row | {"captions": [english, *extra]}


def convert_easy_vqa(wheel: Path, target: Path) -> dict[str, int]:
    """Write easy-VQA in VQAv2's format with the package's own split, and return the number of questions of each part.

    For each of train and test: `<part>/<image_id>.png`, `<part>_questions.json` and `<part>_annotations.json`. A
    question has one answer, not VQAv2's ten, so exact match is the metric that fits.
    """
    counts = {}
    with zipfile.ZipFile(wheel) as archive:
        for part, first_id in (("train", 0), ("test", 1_000_000)):
            prefix = f"easy_vqa/data/{part}/images/"
            (target / part).mkdir(parents=True)
            known = set()
            for name in archive.namelist():
                image_id = PurePosixPath(name).stem
                if name == f"{prefix}{image_id}.png" and image_id.isdecimal():
                    (target / part / f"{image_id}.png").write_bytes(archive.read(name))
                    known.add(int(image_id))
            questions, annotations = [], []
            for index, (question, answer, image_id) in enumerate(
                json.loads(archive.read(f"easy_vqa/data/{part}/questions.json"))
            ):
                if image_id not in known:
                    raise DataError(
                        f"{wheel.name}: {part}/questions.json row {index} names image {image_id}: not there."
                    )
                ids = {"question_id": first_id + index, "image_id": image_id}
                questions.append(ids | {"question": question})
                annotations.append(
                    ids
                    | {
                        "answer_type": "yes/no" if answer in {"yes", "no"} else "other",
                        "multiple_choice_answer": answer,
                        "answers": [{"answer": answer, "answer_confidence": "yes", "answer_id": 1}],
                    }
                )
            (target / f"{part}_questions.json").write_text(json.dumps({"questions": questions}))
            (target / f"{part}_annotations.json").write_text(json.dumps({"annotations": annotations}))
            counts[part] = len(questions)
    return counts


def _read_jsonl(path: Path) -> list[dict]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
