"""A dispatch mode that computes CUDA operators with the CPU's kernels, and raises the errors that CUDA raises."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from tests.emulated_gpu.determinism import is_unordered
from tests.emulated_gpu.log import log, where
from tests.emulated_gpu.operators import OPERATORS, aten

NATIVE = {
    "empty.memory_format",
    "empty_strided.default",
    "empty_like.default",
    "new_empty.default",
    "new_empty_strided.default",
    "resize_.default",
    "set_.source_Storage",
    "set_.source_Storage_storage_offset",
    "set_.source_Tensor",
    "_unsafe_view.default",
    "_reshape_alias.default",
    "record_stream.default",
    "is_pinned.default",
    "_pin_memory.default",
    "_fused_sdp_choice.default",
}
"""Operators that launch no kernel on CUDA, besides views."""
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "_unique", "unique_", "equal", "bincount", "is_nonzero")
"""First letters of the operators that wait for a number from the device."""
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")

NATIVE_CALLS = {
    1: "copy to device (native)",
    2: "copy to host (native)",
    10: "synchronize device",
    11: "synchronize stream",
}
"""The calls that `cuda.c` reports, by number."""


def on_host(tensor: Tensor) -> Tensor:
    """Return a CPU tensor on the same memory."""
    storage = tensor.untyped_storage()
    size = storage.nbytes() // tensor.element_size() * tensor.element_size()
    if not size or not tensor.numel():
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)
    memory = (ctypes.c_char * size).from_address(storage.data_ptr())
    flat = torch.frombuffer(memory, dtype=tensor.dtype)
    return flat.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    new = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device)
    if tensor.numel():
        on_host(new).copy_(tensor)
    return new


def on_cuda(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == "cuda"


def with_index(device: torch.device) -> torch.device:
    return device if device.index is not None else torch.device("cuda", torch.cuda.current_device())


class EmulatedGPU(TorchDispatchMode):
    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        overload = str(operator).removeprefix("aten.")
        name = operator._schema.name.split("::")[1]
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        used = [tensor.device for tensor in tensors if tensor.device.type == "cuda"]
        wanted = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
        if not used and (wanted is None or wanted.type != "cuda"):
            return operator(*args, **kwargs)
        if overload in NATIVE or _is_view(operator):
            return operator(*args, **kwargs)
        if name in ("_to_copy", "copy_", "_copy_from"):
            return _copy(name, args, kwargs, wanted)
        device = with_index(used[0] if used else wanted)
        _require_same_device(name, tensors, device)
        if _waits(name, overload, args, kwargs):
            log.waits[name, where()] += 1
        log.launches[name] += 1
        if name.endswith("_attention"):
            _note_attention(name, args)
        return _compute(operator, name, device, args, kwargs)


def _is_view(operator: Any) -> bool:
    aliases = any(value.alias_info is not None for value in operator._schema.returns)
    writes = any(value.alias_info is not None and value.alias_info.is_write for value in operator._schema.arguments)
    return aliases and not writes


def _compute(operator: Any, name: str, device: torch.device, args: Any, kwargs: Any) -> Any:
    originals: dict[int, tuple[Tensor, Tensor]] = {}

    def inside(value: Any) -> Any:
        if not on_cuda(value):
            return value
        alias = on_host(value)
        originals[id(alias)] = (alias, value)
        return alias

    def outside(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) not in originals:
            return to_device(value, device)
        alias, original = originals[id(value)]
        if alias.shape != original.shape:  # the operator resized its `out`
            original.resize_(alias.shape)
            on_host(original).copy_(alias)
        return original

    args, kwargs = tree_map(inside, args), tree_map(inside, kwargs)
    if is_unordered(name, args):
        log.unordered[name, where()] += 1
    if "device" in kwargs:
        kwargs["device"] = torch.device("cpu")
    if kwargs.get("pin_memory"):
        kwargs["pin_memory"] = False
    random = torch.Tag.nondeterministic_seeded in operator.tags
    with _random(device, kwargs) if random else contextlib.nullcontext():
        return tree_map(outside, OPERATORS.get(name, operator)(*args, **kwargs))


def _require_same_device(name: str, tensors: list[Tensor], device: torch.device) -> None:
    for tensor in tensors:
        if tensor.device == device or (tensor.device.type == "cpu" and tensor.ndim == 0):
            continue
        if tensor.device.type == "cpu" and name in INDEXING:
            log.waits["index from host", where()] += 1
            continue
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"{device} and {tensor.device}! ({name}) at {where()}"
        )


def _waits(name: str, overload: str, args: Any, kwargs: Any) -> bool:
    if overload == "repeat_interleave.Tensor":
        return kwargs.get("output_size") is None
    if name not in INDEXING:
        return name.startswith(WAITING)
    indices = args[1]
    if name != "index" and len(indices) == 1 and isinstance(args[2], Tensor) and args[2].numel() == 1:
        return False  # computed as masked_fill
    return any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in indices)


def _note_attention(name: str, args: Any) -> None:
    query, key, bias = args[0], args[1], args[3] if len(args) > 3 else None
    mask = tuple(bias.shape) if isinstance(bias, Tensor) else "causal" if True in args[4:] else None
    kernel = name.removeprefix("_scaled_dot_product_").removesuffix("_attention")
    what = f"{kernel} {str(query.dtype)[6:]} q{tuple(query.shape)} k{tuple(key.shape)} mask {mask}"
    log.attention[what, where()] += 1


def _copy(name: str, args: Any, kwargs: Any, wanted: torch.device | None) -> Tensor:
    """Copy between devices, or within one."""
    source = args[0] if name == "_to_copy" else args[1]
    target = (wanted or source.device) if name == "_to_copy" else args[0].device
    non_blocking = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
    size = source.numel() * source.element_size()
    if on_cuda(source) and target.type == "cuda":
        log.launches["copy"] += 1
    elif size:
        if on_cuda(source):
            what, waits = "copy to host", True
        else:
            pinned = source.is_pinned()
            what = f"copy to device, {'pinned' if pinned else 'pageable'}{', non_blocking' if non_blocking else ''}"
            waits = not (pinned and non_blocking)
        log.copies[what, where()] += size
        if waits:
            log.waits[what, where()] += 1
    host = on_host(source) if on_cuda(source) else source
    if name == "copy_":
        (on_host(args[0]) if on_cuda(args[0]) else args[0]).copy_(host)
        return args[0]
    options = {key: value for key, value in kwargs.items() if key in ("dtype", "memory_format", "layout")}
    copy = aten._to_copy(host, **options)
    return to_device(copy, with_index(target)) if target.type == "cuda" else copy


@contextlib.contextmanager
def _random(device: torch.device, kwargs: Any) -> Iterator[None]:
    """Draw numbers that depend on the device generator's seed and offset; they are not CUDA's."""
    generator = kwargs.get("generator") or torch.cuda.default_generators[device.index]
    if generator.device.type != "cuda":
        yield
        return
    state, offset = torch.get_rng_state(), generator.get_offset()
    torch.random.default_generator.manual_seed((generator.initial_seed() * 1000003 + offset) % 2**63)
    generator.set_offset(offset + 4)
    if "generator" in kwargs:
        kwargs["generator"] = torch.random.default_generator
    try:
        yield
    finally:
        torch.set_rng_state(state)


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_size_t)
def _on_native_call(kind: int, size: int) -> None:
    log.waits[NATIVE_CALLS.get(kind, f"native call {kind}"), where()] += 1


def activate() -> None:
    """Emulate the device in this thread and in all threads that it starts, until the process ends."""
    ctypes.CDLL(os.environ["EMULATED_GPU_LIBRARY"]).emulated_gpu_hook(_on_native_call)
    EmulatedGPU().__enter__()
    # Autograd's threads call Python once more after a backward pass; the process aborts if Python has ended.
    atexit.register(time.sleep, 0.1)
    run = threading.Thread._bootstrap_inner

    def within(thread: threading.Thread) -> None:  # a mode is active in one thread
        with EmulatedGPU():
            run(thread)

    threading.Thread._bootstrap_inner = within
    text_of = torch._tensor_str._tensor_str  # it would launch kernels, outside of all modes
    torch._tensor_str._tensor_str = lambda tensor, indent: text_of(
        on_host(tensor) if on_cuda(tensor) else tensor, indent
    )
    if "EMULATED_GPU_LOG" in os.environ:
        atexit.register(_append, Path(os.environ["EMULATED_GPU_LOG"]).resolve())


def _append(path: Path) -> None:
    if any(vars(log).values()):
        with path.open("a") as file:
            print(f"== {' '.join(sys.argv)}", log, sep="\n", file=file)
