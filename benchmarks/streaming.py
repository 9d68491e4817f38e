"""Whether a long stream is read as fast as a short one, in as little memory: an epoch of each, without a model.

    python -m benchmarks.streaming                       # 10,000 and 1,000,000 rows, three runs of the short one
    python -m benchmarks.streaming --rows 10000 100000   # others

Rows are a PNG of one pixel and a caption, one of a hundred: what is to be seen is the stream, not the tokenizer. They
are read, tokenized, packed, opened, prepared and laid out in batches as in training, in one process. Rates are of
processor time too, which other work on the machine does not change much.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.table import Table

ROW_GROUP, FILE = 1_000, 50_000
CAPTIONS = [f"a cat, a dog and {n} birds on the street" for n in range(100)]
IMAGE_SIZE, PATCH = 32, 16
BATCH, ROW_TOKENS = 8, 512


def write(folder: Path, rows: int) -> None:
    """Parquet files of `rows` rows in all."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    pixels = []
    for level in range(256):
        file = BytesIO()
        Image.new("RGB", (1, 1), (level, 255 - level, 128)).save(file, "png")
        pixels.append({"bytes": file.getvalue(), "path": None})
    for start in range(0, rows, FILE):
        numbers = range(start, min(rows, start + FILE))
        columns = {"image": [pixels[n % 256] for n in numbers], "caption": [CAPTIONS[n * 7 % 100] for n in numbers]}
        pq.write_table(pa.table(columns), folder / f"{start:08}.parquet", row_group_size=ROW_GROUP)


def epoch(folder: Path) -> dict[str, Any]:
    """Read what is in `folder` once. Rows and seconds, and the peak of resident memory after a tenth and at the end."""
    import torch
    from torch.utils.data import DataLoader, SequentialSampler
    from transformers import AutoTokenizer, CLIPImageProcessor

    from benchmarks.worker import peak_memory
    from benchmarks.workload import CHAT_TEMPLATE
    from vlm.data.check import ProblemLog
    from vlm.data.dataset import TreeCollator
    from vlm.data.stream import Layout, Mixture, StreamCollator, StreamDataset
    from vlm.data.stream_sources import in_pieces
    from vlm.processing import VLMProcessor
    from vlm.recipe_paths import home

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(home() / "SmolLM2-135M-Instruct")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    square = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    images = CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=square)
    processor = VLMProcessor(images, tokenizer, CHAT_TEMPLATE, image_seq_length=(IMAGE_SIZE // PATCH) ** 2)
    source = {"format": "dataset", "path": str(folder), "streaming": True}
    source["columns"] = {"image": "image", "caption": "caption"}
    mixture = Mixture.of([in_pieces(source, folder, lambda source: [])], None)
    layout = Layout(processor, ROW_TOKENS, "error", ROW_TOKENS, seed=0)
    rows = mixture.num_rows or 0
    stream = StreamDataset(mixture, layout, batch_size=BATCH, num_batches=rows, readers=1, log=ProblemLog(0))
    collator = StreamCollator(TreeCollator(processor))
    loader = DataLoader(stream, batch_size=BATCH, sampler=SequentialSampler(stream), collate_fn=collator)
    done, tenth = 0, 0
    start, start_of_cpu = time.perf_counter(), time.process_time()
    for batch in loader:
        stream.trained(batch["trained"])
        done += len(batch["pixel_values"])
        tenth = tenth or (peak_memory() if done >= rows / 10 else 0)
        if done >= rows:
            break
    seconds, cpu = time.perf_counter() - start, time.process_time() - start_of_cpu
    return {"rows": rows, "seconds": seconds, "cpu": cpu, "tenth": tenth, "end": peak_memory()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 1_000_000])
    parser.add_argument("--repeats", type=int, default=3, help="of all but the longest, some before it, some after")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.folder:
        print(json.dumps(epoch(Path(chosen.folder))))
        return
    with TemporaryDirectory() as place:
        for rows in chosen.rows:
            (Path(place) / str(rows)).mkdir()
            write(Path(place) / str(rows), rows)

        def run(rows: int) -> dict[str, Any]:
            command = [sys.executable, "-m", "benchmarks.streaming", "--folder", str(Path(place) / str(rows))]
            output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            print(output.strip(), file=sys.stderr)
            result: dict[str, Any] = json.loads(output)
            return result

        *short, longest = sorted(chosen.rows)
        before, after = [chosen.repeats - chosen.repeats // 2, chosen.repeats // 2]
        results = [run(rows) for _ in range(before) for rows in short]
        results.append(run(longest))
        results += [run(rows) for _ in range(after) for rows in short]
    table = Table("rows", "rows/s", "rows/s of processor time", "peak at 10 %", "peak at the end", box=None)
    for rows in sorted(chosen.rows):
        runs = [result for result in results if result["rows"] == rows]
        rates = [statistics.median(rows / result[key] for result in runs) for key in ("seconds", "cpu")]
        peaks = [statistics.median(result[key] for result in runs) for key in ("tenth", "end")]
        table.add_row(f"{rows:,}", *(f"{rate:,.0f}" for rate in rates), *(f"{peak / 1e6:,.0f} MB" for peak in peaks))
    Console().print(table)


if __name__ == "__main__":
    main()
