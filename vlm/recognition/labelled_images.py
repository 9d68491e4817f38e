"""Images with a label each: a folder of folders, rows with a label column, or a data set of `datasets`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm.data.example import ImageSource, Problem, StoredImage
from vlm.data.image_files import find_images, is_hidden
from vlm.data.inside import Inside
from vlm.data.readers_dataset import Columns, DatasetSource
from vlm.data.readers_image_folder import METADATA_FILES, metadata_rows
from vlm.data.readers_text import RowError, as_text, file_names, required_text
from vlm.errors import UserError, nearest
from vlm.paths import existing, existing_folder
from vlm.recognition.labels import require_labels

LABEL = "label"


@dataclass(frozen=True)
class LabelledImages:
    """Attributes:
    images: by name, in order: the file, or the row of a data set.
    targets: the place in `labels` of each image's label.
    labels: each once.
    problems: rows and files that are no labelled image.
    """

    images: dict[str, ImageSource]
    targets: list[int]
    labels: list[str]
    problems: list[Problem]


def read_labelled_images(data: str, label_column: str | None = None) -> LabelledImages:
    """Read everything but the pixels of

    - a folder with `metadata.jsonl`, `.csv` or `.parquet`, in the layout of `datasets`' imagefolder: `file_name` and
      `label_column` in a row;
    - any other folder: each folder in it is a label, and has its images in it, or in folders of its own;
    - a data set that `datasets` loads, `NAME` or `NAME:SPLIT` (`train` if not said), on the Hub or saved on this disk,
      whose `label_column` holds a `ClassLabel` or strings.

    `label_column` is `label` if not said. Labels are in the order of the `ClassLabel`, or sorted.

    Raises UserError if there are no images or fewer than two labels, for a column that is not there, and for a
    `label_column` where folders are the labels.
    """
    folder = existing_folder(data)
    if folder is not None and not _is_saved(folder):
        metadata = [folder / name for name in METADATA_FILES if (folder / name).is_file()]
        if metadata:
            return _from_rows(metadata[0], label_column or LABEL)
        if label_column:
            raise UserError(f"--label-column {label_column}: there is none of {', '.join(METADATA_FILES)} in {data}")
        return _from_folders(folder)
    return _from_dataset(data, label_column or LABEL)


def _is_saved(folder: Path) -> bool:
    """Whether it is what `datasets`' `save_to_disk` wrote."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def _from_folders(folder: Path) -> LabelledImages:
    labels = sorted(path.name for path in folder.iterdir() if path.is_dir() and not is_hidden(path.name))
    require_labels(labels, f"{folder}, whose folders are the labels")
    images: dict[str, str] = {}  # file: label
    strays = [path for path in sorted(folder.iterdir()) if path.is_file() and not is_hidden(path.name)]
    problems = [Problem(str(path), "", "in no folder, so it has no label") for path in strays]
    for label in labels:
        found = find_images([str(folder / label)])
        images |= dict.fromkeys(found.paths, label)
        problems += [Problem(str(folder / label), "", line) for line in found.left_out()]
    return _labelled(dict(zip(images, images, strict=True)), list(images.values()), labels, problems, str(folder))


def _from_rows(metadata: Path, column: str) -> LabelledImages:
    problems: list[Problem] = []
    images: dict[str, ImageSource] = {}
    found: list[str] = []
    inside = Inside([metadata.parent])
    rows = metadata_rows(metadata, str(metadata), problems)
    if rows and not any(column in row for _, row in rows):
        raise UserError(f"{metadata}: no row has {column!r} (--label-column); {nearest(column, rows[0][1])}")
    for where, row in rows:
        try:
            names = file_names(row.get("file_name"), "file_name", "expected the name of an image")
            if len(names) != 1:
                raise RowError("file_name", f"expected the name of one image, found {len(names)}")
            label = required_text(row, column)
        except RowError as error:
            problems.append(Problem(where, error.key, error.why))
            continue
        if (path := str(metadata.parent / names[0])) in images:
            problems.append(Problem(where, "file_name", f"{names[0]} has a row already"))
        elif not inside.holds(path):
            problems.append(Problem(where, "file_name", f"{names[0]} is outside {metadata.parent}"))
        else:
            images[path] = path
            found.append(label)
    return _labelled(images, found, sorted(set(found)), problems, str(metadata))


def _from_dataset(data: str, column: str) -> LabelledImages:
    from datasets import ClassLabel, Image

    path, _, split = (data, "", "") if existing(data) else data.partition(":")
    options: dict[str, Any] = {"split": split} if split else {}
    source = DatasetSource(path=path, columns=Columns(caption=column), **options)
    dataset = source.load(Path())
    source.check_columns(dataset.column_names)
    columns = [name for name, feature in dataset.features.items() if isinstance(feature, Image)]
    if len(columns) != 1:
        raise UserError(f"{data}: expected one column of images, found {len(columns)} ({', '.join(columns)})")
    dataset = source.undecoded(dataset, columns[0])
    feature, values = dataset.features[column], dataset[column]
    problems = []
    images: dict[str, ImageSource] = {}
    found = []
    for row, value in enumerate(values):
        if value is None or value == -1:  # `datasets` writes -1 where a label is not told
            problems.append(Problem(f"{data}:row {row}", column, "no label"))
            continue
        images[f"{data}:row {row}"] = StoredImage(dataset, row, columns[0])
        found.append(feature.int2str(value) if isinstance(feature, ClassLabel) else as_text(value) or str(value))
    labels = list(feature.names) if isinstance(feature, ClassLabel) else sorted(set(found))
    return _labelled(images, found, labels, problems, data)


def _labelled(
    images: dict[str, ImageSource], found: Sequence[str], labels: list[str], problems: list[Problem], where: str
) -> LabelledImages:
    if not images:
        why = f" ({problems[0]})" if problems else ""
        raise UserError(f"{where}: not one image with a label{why}")
    require_labels(labels, where)
    place = {label: number for number, label in enumerate(labels)}
    return LabelledImages(images, [place[label] for label in found], labels, problems)
