"""Requests to batches of at most so many tokens."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence

MAX_BATCH_TOKENS = 8192
"""In a decoder of 32 layers, 4096 wide, without grouped heads, in bfloat16, their keys and values take 4 GB."""


def batches_of(lengths: Sequence[int], keys: Sequence[Hashable], max_batch_tokens: int) -> Iterator[list[int]]:
    """Positions of requests, batch by batch, each once.

    Requests with the same key, the same images, stand side by side and are not parted if one batch can hold them. Long
    ones come first, so that little is padded and a batch that is too large for the memory is met at once.

    Args:
        lengths: tokens of each request, its answer included.
        keys: of each request.
        max_batch_tokens: the most that (requests of a batch) x (tokens of the longest) may be. A request that is longer
            than that is a batch of its own.
    """
    groups: dict[Hashable, list[int]] = {}
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        groups.setdefault(keys[row], []).append(row)
    batch: list[int] = []
    for group in groups.values():  # in the order of their longest
        most = max(1, max_batch_tokens // lengths[group[0]])
        for piece in (group[start : start + most] for start in range(0, len(group), most)):
            together = batch + piece
            if batch and len(together) * max(lengths[row] for row in together) > max_batch_tokens:
                yield batch
                together = piece
            batch = together
    if batch:
        yield batch
