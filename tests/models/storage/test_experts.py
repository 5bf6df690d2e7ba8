"""A source seen through a keep list, row by row; names layer by layer."""

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models
import torch
from stage_runs import keep_of

from moepress.models.families.table import DEEPSEEK_V3
from moepress.models.storage.checkpoint import open_checkpoint
from moepress.models.storage.experts import prune_source


@pytest.mark.parametrize("key", ["deepseek_v3", "mixtral"])
@pytest.mark.parametrize("fused", [False, True], ids=["per-expert", "fused"])
def test_a_row_of_a_pruned_model_is_that_of_the_whole_tensor(
    tiny_model: Callable[..., Path], key: str, fused: bool
) -> None:
    base = open_checkpoint(tiny_model(key, fused=fused))
    source = prune_source(base, keep_of(base, base.shape.experts // 2))
    matrices = [name for name, shape in source.shapes.items() if len(shape) >= 2]
    assert any(len(source.shapes[name]) == 3 for name in matrices) == fused
    for name in matrices:
        whole = source.read(name)
        for row in (0, whole.shape[0] - 1):
            assert torch.equal(source.read_row(name, row), whole[row]), name


def test_names_by_layer_hold_every_name_once_in_order(tiny_copy: Callable[..., Path]) -> None:
    folder = tiny_copy("deepseek_v3")
    tiny_models.add_mtp(folder)
    source = open_checkpoint(folder)
    found = source.outline.names_by_layer
    assert found.keys() == {None, 0, 1, 2, 3}
    assert sorted(found[None]) == ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"]
    for layer, names in found.items():
        assert names == [name for name in source.shapes if DEEPSEEK_V3.layer_of(name) == layer]
