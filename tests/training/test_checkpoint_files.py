"""Which checkpoints are whole, which is gone on from, and whether the data are still those."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.tiny import image, tiny
from tests.training.helpers import examples, rows_of
from vlm.data.example import question_and_answer
from vlm.errors import UserError
from vlm.files import write_text
from vlm.training.checkpoints import fingerprint, mark_diverged, newest, require_same_data, seal, why_broken

DATA = {"examples": 1, "answers": 2, "sha256": "0"}


def checkpoint(folder: Path, step: int, data=None) -> Path:
    made = folder / f"checkpoint-{step}"
    (made / "shards").mkdir(parents=True)
    save_file({"weight": torch.ones(30)}, made / "model.safetensors")
    torch.save({"step": step}, made / "optimizer.pt")
    (made / "trainer_state.json").write_text(json.dumps({"step": step}))
    (made / "shards" / "0.distcp").write_bytes(b"as torch.distributed writes it")
    seal(made, {"step": step, "data": data})
    return made


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def blank(path):
    """The size is right, as on a file system that had no time to write what is in the file."""
    path.write_bytes(bytes(path.stat().st_size))


def flip(path):
    """One bit, in the middle; size and index are as they were."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "harm", "why"),
    [
        ("model.safetensors", flip, r"the content of model\.safetensors has changed"),
        ("optimizer.pt", flip, r"the content of optimizer\.pt has changed"),
        ("trainer_state.json", flip, r"the content of trainer_state\.json has changed"),
        ("shards/0.distcp", flip, r"the content of shards/0\.distcp has changed"),
        ("manifest.json", Path.unlink, r"has no manifest\.json"),
        ("manifest.json", cut, r"its manifest\.json cannot be read"),
        ("manifest.json", lambda path: path.write_text("[]"), r"its manifest\.json cannot be read"),
        ("optimizer.pt", Path.unlink, r"optimizer\.pt is missing"),
        ("optimizer.pt", cut, r"optimizer\.pt has [\d,]+ bytes of [\d,]+"),
        ("optimizer.pt", blank, r"optimizer\.pt is damaged"),
        ("model.safetensors", cut, r"model\.safetensors has 191 bytes of 192"),
        ("model.safetensors", blank, r"model\.safetensors is damaged"),
        ("trainer_state.json", blank, r"trainer_state\.json is damaged"),
        ("shards/0.distcp", cut, r"shards/0\.distcp has 29 bytes of 30"),
    ],
)
def test_a_broken_checkpoint_is_passed_over_and_named(tmp_path, name, harm, why):
    whole, broken = checkpoint(tmp_path, 9), checkpoint(tmp_path, 10)
    said: list[str] = []
    assert newest(tmp_path, said.append) == broken
    assert not said
    harm(broken / name)
    assert newest(tmp_path, said.append) == whole
    (line,) = said
    assert line.startswith("checkpoint-10 is broken: ")
    assert line.endswith("; going on from checkpoint-9")
    harm(whole / name)
    with pytest.raises(UserError, match=f"no checkpoint in .* is whole: checkpoint-10 is broken: .*{why}.*--overwrite"):
        newest(tmp_path, said.append)


def test_no_checkpoint_at_all_is_no_error(tmp_path):
    assert newest(tmp_path, print) is None
    assert newest(tmp_path / "missing", print) is None


def test_the_manifest_names_what_is_there(tmp_path):
    manifest = json.loads((checkpoint(tmp_path, 3, DATA) / "manifest.json").read_text())
    assert manifest["files"].keys() == {"model.safetensors", "optimizer.pt", "trainer_state.json", "shards/0.distcp"}
    assert manifest["files"]["shards/0.distcp"] == 30
    assert {key: manifest[key] for key in ("step", "data")} == {"step": 3, "data": DATA}


def test_the_hashes_are_those_of_sha256sum(tmp_path):
    made = checkpoint(tmp_path, 3)
    written = subprocess.run(
        ["sha256sum", "shards/0.distcp", "model.safetensors"], cwd=made, capture_output=True
    ).stdout
    found = json.loads((made / "manifest.json").read_text())["sha256"]
    for line in written.decode().splitlines():
        value, name = line.split()
        assert found[name] == value


def test_a_checkpoint_from_before_there_were_hashes_is_whole(tmp_path):
    made = checkpoint(tmp_path, 3)
    manifest = json.loads((made / "manifest.json").read_text())
    del manifest["sha256"]
    write_text(made / "manifest.json", json.dumps(manifest))
    assert newest(tmp_path, print) == made


def test_whether_contents_are_read_is_for_the_caller_to_say(tmp_path):
    made = checkpoint(tmp_path, 3)
    flip(made / "model.safetensors")
    assert why_broken(made, contents=False) is None
    assert why_broken(made)


def test_a_checkpoint_that_has_diverged_is_not_gone_on_from_in_the_same_precision(tmp_path):
    made = [checkpoint(tmp_path, step) for step in (2, 4, 6)]
    mark_diverged(tmp_path, 4, "bfloat16")
    said = []
    assert newest(tmp_path, said.append, precision="bfloat16") == made[0]
    assert [line.split(":")[0] for line in said] == ["checkpoint-6 has diverged", "checkpoint-4 has diverged"]
    assert newest(tmp_path, said.append, precision="float32") == made[2]
    mark_diverged(tmp_path, 0, "bfloat16")
    with pytest.raises(UserError, match=r"or train in float32"):
        newest(tmp_path, said.append, precision="bfloat16")


def test_what_cannot_be_read_back_is_not_sealed(tmp_path):
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"it was written, but model\.safetensors is damaged"):
        seal(folder, {})
    assert why_broken(folder)


def test_a_text_is_whole_or_as_it_was(tmp_path, monkeypatch):
    write_text(tmp_path / "a.json", "before")
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", lambda number: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="the disk is full"):
            write_text(tmp_path / "a.json", "after")
    assert (tmp_path / "a.json").read_text() == "before"


# --- the data


def items(made=None):
    return rows_of(tiny()[1], made or examples(3)).items


def test_the_fingerprint_is_that_of_texts_images_and_order(tmp_path):
    before = fingerprint(items())
    assert (before["examples"], before["answers"]) == (3, 6)
    assert fingerprint(items()) == before
    made = examples(3)
    other_answer = replace(made[1], branches=(made[1].branches[0], question_and_answer("what 1", "another")))
    for changed in ([made[0], other_answer, made[2]], [made[0], replace(made[1], image_id="x"), made[2]], made[:2]):
        assert fingerprint(items(changed)) != before
    assert fingerprint(items()[::-1]) != before


def test_an_image_file_that_was_replaced_is_seen(tmp_path):
    image(0).save(tmp_path / "0.png")
    made = [replace(example, images=(str(tmp_path / "0.png"),)) for example in examples(1)]
    before = fingerprint(items(made))
    image(0, (20, 20)).save(tmp_path / "0.png")
    assert fingerprint(items(made)) != before


def test_other_data_are_refused(tmp_path):
    made = checkpoint(tmp_path, 3, DATA)
    require_same_data(made, DATA)
    with pytest.raises(UserError, match=r"1 examples with 2 answers then, now 1 examples with 3 answers.*--overwrite"):
        require_same_data(made, DATA | {"answers": 3})
    with pytest.raises(UserError, match=r"1 examples with 2 answers then, of other texts or images"):
        require_same_data(made, DATA | {"sha256": "1"})
