"""Memory of a device: what training will take, tried before the first step, and what it took at most."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import find_executable_batch_size, should_reduce_batch_size
from torch import Tensor, nn

from vlm.data.dataset import TreeDataset
from vlm.data.pairs import PairDataset
from vlm.errors import UserError
from vlm.training.parts import named_parts
from vlm.training.step import checkpointing, forward_and_backward, untouched

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Memory:
    """Bytes on one device. `other` is what is there beside: on a CPU the process itself with its data, and in half
    precision the float32 numbers of frozen layers, which are kept."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    other: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.other

    def __str__(self) -> str:
        parts = [f"{name} {gigabytes(value)}" for name, value in vars(self).items() if value]
        return f"{gigabytes(self.total)} GB: {', '.join(parts)}"


def gigabytes(count: float) -> str:
    """10⁹ bytes, in two digits."""
    return f"{count / 1e9:.1f}" if count >= 1e9 else f"{count / 1e9:.2g}"


def estimate(trainer: Any, rows: TreeDataset | PairDataset) -> Memory:
    """What training will take at most on this process's device, from a pass over the longest of `rows` and back.

    Activations are the most that the pass takes beyond weights and gradients, its passing results included. Evaluation
    is not in it, nor what several processes need to talk.

    With `auto_find_batch_size` the batch is made smaller until it fits, as in training. Raises UserError for a batch
    that does not fit.
    """
    lengths = rows.row_lengths
    longest = sorted(range(len(lengths)), key=lambda row: -lengths[row])

    def try_out(batch_size: int) -> int:
        trainer._train_batch_size = batch_size
        batch = trainer.data_collator([rows[row] for row in longest[:batch_size]])
        reset_peak(trainer.args.device)
        before = in_use(trainer.args.device)
        forward_and_backward(trainer, batch)
        return peak(trainer.args.device) - before

    start = trainer._train_batch_size
    with untouched(trainer), checkpointing(trainer):
        before = in_use(trainer.args.device)
        try:
            if trainer.args.auto_find_batch_size:
                taken = find_executable_batch_size(try_out, starting_batch_size=start)()
            else:
                taken = try_out(start)
        except RuntimeError as error:
            if not (should_reduce_batch_size(error) or "No executable batch size" in str(error)):
                raise
            raise UserError(
                f"a batch of the {start} longest rows (of up to {max(lengths)} tokens) does not fit into memory. "
                f"{trainer.less_memory} ({str(error).splitlines()[0]})"
            ) from None
        weights = size_of([*trainer.model.parameters(), *trainer.model.buffers()])
    trained = [parameter for _, _, parameter in named_parts(trainer.model) if parameter.requires_grad]
    gradients = size_of(trained)
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=round(_state_bytes(trainer) * sum(parameter.numel() for parameter in trained)),
        activations=max(taken - gradients, 0),
        other=max(before - weights, 0),
    )


def size_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors, those that are one only once; the scales of quantized ones too."""
    storages = {}
    for tensor in tensors:
        state = getattr(tensor, "quant_state", None)
        beside = [getattr(tensor, "SCB", None), *([] if state is None else [state.absmax, state.code])]
        for each in (tensor, *(t for t in beside if isinstance(t, Tensor))):
            storages[each.untyped_storage().data_ptr()] = each.untyped_storage().nbytes()
    return sum(storages.values())


def _state_bytes(trainer: Any) -> float:
    """Bytes that the optimizer keeps for a weight, of a matrix that it takes a step on."""
    optimizer_class, options = trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
    matrix = nn.Parameter(torch.zeros(256, 256, device=trainer.args.device))
    matrix.grad = torch.zeros_like(matrix)
    optimizer = optimizer_class([matrix], **options)
    optimizer.step()
    return size_of(value for value in optimizer.state[matrix].values() if isinstance(value, Tensor)) / matrix.numel()


def in_use(device: torch.device) -> int:
    """Bytes in use: of tensors on a CUDA device, else of this process."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _of_process("VmRSS") or _since_start()


def peak(device: torch.device) -> int:
    """The most bytes in use since [`reset_peak`]; without a CUDA device and Linux since the process began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _of_process("VmHWM") or _since_start()


def reset_peak(device: torch.device) -> None:
    """From now on the peak is that of what comes."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif _RESET.exists():
        try:
            _RESET.write_text("5")
        except OSError:  # not in every container; the peak is then that since the process began
            return


def _of_process(name: str) -> int:
    """A line of Linux's table of this process, in bytes; 0 where there is no such table."""
    if not _STATUS.exists():
        return 0
    found = re.search(rf"^{name}:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def _since_start() -> int:
    import resource  # there is none on Windows

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
