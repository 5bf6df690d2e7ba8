"""Reading onto a device, with the meta device in the place of a GPU: it takes what lies there, and has no numbers."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models
import tiny_storages
import torch

from moepress.models.storage.checkpoint import open_checkpoint
from moepress.models.storage.experts import prune_source, read_expert
from moepress.models.storage.placed import Staging, onto, place
from moepress.models.storage.unpack import fp4_looked_up, fp4_values

META = torch.device("meta")


def test_copies_through_two_buffers_keep_what_was_copied() -> None:
    staging, given = Staging(), [torch.randn(size) for size in (5, 3, 9, 9, 1)]
    given += [torch.arange(6).view(2, 3), torch.randn(4, 4).to(torch.float8_e4m3fn).mT]
    copies = [staging.copy(tensor, torch.device("cpu")) for tensor in given]
    for tensor, copy in zip(given, copies, strict=True):
        assert (copy.dtype, copy.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(copy.float(), tensor.float())
        assert copy.data_ptr() != tensor.data_ptr()


def test_4_bit_floats_are_the_same_looked_up_on_a_device() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(16, 16)
    assert torch.equal(fp4_looked_up(codes), fp4_values(codes))


def test_a_place_is_that_of_one_thread_and_of_the_block() -> None:
    tensor, found = torch.ones(2), list[torch.Tensor]()
    with onto(META):
        assert place(tensor).is_meta
        with onto(torch.device("cpu")):
            assert place(tensor) is tensor
        assert place(tensor).is_meta
        thread = threading.Thread(target=lambda: found.append(place(tensor)))
        thread.start()
        thread.join()
    assert place(tensor) is tensor
    assert found == [tensor]


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("qwen3_moe", None),
        ("qwen3_moe", tiny_models.to_fp8),
        ("qwen3_moe", tiny_storages.to_fp8),
        ("qwen3_moe", tiny_storages.to_int4),
    ],
)
def test_experts_of_a_folder_are_made_dense_where_they_are_wanted(
    tmp_path: Path, key: str, change: Callable[[Path], None] | None
) -> None:
    tiny_models.make(key, tmp_path)
    if change is not None:
        change(tmp_path)
    source = open_checkpoint(tmp_path)
    pruned = prune_source(source, dict.fromkeys(source.outline.moe_layers, (0, 2)))
    layer = source.outline.moe_layers[0]
    for some, expert in ((source, 2), (pruned, 1)):
        here = read_expert(some, layer, expert)
        with onto(META):
            there = read_expert(some, layer, expert)
        for mine, theirs in zip(here.matrices, there.matrices, strict=True):
            assert (theirs.is_meta, theirs.shape, theirs.dtype) == (True, mine.shape, mine.dtype)
    for name in pruned.cuts:
        with onto(META):
            assert pruned.read(name).shape == pruned.shapes[name]
