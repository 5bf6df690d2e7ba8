"""Memory that runs out: known for what it is, and a batch is tried once more in halves."""

import errno
from collections.abc import Sequence

import pytest
import torch

from moepress.runs.memory import in_halves, is_out_of_memory


def test_memory_that_runs_out_is_told_from_other_errors() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(OSError(errno.ENOMEM, "Cannot allocate memory"))
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA"))
    for error in (RuntimeError("shape mismatch"), OSError(errno.ENOENT, "no"), ValueError("out of memory")):
        assert not is_out_of_memory(error)


def test_a_batch_that_does_not_fit_is_done_in_halves_once(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = []

    def work(items: Sequence[int]) -> list[int]:
        sizes.append(len(items))
        if len(items) > 3:
            raise MemoryError
        return [2 * item for item in items]

    assert in_halves(range(5), work, "test items") == [0, 2, 4, 6, 8]
    assert sizes == [5, 3, 2]
    assert "Memory ran out with 5 test items at once" in capsys.readouterr().err
    with pytest.raises(MemoryError):
        in_halves(range(8), work, "test items")
    with pytest.raises(MemoryError):
        in_halves([1], lambda _items: (_ for _ in ()).throw(MemoryError()), "test items")


def test_another_error_is_not_tried_again() -> None:
    calls = []

    def work(items: Sequence[int]) -> list[int]:
        calls.append(items)
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape"):
        in_halves([1, 2], work, "test items")
    assert len(calls) == 1
