"""Runs that are killed and resumed, against one that is not: `python -m benchmarks.kill [NUMBER]`.

Each of 20 runs is ended once by SIGKILL, at a random moment: a third while a checkpoint is written, a third while an
old one is removed, the rest anywhere, from the start to the last answer. It is then resumed, and its weights, losses
and answers have to be those of the undisturbed run, bit for bit. Every second one trains all weights of the language
model of a LLaVA from transformers, the others LoRA in a model that vlm joined. The table is printed, and written into
docs/faults.md if all 20 were run.
"""

import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarks.disturbed import STEPS, Workshop, last_checkpoint, outcome, put_table
from vlm.training.callbacks import MetricsLog

KILLS = 20
MODELS = {"joined, LoRA": "", "LLaVA, all weights": "llava"}
"""The models that are trained in turn: what the table calls them, and the family if they are of transformers."""
EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}
MOMENTS = {
    "remove_older": "removing an old checkpoint",
    "seal": "writing a checkpoint: manifest",
    "_name_checkpoint": "writing a checkpoint: its name",
    "_save_rng_state": "writing a checkpoint: random numbers",
    "_save_optimizer_and_scheduler": "writing a checkpoint: optimizer",
    "Trainer._save": "writing a checkpoint: weights",
    "PartTrainer._save": "writing a checkpoint: weights",
    "Trainer.save_model": "writing a checkpoint: weights",
    "_save_checkpoint": "writing a checkpoint",
    "evaluation_loop": "held-out loss",
    "training_step": "forward and backward",
    "_run_epoch": "between steps",
    "kept_features": "encoding images",
    "save_model": "writing the model",
    "save_stage": "writing the model",
    "_score": "answering",
    "run_stage": "before the first step, or after the last",
    "train": "loading",
}
"""What a run is doing while one of these functions runs, the innermost first."""


def moment(frame: FrameType | None) -> str:
    while frame is not None:
        code = frame.f_code
        # There are two of these names.
        name = code.co_qualname if code.co_name in ("_save", "save_model") else code.co_name
        if name in MOMENTS:
            return MOMENTS[name]
        frame = frame.f_back
    return "starting"


@dataclass
class CountEvents:
    """Writes what the run is doing at each event that touches a file, a line each."""

    file: Path

    def __call__(self) -> None:
        number = os.open(self.file, os.O_WRONLY | os.O_CREAT)
        sys.addaudithook(
            lambda event, args: event in EVENTS and os.write(number, f"{moment(sys._getframe(1))}\n".encode())
        )


@dataclass
class Kill:
    """SIGKILL at event `number` of those that touch a file while the run does what begins with `where`, or, without a
    `number`, `delay` seconds after `step`. What the run was doing then, and after which step, is left in `note`."""

    note: Path
    where: str = ""
    number: int = 0
    step: int = 0
    delay: float = 0.0

    def __call__(self) -> None:
        self.count = self.at = 0
        self.main = threading.main_thread().ident or 0
        if self.number:
            sys.addaudithook(self._hook)
        elif self.step == 0:
            self._later()
        original = MetricsLog.on_log

        def on_log(log: MetricsLog, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            original(log, args, state, control, logs, **kwargs)
            if "loss" in (logs or {}):
                self.at = state.global_step
                if self.at == self.step and not self.number:
                    self._later()

        MetricsLog.on_log = on_log  # type: ignore[method-assign]

    def _hook(self, event: str, args: Any) -> None:
        if event in EVENTS and moment(frame := sys._getframe(1)).startswith(self.where):
            self.count += 1
            if self.count == self.number:
                self._kill(frame)

    def _later(self) -> None:
        def wait() -> None:
            time.sleep(self.delay)
            self._kill(sys._current_frames()[self.main])

        threading.Thread(target=wait, daemon=True).start()

    def _kill(self, frame: FrameType) -> None:
        self.number = -1  # the note is an event as well
        self.note.write_text(json.dumps({"step": self.at, "moment": moment(frame)}), encoding="utf-8")
        os.kill(os.getpid(), signal.SIGKILL)


def draw(rng: random.Random, number: int, note: Path, counts: dict[str, int], seconds: float) -> Kill:
    where = ("writing a checkpoint", "removing an old checkpoint", "")[number % 3]
    if where:
        total = sum(count for name, count in counts.items() if name.startswith(where))
        return Kill(note, where, rng.randint(1, total))
    return Kill(note, step=rng.randrange(STEPS + 1), delay=rng.uniform(0, seconds))


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| kill | model | after step | while | resumed from | equal |", "| --- | --- | --- | --- | --- | --- |"]
    for number, row in enumerate(rows, start=1):
        start = f"step {row['from']}" if row["from"] else "the start"
        equal = "yes" if row["equal"] else "no"
        lines.append(f"| {number} | {row['model']} | {row['step']} | {row['moment']} | {start} | {equal} |")
    return "\n".join(lines) + "\n"


@dataclass
class Undisturbed:
    """A run that nothing happens to, of the model called `name`: its `outcome`, the seconds a step takes, and how often
    a file is touched at each moment."""

    name: str
    folder: Path

    def __post_init__(self) -> None:
        self.workshop = Workshop(self.folder, MODELS[self.name])
        values = self.workshop.values("undisturbed")
        start = time.monotonic()
        code, said = self.workshop.run(values, trouble=CountEvents(self.folder / "events.txt"))
        assert code == 0, said
        self.seconds = (time.monotonic() - start) / STEPS
        self.counts = Counter((self.folder / "events.txt").read_text(encoding="utf-8").splitlines())
        self.outcome = outcome(values)


def run(kills: int, folder: Path, seed: int = 0) -> list[dict[str, Any]]:
    """Kill and resume so many runs, of each model in turn; gives a row for each."""
    rng, rows, tries = random.Random(seed), [], 0
    models = [Undisturbed(name, folder / str(number)) for number, name in enumerate(list(MODELS)[:kills])]
    while len(rows) < kills:
        tries += 1
        model = models[len(rows) % len(models)]
        values, note = model.workshop.values(f"run-{tries}"), folder / f"note-{tries}.json"
        trouble = draw(rng, len(rows), note, model.counts, model.seconds)
        code, said = model.workshop.run(values, trouble=trouble)
        if code == 0:  # it was done before the moment came
            continue
        assert code == -signal.SIGKILL, said
        row = json.loads(note.read_text(encoding="utf-8")) | {"model": model.name, "from": last_checkpoint(values)}
        code, said = model.workshop.run(values, "--resume")
        assert code == 0, said
        rows.append(row | {"equal": outcome(values) == model.outcome})
        print(rows[-1], flush=True)
    return rows


def main(arguments: list[str]) -> int:
    kills = int(arguments[0]) if arguments else KILLS
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        rows = run(kills, Path(folder))
    print(table(rows))
    print(f"{sum(row['equal'] for row in rows)} of {kills} equal, in {(time.monotonic() - start) / 60:.1f} min")
    if kills == KILLS:
        put_table("Killed", table(rows))
    return int(not all(row["equal"] for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
