"""The probe of what bits cost: its sample, its measure, and that it leaves the walk alone."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import tiny_models
import torch
from stage_runs import LIMITS, corpus_of
from torch import Tensor

from moepress.calibration.accumulators import ACCUMULATORS
from moepress.calibration.collect import Probe, collect
from moepress.calibration.profile import BIT_LOSSES, BIT_TOKENS
from moepress.compress.budget.bit_losses import bit_loss_probe, experts_to_solve, held_out, output_error, spread
from moepress.compress.budget.sizes import probe_scheme
from moepress.converters.safetensors.scheme import PER_CHANNEL
from moepress.models.families.family import Shape
from moepress.models.forward.streamed import StreamedModel, tokens_of
from moepress.models.forward.walk import Stream
from moepress.models.storage.checkpoint import open_checkpoint
from moepress.models.storage.experts import Expert
from moepress.runs.journal import open_run

CORPUS = corpus_of(tiny_models.windows(256, count=12, length=16))


def collected(folder: Path, work: Path, probe: Probe | None) -> dict[int, dict[str, Tensor]]:
    model = StreamedModel(open_checkpoint(folder), device=torch.device("cpu"), dtype=torch.float32)
    with open_run(work, {}) as run:
        return collect(model, CORPUS, run, LIMITS, probe=probe)


def test_a_probe_adds_its_losses_and_changes_nothing_else(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_model("deepseek_v3")
    plain = collected(folder, tmp_path / "plain", None)
    probed = collected(folder, tmp_path / "probed", bit_loss_probe(open_checkpoint(folder).config))
    for layer, found in probed.items():
        assert all(np.array_equal(found[name], plain[layer][name]) for name in ACCUMULATORS)
        losses = found[BIT_LOSSES].tolist()
        assert losses == sorted(losses, reverse=True)
        assert 0 < losses[-1] < 1e-2 < losses[0] < 1
        assert found[BIT_TOKENS] > 0


def test_the_error_is_that_of_the_output_on_the_tokens_named(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    seen = []

    def look(stream: Stream, layer: int, _found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        position = tokens_of(stream.chosen, stream.model.shape.experts)[3]
        whole = stream.model.read_expert(layer, 3)
        for share in (1.0, 0.9, 0.0):  # a tenth of the output away: a hundredth of its square
            other = Expert(gate=whole.gate, up=whole.up, down=share * whole.down)
            seen.append((share, output_error(stream, layer, whole, other, position)))
        held = held_out(stream).view(12, 16)
        assert held.all(dim=1).nonzero()[:, 0].tolist() == [2, 7, 10]
        assert held.any(dim=1).sum() == 3
        return {}

    collected(tiny_model("mixtral"), tmp_path / "work", look)
    assert seen
    for share, error in seen:
        assert error == pytest.approx((1 - share) ** 2, abs=1e-6)


@pytest.mark.parametrize("domains", [1, 2, 3, 4, 5, 8])
def test_a_fourth_of_every_domain_is_held_out_though_domains_take_turns(domains: int) -> None:
    windows = 256
    held = held_out(cast(Stream, SimpleNamespace(hidden=torch.empty(windows, 16, 4), tokens=windows * 16)))
    of_domain = held.view(windows, 16).all(dim=1).float()
    for domain in range(domains):
        assert 0.12 <= float(of_domain[domain::domains].mean()) <= 0.38


def test_the_sample_is_spread_over_the_ranking_and_stands_for_all_of_it() -> None:
    counts = torch.tensor([5.0, 80.0, 10.0, 40.0, 20.0, 0.0])
    mass = torch.tensor([1.0, 4.0, 1.0, 2.0, 2.0, 0.0])
    enough = counts > 0
    assert spread(counts, mass, enough, 2) == {3: 0.6, 2: 0.4}  # ranked 1, 3 | 4, 2, 0
    assert sum(spread(counts, mass, enough, 4).values()) == pytest.approx(1)
    assert set(spread(counts, mass, enough, 9)) == {0, 1, 2, 3, 4}
    assert spread(counts, mass, counts > 100, 4) == {}
    assert spread(counts, torch.zeros(6), enough, 2) == {3: 0.5, 2: 0.5}


def shape(hidden: int, width: int, experts: int = 64, top_k: int = 8) -> Shape:
    return Shape(
        layers=1,
        hidden=hidden,
        experts=experts,
        top_k=top_k,
        expert_width=width,
        groups=1,
        top_groups=1,
        vocabulary=1,
        context=1,
    )


def test_wide_experts_on_a_short_text_are_sampled_thinly() -> None:
    assert experts_to_solve(shape(256, 128, 48, 4), 65_536) == 4
    assert experts_to_solve(shape(2048, 768), 131_072) == 2
    assert experts_to_solve(shape(7168, 2048), 131_072) == 1
    assert experts_to_solve(shape(7168, 2048), 2048) == 1
    assert experts_to_solve(shape(7168, 2048), 1 << 20) == 4


def test_the_scheme_divides_both_widths_of_an_expert() -> None:
    assert probe_scheme(shape(256, 128), 3).group_size == 128
    assert probe_scheme(shape(256, 96), 3).group_size == 32
    assert probe_scheme(shape(256, 36), 3).group_size == PER_CHANNEL
