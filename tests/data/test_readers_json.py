"""JSON and JSON Lines in which some rows cannot be read."""

import json

import pytest

from tests.data.reader_files import images, lines, write
from vlm.data.readers import SourceError, read
from vlm.data.readers_json import MAX_DEPTH, parse_json

GOOD = '{"file_name": "a.png", "caption": "good"}'


def read_folder(path, content: bytes):
    images(path, "a.png", "b.png")
    (path / "metadata.jsonl").write_bytes(content)
    return read({"format": "image_folder", "path": "."}, base_dir=path)


BAD_LINES = {
    "nested": ('{"file_name": "b.png", "caption": ' + "[" * 100_000 + "]" * 100_000 + "}", "caption: expected text"),
    "key_twice": ('{"file_name": "b.png", "caption": "x", "caption": "y"}', "with the key 'caption' twice"),
    "half_emoji": ('{"file_name": "b.png", "caption": "x \\ud83d"}', "caption: half of a character (\\ud83d"),
    "half_question": ('{"file_name": "b.png", "question": "\\ud83d", "answer": "x"}', "question: half of a character"),
    "half_reference": ('{"file_name": "b.png", "question": "x", "answers": ["\\ude00"]}', "answers[0]: half of a"),
    "half_turn": ('{"file_name": "b.png", "messages": [{"role": "user", "content": "\\ud83d"}]}', "messages[0]: half"),
    "half_name": ('{"file_name": "b\\udce9.png", "caption": "x"}', "file_name: not UTF-8 text (byte 0xe9, or \\udce9"),
    "half_id": ('{"file_name": "b.png", "image_id": "\\ud83d", "caption": "x"}', "image_id: half of a character"),
    "half_prompt": ('{"file_name": "b.png", "prompt": "\\ud83d", "caption": "x"}', "prompt: half of a character"),
    "list_id": ('{"file_name": "b.png", "image_id": [1], "caption": "x"}', "image_id: an id is text or a number"),
    "infinity": ('{"file_name": "b.png", "caption": Infinity}', "caption: expected text, found inf"),
    "nan": ('{"file_name": "b.png", "caption": NaN}', "nothing to answer"),
    "cut_off": ('{"file_name": "b.png", "capt', "not valid JSON"),
    "a_list": ('[["file_name", "b.png"]]', "expected an object {...}, found [['file_name', 'b.png']]"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_named_and_those_around_it_are_read(tmp_path, name):
    line, why = BAD_LINES[name]
    examples, problems = read_folder(tmp_path, f"{GOOD}\n{line}\n{GOOD}".encode())
    assert [branch.answer for e in examples for branch in e.branches] == ["good", "good"]
    assert [p.where for p in problems] == ["metadata.jsonl:2"]
    assert why in str(problems[0])
    assert len(str(problems[0])) < 300


def test_long_numbers_and_deep_columns_of_others_do_not_matter(tmp_path):
    deep = f'{{"file_name": "b.png", "caption": "x", "other": {"[" * 5000}{"]" * 5000}, "n": {"9" * 5000}}}'
    examples, problems = read_folder(tmp_path, f"{GOOD}\n{deep}".encode())
    assert [e.branches[0].answer for e in examples] == ["good", "x"]
    assert problems == []


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_encodings_and_line_ends(tmp_path, encoding, end):
    content = end.join([GOOD, "", '{"file_name": "b.png", "caption": "ä 😀"}', "no json"])
    examples, problems = read_folder(tmp_path, content.encode(encoding))
    assert [e.branches[0].answer for e in examples] == ["good", "ä 😀"]
    assert [p.where for p in problems] == ["metadata.jsonl:4"]


@pytest.mark.parametrize(("depth", "cut"), [(MAX_DEPTH - 1, False), (100_000, True)])
def test_only_what_is_nested_too_deep_is_cut_out(depth, cut):
    inner = '"]["'
    text = f'[{{"a": "[\\"]", "b": {"[" * depth}{inner}{"]" * depth}}}, {{"c": [1, "}}"]}}]'
    made = parse_json(text)
    assert made[0]["a"] == '["]'
    assert made[1] == {"c": [1, "}"]}
    value = made[0]["b"]
    while isinstance(value, list):
        value = value[0]
    assert value == ({f"nested more than {MAX_DEPTH} levels deep": None} if cut else "][")


def test_a_bad_row_of_a_list_is_named(tmp_path):
    images(tmp_path, "a.png")
    row = '{"image": "a.png", "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "%s"}]}'
    bad = ["[" * 100_000 + "]" * 100_000, '{"id": 1, "id": 2}', row % "\\ud83d"]
    good = row % "x"
    write(tmp_path / "l.json", f"[{', '.join([good, *bad, good])}]")
    examples, problems = read({"format": "llava", "path": "l.json"}, base_dir=tmp_path)
    assert [len(e.branches) for e in examples] == [2]
    assert [p.where for p in problems] == [f"l.json:row {row}" for row in (1, 2, 3)]


def test_rows_are_found_whatever_the_file_is_called(tmp_path):
    images(tmp_path, "a.png")
    rows = [{"file_name": "a.png", "caption": "x"}, {"file_name": "a.png", "caption": "y"}]
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "x"}]
    (tmp_path / "metadata.jsonl").write_text(json.dumps(rows, indent=1))
    assert len(read({"format": "image_folder", "path": "."}, base_dir=tmp_path).examples[0].branches) == 2
    content = "".join(json.dumps({"image": "a.png", "conversations": turns}) + "\n" for _ in "ab")
    (tmp_path / "l.json").write_text(content)
    assert len(read({"format": "llava", "path": "l.json"}, base_dir=tmp_path).examples[0].branches) == 2


def test_a_file_that_cannot_be_opened_is_named(tmp_path):
    (tmp_path / "l.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SourceError, match=r"l\.json: not UTF-16 text"):
        read({"format": "llava", "path": "l.json"}, base_dir=tmp_path)


def test_ids_of_coco_may_be_of_any_kind_but_lists(tmp_path):
    images(tmp_path, "a.png", "b.png")
    content = {
        "images": [
            {"id": "1", "file_name": "a.png"},
            {"id": [2], "file_name": "b.png"},
            {"id": 1, "file_name": "b.png"},
        ],
        "annotations": [{"image_id": 1, "caption": "x"}, {"image_id": 1.0, "caption": "y"}, {"image_id": None}, 3],
    }
    write(tmp_path / "c.json", content)
    source = {"format": "coco_captions", "annotations": "c.json", "images": "."}
    examples, problems = read(source, base_dir=tmp_path)
    assert [(e.image_id, [b.answer for b in e.branches]) for e in examples] == [("1", ["x", "y"])]
    assert sorted(lines(problems)) == [
        "c.json:annotations row 2: image_id: expected an id (text or a number), found None",
        "c.json:annotations row 3: expected an object with 'image_id' and 'caption', found 3",
        "c.json:images row 1: id: an id is text or a number, found [2]",
        "c.json:images row 2 (id 1): id: two images have this id; the other one is in c.json:images row 0 (id '1')",
    ]
