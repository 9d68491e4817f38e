"""Atomic files and folders, and locks: with killed processes and full file systems."""

import os
import signal
import subprocess
import sys
from functools import partial

import pytest

from vlm.errors import UserError
from vlm.files import (
    atomic_folder,
    atomic_write,
    discard,
    new_file,
    remove_leftovers,
    replacing_files,
    scratch_folder,
    write_text,
)
from vlm.locks import InUse, locked, locked_folder


def names(folder):
    return sorted(os.listdir(folder))


def process(code, *words):
    """Run Python code in another process, after it has said that it is ready."""
    source = f"import sys, time, pathlib\nfrom vlm import disk_faults, files, locks\n{code}"
    started = subprocess.Popen(
        [sys.executable, "-c", source, *map(str, words)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert started.stdout.readline() == "ready\n"
    return started


WRITES = """
with files.atomic_write(pathlib.Path(sys.argv[1])) as file, files.atomic_folder(pathlib.Path(sys.argv[2])) as folder:
    file.write("half"); file.flush(); (folder / "a").write_text("half")
    print("ready", flush=True); sys.stdin.read()
"""

HOLDS = """
import os
with locks.locked(pathlib.Path(sys.argv[1])):
    if os.fork() == 0:  # like a worker that loads data; it speaks, so that it is there when the holder is killed
        print("ready", flush=True); sys.stdin.read(); os._exit(0)
    sys.stdin.read()
"""


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    write_text(tmp_path / "deep/a", "before")
    with pytest.raises(TypeError), atomic_write(tmp_path / "deep/a", "wb") as file:
        file.writelines([b"half", None])
    assert (tmp_path / "deep/a").read_text() == "before"
    assert names(tmp_path / "deep") == ["a"]
    with atomic_write(tmp_path / "deep/a") as file:
        file.write("après")
        assert (tmp_path / "deep/a").read_text() == "before"
    assert (tmp_path / "deep/a").read_bytes() == "après".encode()
    assert names(tmp_path / "deep") == ["a"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(TypeError), atomic_folder(tmp_path / "a") as folder:
        [(folder / "x").write_text(text) for text in ("half", None)]
    assert names(tmp_path) == []
    (tmp_path / "a").mkdir()  # an empty one is as good as none
    with atomic_folder(tmp_path / "a") as folder:
        (folder / "sub").mkdir()
        (folder / "sub/x").write_text("whole")
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a/sub/x").read_text() == "whole"
    with pytest.raises(UserError, match="a exists already; choose another name"), atomic_folder(tmp_path / "a"):
        pytest.fail("what is there would be lost")


def test_a_link_in_place_of_a_lock_is_not_followed(tmp_path):
    """Whoever can write to the folder could otherwise have any file of the user overwritten."""
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "shared").mkdir()
    for name in (".scratch.00000000.writing.lock", ".out.json.lock"):
        (tmp_path / "shared" / name).symlink_to(tmp_path / "precious")
    with scratch_folder(tmp_path / "shared" / "scratch"):
        pass
    with pytest.raises(UserError, match="cannot write in"), locked(tmp_path / "shared" / "out.json"):
        pass
    assert (tmp_path / "precious").read_text() == "mine"


def test_nobody_else_reads_a_scratch_folder(tmp_path):
    with scratch_folder(tmp_path / "scratch") as folder:
        assert folder.stat().st_mode & 0o777 == 0o700


def test_links_devices_and_long_names(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_text(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "text"
    write_text(tmp_path / ("ü" * 127), "a name of 254 bytes")
    with locked(tmp_path / ("ü" * 127)):
        pass
    assert names(tmp_path) == ["link", "real", "ü" * 127]
    with atomic_write(tmp_path.__class__(os.devnull)) as file:
        file.write("nothing is put in its place")
    assert not os.path.isfile(os.devnull)
    with pytest.raises(UserError, match="is a folder"), atomic_write(tmp_path):
        pass
    with pytest.raises(UserError, match=r"cannot write in .*real"), atomic_write(tmp_path / "real/a"):
        pass


@pytest.mark.parametrize("name", ["ü" * 128, "a/" * 2048 + "a", "a\0b"])
@pytest.mark.parametrize(
    "opened", [atomic_write, atomic_folder, partial(replacing_files, last="x"), locked, locked_folder, new_file]
)
def test_a_name_that_no_file_can_have_is_refused(tmp_path, opened, name):
    with pytest.raises(UserError, match=r"cannot be written: (File name too long|.*null)"), opened(tmp_path / name):
        pytest.fail("nothing can be written there")
    assert names(tmp_path) == []


def test_what_a_killed_process_left_is_removed_by_the_next_and_what_is_being_written_is_not(tmp_path):
    file, folder = tmp_path / "a", tmp_path / "b"
    write_text(file, "before")
    (tmp_path / ".a.12345678.writing").mkdir()  # left by a killed process
    (tmp_path / ".a.mine.writing").write_text("a file of the user's")
    writer = process(WRITES, file, folder)
    left = [name for name in names(tmp_path) if name.startswith(".")]
    assert len(left) == 5, "two that are written, each with its lock, and one of the user's"
    write_text(file, "written meanwhile")
    remove_leftovers(tmp_path)
    assert [name for name in names(tmp_path) if name.startswith(".")] == left
    writer.kill()
    writer.wait()
    assert file.read_text() == "written meanwhile"
    assert not folder.exists()
    write_text(file, "after")
    with atomic_folder(folder):
        pass
    assert names(tmp_path) == [".a.mine.writing", "a", "b"]


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_second_process_is_refused_until_the_first_ends_even_if_it_is_killed(tmp_path, kind):
    path = tmp_path / "run"
    if kind == "folder":
        path.mkdir()
    here = rf"run is in use by process {os.getpid()} on .*, since .*\. Write elsewhere"
    with locked(path), pytest.raises(InUse, match=here), locked(path, "Write elsewhere"):
        pass
    assert names(path if kind == "folder" else tmp_path) == []
    holder = process(HOLDS, path)
    (tmp_path / "link").symlink_to(path)
    for name in (path, tmp_path / "link", tmp_path / "." / "run"):
        with pytest.raises(InUse, match=f"process {holder.pid} "), locked(name):
            pass
    holder.send_signal(signal.SIGKILL)  # its child lives on
    holder.wait()
    with locked(path):
        pass
    holder.stdin.close()


def test_a_lock_that_is_removed_as_another_process_opens_it_is_taken_by_one_only(tmp_path, monkeypatch):
    from vlm import locks

    lock, opened = tmp_path / ".lock", os.open

    def open_as_it_goes(path, *rest):
        number = opened(path, *rest)
        monkeypatch.setattr(os, "open", opened)
        os.unlink(path)  # the holder ends here
        return number

    monkeypatch.setattr(os, "open", open_as_it_goes)
    number = locks._take(lock)
    assert os.path.samestat(os.fstat(number), os.stat(lock))
    assert locks._take(lock) is None
    locks._release(lock, number)


FULL = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
print("ready", flush=True)
for path in map(pathlib.Path, sys.argv[1:]):
    try:
        with locks.locked(path):
            files.write_text(path, "x" * 9000)
    except disk_faults.DiskError as error:
        print(error, flush=True)
try:
    with files.atomic_folder(pathlib.Path(sys.argv[1] + "-folder")) as folder:
        import numpy; from safetensors.numpy import save_file
        save_file({"a": numpy.zeros(9000)}, folder / "a.safetensors")
except disk_faults.DiskError as error:
    print(error, flush=True)
"""


def test_a_disk_without_room_leaves_what_was_there(tmp_path):
    write_text(tmp_path / "a", "before")
    said, _ = process(FULL, tmp_path / "a", tmp_path / "b").communicate()
    assert [f"{tmp_path / name} could not be saved" in said for name in ("a", "b", "a-folder")] == [True] * 3
    assert "Make room, and run the command again" in said
    assert (tmp_path / "a").read_text() == "before"
    assert names(tmp_path) == ["a"]


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    (tmp_path / ".b.12345678.writing").write_text("of another process, perhaps")

    def no_locks(*args):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.warns(UserWarning, match="no locks on this file system"), locked(tmp_path / "a"):
        write_text(tmp_path / "b", "text")
    assert names(tmp_path) == [".b.12345678.writing", "b"]


def test_other_errors_are_not_taken_for_a_full_disk(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "a") as file:
        file.write((tmp_path / "missing").read_text())
    assert names(tmp_path) == []


REPLACES = """
with files.replacing_files(pathlib.Path(sys.argv[1]), "summary.json") as folder:
    for name in ("predictions.jsonl", "samples.html"):
        (folder / name).write_text("new")
    print("ready", flush=True); sys.stdin.read()
    (folder / "summary.json").write_text("new")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_files_are_replaced_together_or_stay_whatever_signal_comes(tmp_path, number):
    every = ["predictions.jsonl", "samples.html", "summary.json"]
    for name in every:
        (tmp_path / name).write_text("old")
    (tmp_path / "notes").write_text("mine")
    writer = process(REPLACES, tmp_path)
    writer.send_signal(number)
    writer.communicate()
    assert writer.returncode != 0
    assert {(tmp_path / name).read_text() for name in every} == {"old"}
    writer = process(REPLACES, tmp_path)
    assert len(names(tmp_path)) == 4 + 2, "what is written now, and its lock; what was killed is gone"
    writer.communicate()
    assert writer.returncode == 0
    assert {(tmp_path / name).read_text() for name in every} == {"new"}
    assert names(tmp_path) == sorted(["notes", *every])


KILLED = """
import os, signal
replace, left = pathlib.Path.replace, int(sys.argv[2])
def until_killed(self, target):
    global left
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    return replace(self, target)
pathlib.Path.replace = until_killed
"""


@pytest.mark.parametrize("moved", [0, 1, 2])
def test_killed_between_two_files_it_leaves_no_mixture_that_counts(tmp_path, moved):
    """`summary.json` says that the others are of one evaluation: it is never there with others of another."""
    every = ["predictions.jsonl", "samples.html", "summary.json"]
    for name in every:
        (tmp_path / name).write_text("old")
    writer = process(KILLED + REPLACES, tmp_path, moved)
    writer.communicate()
    assert writer.returncode == -signal.SIGKILL
    assert [(tmp_path / name).read_text() for name in every[:2]].count("new") == moved
    assert not (tmp_path / "summary.json").exists()
    process(REPLACES, tmp_path).communicate()
    assert {(tmp_path / name).read_text() for name in every} == {"new"}
    assert names(tmp_path) == every


def test_a_folder_is_removed_under_another_name(tmp_path, monkeypatch):
    """So that a process that is killed leaves no half of it."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda *args, **kwargs: None)  # it is killed here
        discard(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    remove_leftovers(tmp_path)
    assert names(tmp_path) == []
    discard(tmp_path / "model")
