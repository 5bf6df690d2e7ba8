"""A batch of independent matrices cut into one part a CPU core: the solver's column loops are too small to fill cores.

A loop over columns does a few operations of a microsecond or so on every column; threads inside of an operation cannot
share that, threads beside each other can.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import torch

from moepress.runs.phases import shared

Given = TypeVar("Given")
Made = TypeVar("Made")


def part_slices(experts: int, device: torch.device) -> list[slice]:
    """Equal parts of a batch, one a thread of torch's; a single one on a GPU, which wants large batches."""
    count = min(experts, torch.get_num_threads()) if device.type == "cpu" else 1
    bounds = [experts * index // max(count, 1) for index in range(count + 1)]
    return [slice(*pair) for pair in itertools.pairwise(bounds)] or [slice(0, 0)]


@contextmanager
def side_by_side(parts: int) -> Iterator[Callable[[Callable[[Given], Made], Sequence[Given]], list[Made]]]:
    """What maps a function over parts, each in a thread that has one core; in this thread where there is one part.

    Raises:
        Exception: what the function raised, of the first part that did.
    """
    if parts == 1:
        yield lambda step, given: [step(one) for one in given]
        return
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(max_workers=parts) as pool:

        def each(step: Callable[[Given], Made], given: Sequence[Given]) -> list[Made]:
            # The number is torch's own in every thread, but MKL's is one for all: it is set back for what comes next.
            torch.set_num_threads(1)
            try:
                with shared():
                    return list(pool.map(partial(_inside, step, torch.is_inference_mode_enabled()), given))
            finally:
                torch.set_num_threads(threads)

        yield each


def _inside(step: Callable[[Given], Made], inference: bool, given: Given) -> Made:
    torch.set_num_threads(1)
    with torch.inference_mode(inference):
        return step(given)
