"""Buffers in memory and in files, and what of them counts as the process's own memory."""

import sys
from pathlib import Path

import pytest
import torch

from moepress.errors import MoepressError
from moepress.models.forward.scratch import Scratch, mapped_limit_bytes


def test_a_buffer_lies_in_memory_until_half_of_the_limit_is_used(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path, 2000)
    first = scratch.tensor("first", (10, 20), torch.float32)
    second = scratch.tensor("second", (10, 20), torch.float32)
    third = scratch.tensor("third", (50,), torch.float32)
    empty = scratch.tensor("empty", (0, 20), torch.float32)
    (file,) = tmp_path.iterdir()
    assert file.name.startswith("scratch-second.")
    assert file.stat().st_size == 800
    for buffer in (first, second, third, empty):
        buffer.fill_(3)
        assert (buffer == 3).all()
    assert second.shape == (10, 20)
    assert empty.shape == (0, 20)
    scratch.close()
    assert list(tmp_path.iterdir()) == []


def test_a_buffer_of_the_same_name_leaves_the_one_before_it_alone(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path, 0)
    first = scratch.tensor("same", (7,), torch.float32).fill_(1)
    second = scratch.tensor("same", (9,), torch.float32).fill_(2)
    assert first.tolist() == [1] * 7
    assert second.tolist() == [2] * 9
    scratch.close()
    assert first.tolist() == [1] * 7  # deleted, and still there for who holds it


@pytest.mark.parametrize("memory", [0, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_written_in_any_order_and_read_in_theirs(tmp_path: Path, memory: int, dtype: torch.dtype) -> None:
    scratch = Scratch(tmp_path, memory)
    rows = scratch.rows("table", 50, 6, dtype)
    assert (rows.file is None) == bool(memory)
    values = torch.randn(50, 6).to(dtype)
    for part in torch.randperm(50, generator=torch.Generator().manual_seed(1)).split(7):
        rows.put(part, values[part])
    assert torch.equal(rows.get(0, 50), values)
    assert torch.equal(rows.get(13, 29), values[13:29])
    rows.put(torch.tensor([20]), values[:1])  # the table is used again
    assert torch.equal(rows.get(19, 22), torch.stack((values[19], values[0], values[21])))
    scratch.close()
    assert list(tmp_path.iterdir()) == []


def resident_bytes() -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("VmRSS:")).split()[1]) << 10


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells and gives back resident pages of a mapping")
def test_pages_that_were_forgotten_are_not_resident_and_keep_their_content(tmp_path: Path) -> None:
    size, scratch = 96 << 20, Scratch(tmp_path, 0)
    buffer = scratch.tensor("buffer", (size // 4,), torch.int32)
    torch.arange(size // 4, out=buffer)
    full = resident_bytes()
    scratch.forget()
    assert resident_bytes() < full - 0.9 * size
    for start in range(0, len(buffer), 1 << 20):
        expected = torch.arange(start, start + (1 << 20), dtype=torch.int32)
        assert torch.equal(buffer[start : start + (1 << 20)], expected)
    scratch.touch(mapped_limit_bytes(0))
    again = resident_bytes()
    assert again > full - 0.1 * size
    scratch.touch(1)
    assert resident_bytes() < again - 0.9 * size
    buffer[0] = -1
    scratch.forget()
    assert buffer[:3].tolist() == [-1, 1, 2]
    scratch.close()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere room is not reserved")
def test_a_disk_without_room_is_said_before_anything_is_written(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path, 0)
    with pytest.raises(MoepressError, match=r"free and a scratch file in .* needs 4,294,967,296 MiB"):
        scratch.rows("huge", 1 << 40, 1 << 10, torch.float32)
    assert list(tmp_path.iterdir()) == []
