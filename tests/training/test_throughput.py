"""How fast training is: counted against the batches themselves, timed by a clock that the test moves."""

from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerCallback

from tests.tiny import image, tiny
from tests.training.helpers import ANSWERS, examples, rows_of, trainer_of
from vlm.data.dataset import TreeCollator
from vlm.data.example import Example, question_and_answer
from vlm.training.throughput import Throughput, in_words, row_counts


class Clock(TrainerCallback):
    """A step takes 2 seconds; an evaluation, a checkpoint and writing a log each take 100."""

    now = 0.0

    def __call__(self):
        return self.now

    def on_step_end(self, args, state, control, **kwargs):
        self.now += 2.0

    def on_evaluate(self, args, state, control, **kwargs):
        self.now += 100.0

    on_save = on_log = on_evaluate


def timed(tmp_path, made=None, **changes):
    clock = Clock()
    trainer = trainer_of(tmp_path, made=made, callbacks=[clock], **changes)
    trainer.throughput.clock = clock
    return trainer


def uneven():
    """8 examples of 1 to 3 images, with 1 to 4 answers."""
    return [
        Example(
            tuple(image(10 * n + i) for i in range(1 + n % 3)),
            tuple(
                question_and_answer(f"what {b}", ANSWERS[(n + b) % 6], num_images=1 + n % 3) for b in range(1 + n % 4)
            ),
            str(n),
            f"row {n}",
        )
        for n in range(8)
    ]


def test_counts_of_a_row():
    _, processor = tiny()
    data = rows_of(processor, uneven(), 300)
    assert max(map(len, data.rows)) > 1
    for row, counts in zip(data.rows, row_counts(data.rows).tolist(), strict=True):
        numbers = [int(item.example.image_id) for item in row]
        tokens = [len(item.tree.input_ids) for item in row]
        assert counts == [sum(1 + n % 3 for n in numbers), sum(1 + n % 4 for n in numbers), sum(tokens)]


def test_an_epoch_by_hand(tmp_path):
    """8 rows, 2 at a time, 2 times a step: 2 steps of 2 seconds, with evaluations and checkpoints in between."""
    made = tiny()
    places = []

    def note(module, args, kwargs):
        if module.training:
            places.append(kwargs["input_ids"].numel())

    made[0].register_forward_pre_hook(note, with_kwargs=True)
    trainer = timed(
        tmp_path,
        made,
        data=uneven(),
        eval_data=examples(3),
        max_steps=2,
        gradient_accumulation_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
    )
    trainer.throughput.flops_per_token, trainer.throughput.peak_flops = 1e6, 1e10
    trainer.train()
    first, second = (entry for entry in trainer.state.log_history if "loss" in entry)
    whole = next(entry for entry in trainer.state.log_history if "train_loss" in entry)
    tokens = sum(len(item.tree) for row in trainer.train_dataset.rows for item in row)
    close = {"rel": 1e-3}  # four digits are logged
    assert whole["images_per_second"] == pytest.approx((3 * 1 + 3 * 2 + 2 * 3) / 4, **close)
    assert whole["answers_per_second"] == pytest.approx(2 * (1 + 2 + 3 + 4) / 4, **close)
    assert whole["tokens_per_second"] == pytest.approx(tokens / 4, **close)
    assert len(places) == 4
    assert whole["padding"] == pytest.approx(1 - tokens / sum(places), **close)
    assert whole["mfu"] == pytest.approx(1e6 * tokens / 4 / 1e10, **close)
    on_cpu = trainer.args.device.type == "cpu"
    assert whole["peak_memory_gb"] > (0.1 if on_cpu else 1e-4), "of the process, or on a GPU of tensors alone"
    for name in ("images_per_second", "answers_per_second", "tokens_per_second"):
        assert first[name] + second[name] == pytest.approx(2 * whole[name], **close)
    assert 1 - first["tokens_per_second"] * 2 / sum(places[:2]) == pytest.approx(first["padding"], abs=1e-3)


def test_steps_after_the_last_log_count_for_the_whole(tmp_path):
    trainer = timed(tmp_path, data=examples(6), max_steps=3, logging_steps=2)
    trainer.train()
    assert [("answers_per_second" in e) for e in trainer.state.log_history] == [True, True]
    assert trainer.throughput.whole(trainer.accelerator)["answers_per_second"] == pytest.approx(6 * 2 / (3 * 2))


def test_without_a_measured_peak_there_is_no_utilisation(tmp_path):
    trainer = timed(tmp_path)
    trainer.train()
    assert all("mfu" not in entry for entry in trainer.state.log_history)


def test_a_batch_that_is_evaluated_is_not_counted(tmp_path):
    trainer = timed(tmp_path, eval_data=examples(3))
    trainer.train()
    before = trainer.throughput.total.tolist()
    trainer.evaluate()
    assert trainer.throughput.whole(trainer.accelerator) != {}
    assert trainer.throughput.total.tolist() == before


def test_over_processes_counts_are_summed_and_memory_is_the_largest():
    throughput = Throughput(clock=Clock())
    throughput.on_train_begin(SimpleNamespace(device=torch.device("cpu")), None, None)
    throughput.flops_per_token, throughput.peak_flops = 10.0, 1000.0
    throughput.count(torch.tensor([[1, 2, 30], [2, 4, 50]]), 100)
    throughput.seconds = 2.0
    other = torch.tensor([[3, 4, 100, 100, 8 * 10**12]])
    rates = throughput.since_last(SimpleNamespace(gather=lambda mine: torch.cat([mine, other])))
    assert rates == {
        "images_per_second": 3.0,
        "answers_per_second": 5.0,
        "tokens_per_second": 90.0,
        "padding": 0.1,
        "mfu": 10 * 90 / (1000 * 2),
        "peak_memory_gb": 8000.0,
    }
    assert in_words(rates) == "3 images/s, 5 answers/s, 90 tokens/s, padding 10.0%, MFU 45%, peak memory 8000.0 GB"


@pytest.mark.parametrize("batch_size", [2, 4])
def test_batches_of_both_loaders_have_little_padding(tmp_path, batch_size):
    """Captions of 1 to 20 answers, all longer than a row: rows of very different lengths."""
    made = tiny()
    data = [
        Example(
            (image(n),),
            tuple(question_and_answer("what", f"{ANSWERS[(n + b) % 6]} {b}") for b in range(1 + 7 * n % 20)),
            str(n),
            "",
        )
        for n in range(60)
    ]
    trainer = trainer_of(
        tmp_path, made=made, data=data, per_device_train_batch_size=batch_size, per_device_eval_batch_size=batch_size
    )
    lengths = trainer.train_dataset.row_lengths
    assert max(lengths) > 5 * min(lengths)
    for loader in (trainer.get_train_dataloader(), trainer.get_eval_dataloader(trainer.train_dataset)):
        places = sum(batch["input_ids"].numel() for batch in loader)
        assert 1 - sum(lengths) / places < 0.05


def test_what_is_counted_does_not_reach_the_model(tmp_path):
    made = tiny()
    trainer = trainer_of(tmp_path, made=made)
    assert "counts" in next(iter(trainer.get_train_dataloader()))
    assert isinstance(trainer.data_collator, TreeCollator)
    seen = set()
    made[0].register_forward_pre_hook(lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True)
    trainer.train()
    assert "input_ids" in seen
    assert "counts" not in seen
