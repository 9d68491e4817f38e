"""What commands write: one process at a time, whole or not at all."""

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from tests.tiny import image
from vlm import classify, encode, evaluate, export, index, predict, probe
from vlm.cli import app
from vlm.errors import UserError
from vlm.locks import InUse, locked, locked_folder
from vlm.predict import predict as predict_rows
from vlm.standard_streams import LastingStream

QUIET = Console(quiet=True)
COMMANDS = {
    "predict": (locked, lambda out: predict.run("m", ["p"], prompt="?", output=out, console=QUIET)),
    "classify": (locked, lambda out: classify.run("m", ["p"], labels="a,b", output=out, console=QUIET)),
    "probe": (locked, lambda out: probe.run(["m"], data="p", k=[1], output=out, console=QUIET)),
    "encode": (locked, lambda out: encode.run(["p"], encoder="m", output=out, console=QUIET)),
    "index": (locked_folder, lambda out: index.run(["p"], encoder="m", output=out, console=QUIET)),
    "export": (locked, lambda out: export.run("m", "remote_code", out, console=QUIET)),
}


@pytest.fixture
def photos(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("p").mkdir()
    for n in range(3):
        image(n).save(f"p/{n}.png")


@pytest.mark.parametrize("name", COMMANDS)
def test_an_output_that_another_process_writes_is_refused_before_anything_is_loaded(name, photos):
    lock, command = COMMANDS[name]
    with lock(Path("out")), pytest.raises(InUse, match=f"out is in use by process {os.getpid()} .*--output"):
        command(Path("out"))
    assert not Path("out").exists()


def test_an_evaluation_that_another_process_writes_is_refused(tmp_path, monkeypatch):
    from tests.tiny import tiny

    for part in tiny():
        part.save_pretrained(tmp_path / "m")
    image().save(tmp_path / "0.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png", "caption": "a cat"}))
    run = partial(evaluate.run, str(tmp_path / "m"), f"format=image_folder path={tmp_path}", limit=None, console=QUIET)
    with locked_folder(tmp_path / "out"), pytest.raises(InUse, match="out is in use by"):
        run(metrics=["exact_match"], output=tmp_path / "out")


@pytest.mark.parametrize("name", ["classify", "probe", "encode", "export"])
def test_an_output_that_cannot_be_written_is_refused_before_anything_is_loaded(name, photos):
    Path("file").write_text("")
    with pytest.raises(UserError, match=r"cannot write in .*file"):
        COMMANDS[name][1](Path("file/out"))
    (Path("full") / "notes").mkdir(parents=True)
    with pytest.raises(UserError, match="full exists already"):
        COMMANDS[name][1](Path("full"))


@pytest.mark.parametrize("name", COMMANDS)
def test_a_name_that_no_file_can_have_is_refused_before_anything_is_loaded(name, photos):
    with pytest.raises(UserError, match="File name too long"):
        COMMANDS[name][1](Path("x" * 256))


def test_predictions_into_a_folder_are_refused_before_anything_is_loaded(photos):
    with pytest.raises(UserError, match="p is a folder; name a file with --output"):
        COMMANDS["predict"][1](Path("p"))


def test_an_evaluation_replaces_only_results_of_the_same_model_on_the_same_data(tmp_path, monkeypatch):
    asked = {"model": "org/m", "data": {"format": "image_folder", "path": "/a"}}
    evaluate._require_same(tmp_path / "none", asked)
    evaluate._require_same(tmp_path, asked)
    summary = tmp_path / "summary.json"
    for text in ("", "[]", '{"metrics": {}}', '{"data": 1, "model": 2}'):
        summary.write_text(text)
        with pytest.raises(UserError, match=r"holds summary.json, and no record of .*--output"):
            evaluate._require_same(tmp_path, asked)
    summary.write_text(json.dumps(asked | {"metrics": {}}))
    evaluate._require_same(tmp_path, asked)
    for other in ({"model": "org/n"}, {"data": asked["data"] | {"limit": 3}}, {"data": asked["data"] | {"path": "/b"}}):
        with pytest.raises(UserError, match=r"holds the results of .*choose another folder with --output"):
            evaluate._require_same(tmp_path, asked | other)
    summary.unlink()
    (tmp_path / "predictions.jsonl").write_text("mine")
    with pytest.raises(UserError, match=r"holds predictions.jsonl, and no record"):
        evaluate._require_same(tmp_path, asked)


def test_the_data_of_an_evaluation_is_recorded_the_same_from_any_folder(photos, tmp_path, monkeypatch):
    whole = {"format": "image_folder", "path": str(tmp_path / "p"), "limit": 3}
    assert evaluate._whole(whole | {"path": "p"}, tmp_path) == whole
    monkeypatch.chdir("p")
    assert evaluate._whole(whole | {"path": "../p"}, Path()) == whole
    assert evaluate._whole({"path": "user/images", "split": "test"}, Path()) == {"path": "user/images", "split": "test"}


@pytest.mark.parametrize("name", ["predict", "chat", "data", "runs"])
def test_only_training_runs_in_several_processes(name, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    words = {"predict": ["m", "p", "--prompt", "?", "--output", "o"], "chat": ["m"], "data": ["check", "x"], "runs": []}
    done = CliRunner().invoke(app, [name, *words[name]])
    assert done.exit_code == 2
    assert f"vlm {name} runs in one process, and 2 were started" in done.output


class Full:
    """A disk that takes so many bytes of a file."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, lines):
        written = self.file.write(lines[: self.room])
        self.room -= written
        if written < len(lines):
            self.file.flush()
            raise OSError(28, "No space left on device")


def test_a_full_disk_keeps_whole_rows_of_predictions(photos, monkeypatch):
    def answers(requests):
        return ["a cat"] * len(requests)

    ask = partial(predict_rows, answers, prompt="?", model="m", output=Path("out"))
    ask(["p/0.png"])
    before = Path("out").read_bytes()
    append = predict._append
    with monkeypatch.context() as patch:
        patch.setattr(predict, "_append", lambda file, lines: append(Full(file, 20), lines))
        with pytest.raises(UserError, match=r"out could not be saved: the disk is full\..*continues after the rows"):
            ask([f"p/{n}.png" for n in range(3)])
    assert Path("out").read_bytes() == before
    assert ask([f"p/{n}.png" for n in range(3)]).earlier == 1
    assert [json.loads(line)["image"] for line in Path("out").read_text().splitlines()] == [
        f"p/{n}.png" for n in range(3)
    ]


PRINTS = """
import os, sys
from rich.console import Console
from vlm.standard_streams import lasting_streams
with lasting_streams():
    print("first", flush=True)
    sys.stdin.readline()
    for n in range(3):
        print("x" * 9000)
        Console().print("y" * 9000, highlight=False, soft_wrap=True)
        sys.stderr.write("on" + "\\n")
    os.system("echo from a child")
print("after")
open(sys.argv[1], "w").write("done")
"""


@pytest.mark.parametrize("both", [False, True])
def test_work_goes_on_when_nobody_reads_the_output(tmp_path, both):
    process = subprocess.Popen(
        [sys.executable, "-c", PRINTS, tmp_path / "done"], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if both else subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout.readline() == "first\n"
    process.stdout.close()
    process.stdin.write("go on\n")
    process.stdin.close()
    said = "" if both else process.stderr.read()
    assert process.wait() == 0
    assert (tmp_path / "done").read_text() == "done"
    assert "Traceback" not in said
    assert said.count("nobody reads the output any more; going on without it") == (0 if both else 1)


def test_on_a_full_disk_what_is_printed_is_dropped_until_there_is_room(capfd):
    class Log:
        full, lines = True, ()

        def write(self, text):
            if self.full:
                raise OSError(28, "No space left on device")
            self.lines += (text,)

    log = Log()
    stream = LastingStream(log)
    assert [stream.write("lost"), stream.write("lost too")] == [4, 8]
    log.full = False
    stream.write("kept")
    assert log.lines == ("kept",)
    assert capfd.readouterr().err.count("the output cannot be written: No space left on device") == 1


def test_a_closed_terminal_tells_a_run_to_stop_but_not_under_nohup(monkeypatch):
    from vlm.training.callbacks import StopOnSignal

    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with StopOnSignal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.told == signal.SIGHUP
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with StopOnSignal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.told is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_tracker_that_fails_ends_no_run(tmp_path, caplog):
    from tests.training.helpers import trainer_of
    from vlm.training.tracking import TRACKERS, outlive_trackers

    class Broken(TRACKERS["tensorboard"]):
        def __init__(self):
            super().__init__()
            self.calls = 0

        def setup(self, *args, **kwargs):
            pass

        def on_train_begin(self, *args, **kwargs):
            pass

        def on_log(self, *args, **kwargs):
            self.calls += 1
            raise OSError(28, "No space left on device")

    broken = Broken()
    trainer = trainer_of(tmp_path, callbacks=[broken])
    outlive_trackers(trainer.callback_handler.callbacks)
    trainer.train()
    assert trainer.state.global_step == 3
    assert broken.calls > 3
    assert caplog.text.count("Broken failed (OSError: [Errno 28] No space left on device); training goes on") == 1
