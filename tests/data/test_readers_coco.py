"""Readers of COCO captions."""

import pytest

from tests.data.reader_files import images, qa, write
from vlm.data.readers import SourceError, read


def read_coco(tmp_path, change=lambda content: None, **options):
    images(tmp_path / "val", "1.jpg", "2.jpg")
    content = {
        "info": {},
        "images": [{"id": 10, "file_name": "1.jpg"}, {"id": 20, "file_name": "2.jpg"}],
        "annotations": [
            {"id": 1, "image_id": 20, "caption": "second"},
            {"id": 2, "image_id": 10, "caption": "first\n"},
            {"id": 3, "image_id": 10, "caption": "also first"},
        ],
    }
    change(content)
    write(tmp_path / "c.json", content)
    return read({"format": "coco_captions", "annotations": "c.json", "images": "val", **options}, base_dir=tmp_path)


def test_coco_captions(tmp_path):
    examples, problems = read_coco(tmp_path, prompt="Caption:")
    assert problems == []
    assert [e.image_id for e in examples] == ["10", "20"]
    assert [qa(b) for b in examples[0].branches] == [("Caption:", "first"), ("Caption:", "also first")]
    assert examples[0].branches[1].where == "c.json:annotations row 2 (id 3)"
    assert examples[0].where == "c.json:images row 0 (id 10)"
    assert [e.image_id for e in read_coco(tmp_path, limit=1).examples] == ["10"]
    assert read_coco(tmp_path, limit=1).problems == []


COCO_FAULTS = [
    (lambda c: c["annotations"][0].update(caption=""), "c.json:annotations row 0 (id 1): caption: empty"),
    (lambda c: c["annotations"][0].pop("caption"), "c.json:annotations row 0 (id 1): caption: missing"),
    (lambda c: c["annotations"].append({"id": 9, "image_id": 5, "caption": "x"}),
     "c.json:annotations row 3 (id 9): image_id: no image has the id 5"),
    (lambda c: c["annotations"].append({"id": 9, "caption": "x"}), "c.json:annotations row 3: image_id: expected"),
    (lambda c: c["images"].append({"id": 30, "file_name": "1.jpg"}), "c.json:images row 2 (id 30): no annotation has"),
    (lambda c: c["images"].append({"id": 20, "file_name": "2.jpg"}), "c.json:images row 2 (id 20): id: two images"),
    (lambda c: c["images"].append({"id": 30}), "c.json:images row 2: file_name: expected an object"),
    (lambda c: c["images"][1].update(file_name="no.jpg"), "c.json:images row 1 (id 20): image: no such image"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "fault"), COCO_FAULTS, ids=[fault for _, fault in COCO_FAULTS])
def test_coco_faults(tmp_path, change, fault):
    examples, problems = read_coco(tmp_path, change)
    assert len(problems) == 1
    assert str(problems[0]).startswith(fault)
    assert len(examples[0].branches) == 2


def test_not_a_captions_file(tmp_path):
    with pytest.raises(SourceError, match=r"c\.json: not COCO captions"):
        read_coco(tmp_path, lambda c: c.pop("images"))
