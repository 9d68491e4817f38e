"""Labels, and the templates that make texts of them."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from vlm.errors import UserError, cut, nearest
from vlm.paths import existing_file, expanded
from vlm.printing import printable, require_unicode

TABLES = {".csv": ",", ".tsv": "\t"}
"""Endings of table files, and what is between their cells."""

HEADERS = ("label", "labels", "class", "classes", "class_name", "name")
"""What the column of labels may be called in a table, the first choice first."""

PLACE = "{}"
"""Where the label goes in a template."""

PHOTO = ("a photo of a {}.",)
"""What CLIP's paper begins with (arXiv 2103.00020, section 3.1.4)."""

TEMPLATES: dict[str, tuple[str, ...]] = {
    "imagenet": (
        "itap of a {}.",
        "a bad photo of the {}.",
        "a origami {}.",
        "a photo of the large {}.",
        "a {} in a video game.",
        "art of the {}.",
        "a photo of the small {}.",
    )
}
"""By name; `imagenet` are the seven that CLIP's authors found nearly as good as all eighty."""


def read_labels(labels: str) -> list[str]:
    """Return labels out of `a,b,c`, out of a text file with one on each line, or out of a table (CSV, TSV); empty lines
    are left out. A table has one column, or one called `label`, or one row.

    Raises UserError for a file that is not there, a table whose labels are not told apart from its other columns, fewer
    than two labels, and a label that comes twice.
    """
    path = expanded(labels)
    if existing_file(labels) or (path.suffix.lower() in (".txt", *TABLES) and "," not in labels):
        found = _lines(path, "--labels")
        if path.suffix.lower() in TABLES:
            found = _column(found, path)
    else:
        found = [label for part in labels.split(",") if (label := part.strip())]
    require_labels(found, f"--labels {labels}")
    return found


def _column(lines: Sequence[str], path: Path) -> list[str]:
    """Return the labels in the lines of a table. Raises UserError if it has several columns, and none is of labels."""
    try:
        rows = list(csv.reader(lines, delimiter=TABLES[path.suffix.lower()], skipinitialspace=True, strict=True))
    except csv.Error as error:
        raise UserError(f"--labels {path}: not a table: {error}") from None
    if not rows:
        return []
    if len(rows) == 1:
        return [cell.strip() for cell in rows[0] if cell.strip()]
    names = [name.strip().lower() for name in rows[0]]
    column = next((names.index(name) for name in HEADERS if name in names), None)
    if column is None and max(map(len, rows)) > 1:
        raise UserError(
            f"--labels {path}: it has {len(names)} columns ({cut(', '.join(names))}), and none is called `label`; "
            "rename the column of labels, or give a text file with one label a line"
        )
    if column is None:
        return [row[0].strip() for row in rows]
    return [row[column].strip() for row in rows[1:] if len(row) > column and row[column].strip()]


def require_labels(labels: Sequence[str], where: str) -> None:
    """Raise UserError unless there is something to choose from, and no label twice."""
    for label in labels:
        require_unicode(label, f"{printable(where)}: label {printable(label)}")
    twice = [label for label, count in Counter(labels).items() if count > 1]
    if twice:
        raise UserError(f"{where}: {', '.join(map(repr, twice))} more than once; give each label once")
    if len(labels) < 2:
        found = f"only {labels[0]!r}" if labels else "no label"
        raise UserError(f"{where}: {found}; give two labels or more, as in --labels cat,dog")


def read_templates(templates: Sequence[str], named: str | None) -> tuple[str, ...]:
    """The given `templates`, or those that are `named`: a name in `TEMPLATES`, or a text file with one on each line;
    none if there are neither.

    Raises UserError for a name or file that is not there, and for a template without `{}`.
    """
    if templates and named:
        raise UserError("--template and --templates: give one of the two")
    if named in TEMPLATES:
        return TEMPLATES[named]
    if named and not existing_file(named):
        raise UserError(f"templates {named}: no such file, and no templates of that name; {nearest(named, TEMPLATES)}")
    found = _lines(expanded(named), "templates") if named else list(templates)
    if named and not found:
        raise UserError(f"templates {named}: there is no template in it")
    for template in found:
        require_unicode(template, f"template {printable(template)}")
        if PLACE not in template:
            raise UserError(f"template {template!r} has no {PLACE} where the label goes")
    return tuple(found)


def fill(template: str, label: str) -> str:
    """The text of a label. Folders are named with underscores for spaces, and no text is."""
    return template.replace(PLACE, label.replace("_", " "))


def _lines(path: Path, option: str) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{option} {path}: cannot be read ({error.strerror}); give a text file, one a line") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{option} {path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    return [line.strip() for line in text.splitlines() if line.strip()]
