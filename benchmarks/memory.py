"""What training was expected to take and what it took: `python -m benchmarks.memory [CASE ...]`.

The quickstart's two models are trained for a few steps in each way that the docs name, each in a process of its own,
and the line that a run ends with is read: `memory: ... GB at most, and ... GB expected`. Prints a table. Needs what
`vlm quickstart` fetches.
"""

import re
import subprocess
import sys
import tempfile

STEPS = 4
EVERYTHING = ["lora=null", "trainable={vision: 1e-5, projector: 1e-3, language: 1e-5}"]
CASES: dict[str, list[str]] = {
    "projector": ["lora=null"],
    "LoRA": ["train.bf16=false"],
    "LoRA, bf16": ["train.bf16=true"],
    "LoRA, activation checkpointing": ["train.bf16=false", "train.activation_checkpointing=true"],
    "LoRA, language model in 4 bits": ["train.bf16=false", "model.quantization_config={load_in_4bit: true}"],
    "everything": [*EVERYTHING, "train.bf16=false"],
    "everything, bf16": [*EVERYTHING, "train.bf16=true"],
    "everything, bf16, activation checkpointing": [
        *EVERYTHING, "train.bf16=true", "train.activation_checkpointing=true",
    ],
}  # fmt: skip
SAME = [
    f"train.max_steps={STEPS}", "train.save_strategy=no", "train.eval_strategy=no", "evaluation={}",
    "data.cache_features=false",
]  # fmt: skip


def run(case: str) -> tuple[float, float]:
    """GB that training took at most, and those expected."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "vlm", "train", "quickstart", *SAME, *CASES[case], f"output_dir={folder}/run"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = re.search(r"memory: ([\d.]+) GB at most, and ([\d.]+) GB expected", done.stdout)
    if done.returncode or not found:
        sys.exit(f"{case}: {' '.join(command)}\n{done.stdout}{done.stderr}")
    return float(found[1]), float(found[2])


def main(names: list[str]) -> None:
    print("| what learns | expected, GB | used at most, GB | expected / used |\n| --- | --- | --- | --- |")
    for case in names or CASES:
        used, expected = run(case)
        print(f"| {case} | {expected:.1f} | {used:.1f} | {expected / used:.2f} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
