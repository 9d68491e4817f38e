"""Batches of a stream: each row once, in any number of processes, and from the middle as if it had not stopped."""

from collections import Counter

import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader, SequentialSampler

from tests.data.reader_files import png
from tests.tiny import tiny
from vlm.data import images, stream
from vlm.data.augmentation import Augmentation, RandomResizedCrop
from vlm.data.check import ProblemLog, TooManyProblems
from vlm.data.dataset import TreeCollator
from vlm.data.example import Example, question_and_answer
from vlm.data.stream import Layout, Mixture, StreamCollator, StreamDataset
from vlm.data.stream_sources import InMemory
from vlm.errors import UserError

ROWS = 90


@pytest.fixture(scope="module")
def processor():
    return tiny()[1]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(stream, "WINDOW", 20)
    monkeypatch.setattr("vlm.data.stream_sources.ROWS_IN_A_PIECE", 7)


def source(count=ROWS, *, name="", broken=(), text=()):
    return InMemory(
        [
            Example(
                () if n in text else (b"not an image" if n in broken else png(n),),
                (question_and_answer("what", "a cat " * (n % 5 + 1), num_images=int(n not in text)),),
                f"{name}{n}",
                f"{name}{n}",
            )
            for n in range(count)
        ]
    )


def dataset(processor, *sources, weights=None, readers=1, batches=10_000, max_bad=0.01, **layout):
    settings = {"max_length": 500, "too_long": "error", "max_tokens_per_row": 120, "seed": 0}
    return StreamDataset(
        Mixture.of(sources or [source()], weights),
        Layout(processor, **(settings | layout)),
        batch_size=2,
        num_batches=batches,
        readers=readers,
        log=ProblemLog(0, max_bad),
    )


def names(batch):
    return [item.example.where for row in batch for item in row]


def read(data, number, first=0):
    """So many batches, in turn, as one process asks for them."""
    batches = []
    for index in range(first, first + number):
        batch = data.__getitems__([2 * index, 2 * index + 1])
        data.trained(batch.trained)
        batches.append(batch)
    return batches


def content(batches):
    return [
        [
            [(item.example.where, item.tree.input_ids, [i.tobytes() for i in item.opened]) for item in row]
            for row in batch
        ]
        for batch in batches
    ]


@pytest.mark.parametrize(("processes", "workers"), [(1, 0), (1, 2), (2, 0), (2, 2)])
def test_an_epoch_has_each_row_once_in_any_number_of_processes(processor, processes, workers, monkeypatch):
    """As the Trainer loads them: accelerate deals the batches to the processes, the loader those to its workers. In a
    pass there are four windows, or two or one for each reader."""
    monkeypatch.setattr("vlm.data.stream_sources.ROWS_IN_A_PIECE", 10)
    readers = processes * max(1, workers)
    seen = Counter()
    for process in range(processes):
        data = dataset(processor, source(80), readers=readers, batches=20 * processes)
        loader = DataLoader(
            data,
            batch_size=2,
            sampler=SequentialSampler(data),
            collate_fn=StreamCollator(lambda rows: {"names": names(rows), "rows": torch.tensor([len(rows)])}),
            num_workers=workers,
        )
        last = Counter()
        for batch in prepare_data_loader(loader, num_processes=processes, process_index=process):
            reader, position = batch["trained"].reader, batch["trained"].position
            last[reader] = max(last[reader], position.window)
            if (position.window, position.batch) <= (4 // readers, 0):
                seen.update(batch["names"])
        assert len(last) == max(1, workers)
        assert min(last.values()) >= 4 // readers, "too few batches to see a whole pass"
    assert seen == Counter(str(n) for n in range(80))


@pytest.mark.parametrize("workers", [0, 3])
def test_the_end_of_an_epoch_does_not_disturb_the_stream(processor, workers):
    """There the Trainer begins with new workers. Seven batches an epoch are not one for each of three readers."""
    whole = [names(batch) for batch in read(dataset(processor, readers=max(1, workers)), 21)]
    data = dataset(processor, readers=max(1, workers), batches=7)
    loader = DataLoader(
        data,
        2,
        sampler=SequentialSampler(data),
        collate_fn=StreamCollator(lambda rows: {"names": names(rows)}),
        num_workers=workers,
    )
    found = []
    for epoch in range(3):
        data.set_epoch(epoch)
        for batch in loader:
            data.trained(batch["trained"])
            found.append(batch["names"])
    assert found == whole


def test_a_window_has_each_of_its_rows_once_in_full_batches(processor):
    batches = read(dataset(processor), 40)
    seen = [name for batch in batches for name in names(batch)]
    assert len(set(seen[:20])) == 20, "a window of 20 rows has no row twice"
    sizes = Counter(len(batch) for batch in batches)
    assert set(sizes) == {1, 2}
    assert sizes[1] <= batches[-1].trained.position.window + 1, "at most one in each window"
    assert all(sum(len(item.tree) for item in row) <= 120 for batch in batches for row in batch)
    assert max(len(row) for batch in batches for row in batch) > 1, "rows are packed"


@pytest.mark.parametrize("readers", [1, 3])
@pytest.mark.parametrize("done", [1, 9, 30])
def test_a_stream_goes_on_in_the_middle(processor, tmp_path, readers, done):
    sources = [source(name="a"), source(30, name="b")]
    augmentation = Augmentation(random_resized_crop=RandomResizedCrop())
    options = {"weights": [2, 1], "readers": readers, "augmentation": augmentation}
    whole = content(read(dataset(processor, *sources, **options), 40))
    first = dataset(processor, *sources, **options)
    read(first, done)
    for _ in range(4):  # as the loader does, which is ahead of the training
        first.__getitems__([2 * done, 2 * done + 1])
    first.save(tmp_path / "stream.json")
    second = dataset(processor, *sources, **options)
    second.restore(tmp_path / "stream.json")
    assert content(read(second, 40 - done, done)) == whole[done:]


def test_going_on_opens_no_image_of_what_was_done(processor, tmp_path, monkeypatch):
    first = dataset(processor)
    read(first, 5)
    first.save(tmp_path / "stream.json")
    second = dataset(processor)
    second.restore(tmp_path / "stream.json")
    opened = []
    monkeypatch.setattr(
        "vlm.data.dataset.open_image", lambda *args, **k: opened.append(k["where"]) or images.open_image(*args, **k)
    )
    [batch] = read(second, 1, 5)
    assert sorted(opened) == sorted(names(batch))


def test_other_readers_are_refused(processor, tmp_path):
    first = dataset(processor, readers=2)
    read(first, 3)
    first.save(tmp_path / "stream.json")
    with pytest.raises(UserError, match=r"begun with 2 processes that read .* there are now 3.*num_workers"):
        dataset(processor, readers=3).restore(tmp_path / "stream.json")
    with pytest.raises(UserError, match="begun without streaming"):
        first.restore(tmp_path / "other.json")


@pytest.mark.parametrize(("weights", "shares"), [([3, 1], (0.75, 0.25)), (None, (0.75, 0.25)), ([1, 9], (0.1, 0.9))])
def test_sources_are_mixed_by_weight(processor, weights, shares):
    """Without weights by their rows, 90 and 30."""
    data = dataset(processor, source(name="a"), source(30, name="b"), weights=weights)
    assert data.mixture.num_rows == 120
    seen = [name for batch in read(data, 200) for name in names(batch)]
    for name, share in zip("ab", shares, strict=True):
        assert sum(s.startswith(name) for s in seen) / len(seen) == pytest.approx(share, abs=0.02)
    assert {s for s in seen if s.startswith("b")} == {f"b{n}" for n in range(30)}


def test_weights_are_needed_where_rows_are_not_counted():
    uncounted = source()
    uncounted.num_rows = None
    assert Mixture.of([uncounted], None).num_rows is None
    with pytest.raises(UserError, match="give each source a `weight`"):
        Mixture.of([uncounted, source()], None)
    assert Mixture.of([uncounted, source()], [1, 3]).weights == [0.25, 0.75]


def test_images_that_do_not_open_are_left_out_and_counted_once(processor, tmp_path):
    data = dataset(processor, source(broken={4, 50}), max_bad=0.1)
    seen = {name for batch in read(data, 150) for name in names(batch)}
    assert seen == {str(n) for n in range(ROWS) if n not in (4, 50)}
    assert sorted(problem.where.partition(":")[0] for problem in data.log.problems) == ["4", "50"]
    assert data.log.total == ROWS, "read more than twice, and counted once"
    data.save(tmp_path / "stream.json")
    again = dataset(processor, source(broken={4, 50}), max_bad=0.1)
    again.restore(tmp_path / "stream.json")
    assert (again.log.problems, again.log.total) == (data.log.problems, data.log.total)


@pytest.mark.parametrize("counted", [False, True])
def test_the_share_of_bad_rows_is_that_of_one_pass(processor, counted):
    def passes(max_bad, readers=1):
        rows = source(4, broken={1, 2})
        rows.counted = counted
        data = dataset(processor, rows, max_bad=max_bad, readers=readers)
        data.log.total = 4 if counted else 0
        read(data, 12)
        return data.log

    for readers in (1, 2):
        assert "2 of 4 answers (50.00%)" in passes(0.6, readers).summary()
    with pytest.raises(TooManyProblems):
        passes(0.4)


def test_too_much_that_is_bad_stops_training(processor):
    with pytest.raises(TooManyProblems, match=r"of \d+ answers"):
        read(dataset(processor, source(broken={4, 50})), 150)


def test_a_stream_without_anything_to_learn_from_ends(processor):
    with pytest.raises(UserError, match=r"not one usable row(.|\n)*not an image"):
        read(dataset(processor, source(broken=range(ROWS))), 1)
    with pytest.raises(UserError, match="200 have no image, and the language model is frozen"):
        read(dataset(processor, source(text=range(ROWS)), without_text=True), 1)


def test_text_alone_and_what_is_too_long_are_counted(processor):
    data = dataset(processor, source(text=range(10)), without_text=True)
    seen = {name for batch in read(data, 100) for name in names(batch)}
    assert seen == {str(n) for n in range(10, ROWS)}
    assert data.found.of_text >= 10
    lengths = sorted({len(item.tree) for batch in read(dataset(processor), 20) for row in batch for item in row})
    long = dataset(processor, max_length=lengths[0], too_long="skip")
    seen = {name for batch in read(long, 40) for name in names(batch)}
    assert seen == {str(n) for n in range(0, ROWS, 5)}
    assert long.found.left_out.branches >= ROWS - 18
    assert long.found.left_out.longest == lengths[-1]


def test_the_collator_gets_images_that_are_open(processor):
    [batch] = read(dataset(processor), 1)
    inputs = StreamCollator(TreeCollator(processor))(batch)
    assert len(inputs["pixel_values"]) == len(names(batch))
    plain = read(dataset(processor, plain=True), 1)[0]
    assert "pixel_values" in TreeCollator(processor, plain=True)(plain)


def test_weights_of_any_size_give_shares():
    sources = [source(3), source(3)]
    assert Mixture.of(sources, [1e308, 1e308]).weights == [0.5, 0.5]
    assert Mixture.of(sources, [3e-320, 1e-320]).weights == pytest.approx([0.75, 0.25], rel=1e-3)
    for weights in ([1.0, 1e-320], [1e308, 1e-308]):
        with pytest.raises(UserError, match=r"data\.train\.1\.weight: .* is less than one row in 1,000,000,000"):
            Mixture.of(sources, weights)
