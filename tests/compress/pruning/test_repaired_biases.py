"""Repairs of experts that have biases, and of correction biases of two axes."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import every_family
import pytest
import torch
from stage_runs import keep_of, plan_of

from moepress.compress.pruning.repaired import LayerRepair, Repairs, repaired_source
from moepress.compress.pruning.rewrite import prune
from moepress.models.forward.proof import proven_family
from moepress.models.storage.checkpoint import open_checkpoint
from moepress.models.storage.experts import prune_source, read_expert
from moepress.runs.journal import open_run

Make = Callable[[str], Path]


@pytest.fixture
def folder(tmp_path: Path) -> Make:
    return lambda name: every_family.save(every_family.build(name), tmp_path / name)


def repairs_of(layers: dict[int, LayerRepair]) -> Repairs:
    return Repairs(model="a model", experts=8, parts=[], layers=layers, calibration={})


def test_a_gain_is_one_of_the_whole_output_bias_and_all(folder: Make, tmp_path: Path) -> None:
    source = open_checkpoint(folder("gpt_oss"))
    keep = keep_of(source, 8)
    gains = [0.5 + 0.125 * n for n in range(8)]
    layer = LayerRepair(gains=gains, bias=None, error_before=1.0, error_after=0.5)
    repairs = repairs_of(dict.fromkeys(keep, layer))
    seen = repaired_source(prune_source(source, keep), repairs)
    with open_run(tmp_path / "out", {}) as run:
        prune(source, plan_of(source, keep), run, repairs=repairs)
    written = open_checkpoint(tmp_path / "out")
    for number, kept in keep.items():
        for expert in (0, 7):
            before, gain = read_expert(source, number, kept[expert]), gains[expert]
            for found in (read_expert(seen, number, expert), read_expert(written, number, expert)):
                torch.testing.assert_close(found.down, before.down * gain)
                torch.testing.assert_close(found.down_bias, before.down_bias * gain)
                assert torch.equal(found.up, before.up)


def test_a_correction_bias_keeps_its_two_axes(folder: Make, tmp_path: Path) -> None:
    source = open_checkpoint(folder("ernie4_5_moe"))
    family = proven_family(source.family, source.config)
    assert family.correction.endswith("e_score_correction_bias")
    source = dataclasses.replace(source, family=family)
    keep = keep_of(source, 8)
    layer = LayerRepair(gains=None, bias=[0.1 * n for n in range(8)], error_before=1.0, error_after=0.5)
    repairs = repairs_of(dict.fromkeys(keep, layer))
    seen = repaired_source(prune_source(source, keep), repairs)
    name = family.at(family.correction, next(iter(keep)))
    assert seen.read(name).shape == (1, 8)
    with open_run(tmp_path / "out", {}) as run:
        prune(source, plan_of(source, keep), run, repairs=repairs)
    assert torch.equal(open_checkpoint(tmp_path / "out").read(name), seen.read(name))
