"""Quantizing with what errors cost at the end of the network: which matrices know it, resuming, and that it helps."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from stage_runs import content, demo_costs, demo_windows, keep_of, quantized_folder
from torch import Tensor

from moepress.calibration.hessian import HessianOptions, hessian_for
from moepress.compress.gptq import experts, linears
from moepress.compress.gptq.coded import QuantizeOptions
from moepress.compress.gptq.ends import end_groups
from moepress.compress.gptq.include import Include
from moepress.converters.safetensors.artifact import open_artifact
from moepress.converters.safetensors.scheme import Scheme
from moepress.models.families.family import Part
from moepress.models.storage.checkpoint import open_checkpoint
from moepress.runs.journal import Run
from moepress.stages.places import model_folder

WINDOWS = tiny_models.windows(256, count=6, length=24)
ENDS = HessianOptions(asymmetry=1.0, end_tokens=72)
ALL_BUT_HEAD = (Include.ATTENTION, Include.SHARED, Include.DENSE)
G3 = Scheme(bits=3, group_size=16)


def test_effort_max_asks_for_it_where_there_are_few_bits() -> None:
    assert hessian_for("auto", 4, {}, "max").end_tokens > 0
    assert hessian_for("auto", 8, {}, "max").end_tokens == 0
    assert hessian_for("auto", 8, {1: 4}, "max").end_tokens > 0
    assert hessian_for("auto", 4, {}, "high").end_tokens == 0


def test_linears_of_many_bits_are_left_out(tiny_model: Callable[..., Path]) -> None:
    source = open_checkpoint(tiny_model("deepseek_v3"))
    options = QuantizeOptions(scheme=G3, scale_dtype=torch.float32, stored_dtype=torch.float32)
    every = end_groups(source, 3, options, ALL_BUT_HEAD)
    assert any("self_attn" in name for names in every[1] for name in names)
    wide = replace(options, part_bits={Part.ATTENTION: 8})
    fewer = end_groups(source, 3, wide, ALL_BUT_HEAD)
    assert not any("self_attn" in name for groups in fewer.values() for names in groups for name in names)
    assert any("shared_experts" in name for names in fewer[1] for name in names)
    by_layer = end_groups(source, 3, replace(options, layer_bits={1: 8}), ALL_BUT_HEAD)
    assert not by_layer[1]
    assert by_layer[0]


def test_every_matrix_of_few_bits_is_solved_with_a_side(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, list[bool]]] = []
    solve = experts.solve_stacked

    def watch(weight_EOI: Tensor, hessian_EII: Tensor, options: Any, kind: Any = None, sides: Any = None) -> Any:
        known = [side is not None for side in sides or [None] * len(weight_EOI)]
        seen.append((options.scheme.bits, known))
        for side in sides or ():
            assert sum(len(block) for block in side) == weight_EOI.shape[1]
            for block in side:
                torch.testing.assert_close(block, block.T)
                assert 1.2 < float(block.diagonal().mean()) < 1.4
                assert float(torch.linalg.eigvalsh(block)[0]) > 0.2
        return solve(weight_EOI, hessian_EII, options, kind, sides)

    monkeypatch.setattr(experts, "solve_stacked", watch)
    monkeypatch.setattr(linears, "solve_stacked", watch)
    include = {Include.ATTENTION: 8, Include.SHARED: None, Include.DENSE: None}
    quantized_folder(tiny_model("deepseek_v3"), WINDOWS, tmp_path / "q", include=include, scheme=G3, hessian=ENDS)
    assert all(all(known) for bits, known in seen if bits == 3)
    assert not any(any(known) for bits, known in seen if bits == 8)
    assert {bits for bits, _ in seen} == {3, 8}


class _CutError(Exception):
    """The run ends here."""


def test_a_run_that_ends_after_any_piece_ends_with_the_same_bytes(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, write, left = tiny_model("deepseek_v3"), Run.write, [10**6]

    def counted(self: Run, *arguments: Any) -> Any:
        if not left[0]:
            raise _CutError
        left[0] -= 1
        return write(self, *arguments)

    monkeypatch.setattr(Run, "write", counted)
    keep = keep_of(open_checkpoint(folder), 8)

    def made(out: Path, **more: Any) -> None:
        quantized_folder(folder, WINDOWS, out, keep=keep, include=ALL_BUT_HEAD, scheme=G3, hessian=ENDS, **more)

    made(tmp_path / "whole")
    wanted, pieces = content(tmp_path / "whole"), 10**6 - left[0]
    assert not [name for name in wanted if "end" in name]
    for cut in range(1, pieces, 2):
        out = tmp_path / f"cut-{cut}"
        left[0] = cut
        with pytest.raises(_CutError):
            made(out)
        left[0] = 10**6
        made(out, max_pieces=10**6)
        assert content(out) == wanted, f"cut after {cut} pieces"


@pytest.mark.parametrize("key", tiny_models.KEYS)
def test_every_row_of_the_table_goes_through(key: str, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    result = quantized_folder(tiny_model(key), WINDOWS, tmp_path / "q", include=ALL_BUT_HEAD, scheme=G3, hessian=ENDS)
    assert result["finished"]
    assert not result["experts_rounded"]


def test_the_demo_model_diverges_less(tmp_path: Path) -> None:
    found = {}
    for name, tokens in (("original", 0), ("end", 2048)):
        hessian = HessianOptions(asymmetry=1.0, end_tokens=tokens)
        out = tmp_path / name
        scheme = Scheme(bits=3, group_size=64)
        quantized_folder(
            model_folder("demo"), demo_windows(), out, include=ALL_BUT_HEAD, scheme=scheme, hessian=hessian
        )
        found[name] = demo_costs(open_artifact(out), tmp_path)[0]
    assert found["end"] < 0.93 * found["original"]
