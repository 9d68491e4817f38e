"""What goes wrong in a long run, done to short ones: `python -m benchmarks.faults` makes the table in docs/faults.md.
With words behind it only the faults whose names hold one of them are done, and the other rows stay.

Each run has one fault, is resumed if it ended, and compared with an undisturbed run: weights, losses and answers, bit
for bit.
"""

import errno
import json
import os
import resource
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import Trainer

from benchmarks.disturbed import Workshop, last_checkpoint, last_step, outcome, put_table, table_rows
from vlm import generation
from vlm.data.dataset import TreeItem
from vlm.modeling import VLMForConditionalGeneration
from vlm.training import features
from vlm.training.callbacks import PartCheck
from vlm.training.trainer import VLMTrainer

STEP = 8
"""In which the faults come: checkpoints are written at every second step, so that one step has to be taken again."""


def at_step(do: Callable[[], None]) -> None:
    """Call `do` in the middle of the step, in this process."""
    original = PartCheck.on_pre_optimizer_step

    def on_pre_optimizer_step(check: PartCheck, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        original(check, args, state, control, **kwargs)
        if state.global_step + 1 == STEP:
            do()

    PartCheck.on_pre_optimizer_step = on_pre_optimizer_step  # type: ignore[method-assign]


def before(owner: Any, name: str, do: Callable[..., None]) -> None:
    """Have `do` called with the arguments of a function before each of its calls."""
    original = getattr(owner, name)

    def called(*args: Any, **kwargs: Any) -> Any:
        do(*args)
        return original(*args, **kwargs)

    setattr(owner, name, called)


def tell(*numbers: int) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)


def signal_in_step(*numbers: int) -> None:
    at_step(partial(tell, *numbers))


def signal_in_evaluation() -> None:
    before(VLMTrainer, "prediction_step", lambda trainer, *_: trainer.state.global_step == 8 and tell(signal.SIGINT))


def signal_while_encoding() -> None:
    before(features, "choose", lambda *_: tell(signal.SIGTERM))


def signal_while_answering() -> None:
    before(generation, "_answers", lambda *_: tell(signal.SIGTERM))


def disk_full_at_a_checkpoint() -> None:
    """No file may grow while the checkpoint of step 6 is written."""
    original = VLMTrainer._write_checkpoint

    def write(trainer: VLMTrainer, *args: Any) -> None:
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        if trainer.state.global_step == 6:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
        try:
            original(trainer, *args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)

    VLMTrainer._write_checkpoint = write  # type: ignore[method-assign]


def disk_full_at_the_end() -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before(VLMForConditionalGeneration, "save_pretrained", full)


def loss_not_finite() -> None:
    original = VLMTrainer.compute_loss

    def compute_loss(trainer: VLMTrainer, *args: Any, **kwargs: Any) -> Any:
        loss = original(trainer, *args, **kwargs)
        return loss * torch.nan if trainer.state.global_step + 1 >= STEP and trainer.model.training else loss

    VLMTrainer.compute_loss = compute_loss  # type: ignore[method-assign]


def out_of_memory() -> None:
    def fail(trainer: VLMTrainer, *_: Any) -> None:
        if trainer.state.global_step + 1 == STEP:
            raise torch.OutOfMemoryError("out of memory")

    before(Trainer, "training_step", fail)


def worker_killed() -> None:
    told = torch.zeros(1).share_memory_()

    def kill(*_: Any) -> None:
        if torch.utils.data.get_worker_info() is not None and told:
            os.kill(os.getpid(), signal.SIGKILL)

    at_step(lambda: told.fill_(1))
    before(TreeItem, "open_images", kill)


def image_gone(image: Path) -> None:
    at_step(lambda: image.rename(image.with_suffix(".gone")))


def put_back(image: Path, values: dict[str, Any]) -> None:
    image.with_suffix(".gone").rename(image)


def cut_newest_checkpoint(values: dict[str, Any]) -> None:
    folder = Path(values["output_dir"]) / "checkpoints/train"
    file = folder / f"checkpoint-{last_checkpoint(values)}" / "optimizer.pt"
    file.write_bytes(file.read_bytes()[:1000])


def one_example_less(values: dict[str, Any]) -> None:
    values["data"]["train"]["limit"] = 9


def larger_batches(values: dict[str, Any]) -> None:
    values["train"]["per_device_train_batch_size"] = 2


def from_files(values: dict[str, Any]) -> None:
    """Images are opened in each step, by another process."""
    values["data"]["cache_features"] = False
    values["train"]["dataloader_num_workers"] = 1


def nothing(values: dict[str, Any]) -> None:
    pass


@dataclass
class Fault:
    """What goes wrong: `trouble` in the run, then `harm` to what it has left, or a `change` of the recipe that is tried
    before the run goes on as it began. `setup` is that of the run, and of the undisturbed one."""

    name: str
    trouble: Callable[[], None]
    harm: Callable[[dict[str, Any]], None] = nothing
    change: Callable[[dict[str, Any]], None] | None = None
    setup: Callable[[dict[str, Any]], None] = nothing


BROKEN_IMAGES = "images: CMYK, 16-bit, animated, rotated, 1 px wide, a bomb, cut off, empty"
NO_HUB = "the Hub cannot be reached"


def faults(images: Path) -> list[Fault]:
    killed = partial(signal_in_step, signal.SIGKILL)
    image = images / "7.png"
    return [
        Fault("SIGKILL in step 8", killed),
        Fault("SIGTERM in step 8", partial(signal_in_step, signal.SIGTERM)),
        Fault("Ctrl-C in step 8, twice", partial(signal_in_step, signal.SIGINT, signal.SIGINT)),
        Fault("Ctrl-C during the held-out loss after step 8", signal_in_evaluation),
        Fault("SIGTERM while images are encoded", signal_while_encoding),
        Fault("SIGTERM while the questions held out are answered", signal_while_answering),
        Fault("the disk fills up at the checkpoint of step 6", disk_full_at_a_checkpoint),
        Fault("the disk is full as the model is saved", disk_full_at_the_end),
        Fault("the loss is NaN from step 8 on", loss_not_finite),
        Fault("out of memory in step 8", out_of_memory),
        Fault("a process that reads data is killed after step 8", worker_killed, setup=from_files),
        Fault("an image is gone after step 8", partial(image_gone, image), partial(put_back, image), setup=from_files),
        Fault("SIGKILL, and the newest checkpoint is cut off", killed, cut_newest_checkpoint),
        Fault("SIGKILL, and the data are others", killed, change=one_example_less),
        Fault("SIGKILL, and the batch size is another", killed, change=larger_batches),
    ]


def what_happened(code: int, said: str, folder: Path) -> str:
    """The exit code, or the signal, and what was said about the fault, with short paths."""
    lines = said.replace(f"{folder}/", "").splitlines()
    starts = ("vlm:", "The checkpoint of", "checkpoint-", "stopped")
    about = [n for n, line in enumerate(lines) if line.startswith(starts)]
    words = " ".join(line.strip() for line in lines[about[0] :]) if about and code == 2 else ""
    words = words or " ".join(lines[n].strip() for n in about)
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit {code}" if code else "went on"
    return f"{how}: {words.removeprefix('vlm: ')}" if words else how


def run_fault(number: int, fault: Fault, workshop: Workshop, undisturbed: dict[Any, dict[str, Any]]) -> str:
    """A row of the table."""
    if fault.setup not in undisturbed:
        values = workshop.values(f"undisturbed-{len(undisturbed)}")
        fault.setup(values)
        code, said = workshop.run(values)
        assert code == 0, said
        undisturbed[fault.setup] = outcome(values)
    values = workshop.values(f"run-{number}")
    fault.setup(values)
    code, said = workshop.run(values, trouble=fault.trouble)
    happened, again = what_happened(code, said, workshop.folder), 0
    if code:
        reached = last_step(values)
        fault.harm(values)
        again = reached - last_checkpoint(values)
        if fault.change:
            changed = json.loads(json.dumps(values))
            fault.change(changed)
            code, said = workshop.run(changed, "--resume")
            assert code == 2, said
            happened = what_happened(code, said, workshop.folder)
        code, said = workshop.run(values, "--resume")
        assert code == 0, said
        if fault.harm is cut_newest_checkpoint:
            happened = what_happened(code, said, workshop.folder)
    equal = outcome(values) == undisturbed[fault.setup]
    return f"| {fault.name} | {happened} | {again} | {'yes' if equal else 'no'} |"


def broken_images(folder: Path) -> None:
    """Images that are hard to open, and some that cannot be."""
    pixels = Image.effect_noise((40, 36), 60)
    rows = []

    def add(name: str, image: Image.Image | None = None, data: bytes = b"", **options: Any) -> None:
        if image is None:
            (folder / name).write_bytes(data)
        else:
            image.save(folder / name, **options)
        rows.append({"file_name": name, "captions": ["a cat"]})

    add("cmyk.jpg", pixels.convert("CMYK"))
    add("sixteen-bit.png", Image.new("I;16", (40, 36), 40_000))
    add("animated.gif", pixels, save_all=True, append_images=[Image.new("L", pixels.size)])
    exif = Image.Exif()
    exif[274] = 6
    add("rotated.jpg", pixels, exif=exif)
    add("narrow.png", Image.new("RGB", (1, 36)))
    add("bomb.png", Image.new("1", (30_000, 30_000)))
    add("truncated.jpg", data=(folder / "rotated.jpg").read_bytes()[:300])
    add("empty.png", data=b"")
    (folder / "hard.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def run_broken_images(workshop: Workshop) -> str:
    broken_images(workshop.images)
    values = workshop.values("images")
    values["data"]["train"]["metadata"] = "hard.jsonl"
    code, said = workshop.run(values)
    assert code == 0, said
    problems = json.loads((Path(values["output_dir"]) / "data_problems.json").read_text(encoding="utf-8"))
    names = ", ".join(f"{Path(p['where'].split(': ')[-1]).name} ({p['why'].split(';')[0]})" for p in problems)
    return f"| {BROKEN_IMAGES} | left out: {names} | 0 | |"


def run_push(workshop: Workshop) -> str:
    os.environ |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": "none"}
    from vlm.hub import push

    values = workshop.values("pushed")
    code, said = workshop.run(values)
    assert code == 0, said
    try:
        push(values["output_dir"], "me/model")
    except ValueError as error:
        return f"| {NO_HUB} | exit 2: {str(error).replace(f'{workshop.folder}/', '')} | 0 | |"
    raise SystemExit("there is a server where none should be")


def main(words: list[str]) -> None:
    before, rows = table_rows("Faults"), {}
    head = ["| fault | what happened | steps taken again | equal in the end |", "| --- | --- | --- | --- |"]
    with tempfile.TemporaryDirectory() as folder:
        workshop = Workshop(Path(folder))
        undisturbed: dict[Any, dict[str, Any]] = {}
        todo = {
            fault.name: partial(run_fault, number, fault, workshop, undisturbed)
            for number, fault in enumerate(faults(workshop.images))
        }
        todo |= {BROKEN_IMAGES: partial(run_broken_images, workshop), NO_HUB: partial(run_push, workshop)}
        for name, run in todo.items():
            if not words or any(word in name for word in words):
                rows[name] = run()
                print(rows[name], flush=True)
            elif name in before:
                rows[name] = before[name]
    put_table("Faults", "\n".join([*head, *rows.values()]) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
