"""Rows with labels: which are read, and which are named."""

import json

from tests.data.reader_files import images, lines
from vlm.recognition.labelled_images import read_labelled_images


def test_rows_with_labels_of_any_kind(tmp_path):
    images(tmp_path, *(f"{n}.png" for n in range(8)))
    labels = [1, 2.0, "1", " 2 ", None, "x \ud83d", [1], True]
    rows = [{"file_name": f"{n}.png", "label": label} for n, label in enumerate(labels)]
    rows += [{"file_name": "0.png", "label": 1}, {"file_name": ["0.png", "1.png"], "label": 1}, {"label": 1}]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_labelled_images(str(tmp_path))
    assert (found.labels, found.targets) == (["1", "2", "true"], [0, 1, 0, 1, 2])
    assert [line.partition("metadata.jsonl:")[2] for line in lines(found.problems)] == [
        "5: label: missing",
        "6: label: half of a character (\\ud83d, in place of character 2); write the text again",
        "7: label: expected text, found [1]",
        "9: file_name: 0.png has a row already",
        "10: file_name: expected the name of one image, found 2",
        "11: file_name: expected the name of an image, found None",
    ]


def test_labels_in_a_table(tmp_path):
    images(tmp_path, "a.png", "b.png")
    (tmp_path / "metadata.csv").write_text("file_name,label\na.png,None\nb.png,007\n")
    assert read_labelled_images(str(tmp_path)).labels == ["007", "None"]
