"""What errors cost at the end of the network: estimates, gradients held against transformers', and resuming."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from stage_runs import CPU, LIMITS, corpus_of
from torch import Tensor

from moepress.calibration import ends
from moepress.calibration.corpus import Corpus
from moepress.calibration.ends import Outer, gather_ends, read_side, side_blocks
from moepress.models.forward.streamed import StreamedModel
from moepress.models.storage.checkpoint import open_checkpoint
from moepress.runs.journal import Run, open_run

TOKENS = 60


def test_wide_matrices_are_cut_into_blocks_of_about_the_hidden_size() -> None:
    assert side_blocks(2048, 256) == [2048]
    assert side_blocks(2049, 256) == [1025, 1024]
    assert side_blocks(24576, 7168) == [6144] * 4


def test_few_vectors_are_drawn_towards_the_identity_by_their_spread() -> None:
    some_TR = torch.randn(40, 24, generator=torch.Generator().manual_seed(0)) * 3
    some_TR[:, :4] *= 5
    outer = Outer(total=torch.zeros(24, 24))
    for part in some_TR.split(7):
        outer.add(part)
    found = outer.estimate()
    assert found is not None
    products = some_TR[:, :, None] * some_TR[:, None]
    mean, level = products.mean(dim=0), products.mean(dim=0).trace() / 24
    noise = (products - mean).square().sum(dim=(1, 2)).mean() / 40
    share = noise / (mean - level * torch.eye(24)).square().sum()
    wanted = (1 - share) * mean / level + share * torch.eye(24)
    assert 0.02 < share < 0.9
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(found.trace(), torch.tensor(24.0))


def test_vectors_without_any_pattern_give_nearly_the_identity() -> None:
    outer = Outer(total=torch.zeros(64, 64))
    some_TR = torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
    outer.add(some_TR)
    found, plain = outer.estimate(), some_TR.T @ some_TR / 32
    assert found is not None
    assert (found - torch.eye(64)).norm() < 0.3 * (plain - torch.eye(64)).norm()


def test_of_zeros_nothing_is_known() -> None:
    outer = Outer(total=torch.zeros(4, 4))
    outer.add(torch.zeros(3, 4))
    assert outer.estimate() is None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save(tiny_models.build("deepseek_v3"), tmp_path_factory.mktemp("ends") / "model")


@pytest.fixture
def corpus(folder: Path) -> Corpus:
    return corpus_of(tiny_models.windows(open_checkpoint(folder).shape.vocabulary, count=3, length=20))


def _gather(folder: Path, out: Path, corpus: Corpus, groups: Any, **options: Any) -> Iterator[Run]:
    model = StreamedModel(open_checkpoint(folder), device=CPU, dtype=torch.float32)
    with open_run(out, {"test": "ends"}, **options) as run:
        gather_ends(model, corpus, run, LIMITS, TOKENS, groups)
        yield run


GROUPS = {
    1: [
        ["model.layers.1.self_attn.o_proj.weight"],
        ["model.layers.1.mlp.shared_experts.gate_proj.weight", "model.layers.1.mlp.shared_experts.up_proj.weight"],
    ]
}


def _wanted(folder: Path, windows_NT: Tensor) -> dict[str, Tensor]:
    """Second moments of transformers' gradients at Linears and layer 1's output, to which experts are added."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    seen: dict[str, Tensor] = {}
    places = [name.removesuffix(".weight") for names in GROUPS[1] for name in names]

    def watch(place: str, _module: Any, _given: Any, output: Tensor) -> None:
        output.register_hook(partial(seen.__setitem__, place))

    for place in [*places, "model.layers.1"]:
        model.get_submodule(place).register_forward_hook(partial(watch, place))
    logits_TV = model(windows_NT, use_cache=False).logits.flatten(0, 1)
    odds_TV, drawn = logits_TV.detach().softmax(dim=1), torch.Generator().manual_seed(0)
    noise_TV = torch.cat([torch.randn(windows_NT.shape[1], odds_TV.shape[1], generator=drawn) for _ in windows_NT])
    root_TV = noise_TV * odds_TV.sqrt()
    (logits_TV * (root_TV - odds_TV * root_TV.sum(dim=1, keepdim=True))).sum().backward()
    found = {}
    for names, key in ((["model.layers.1"], "metric"), *((names, names[0]) for names in GROUPS[1])):
        some_TO = torch.cat([seen[name.removesuffix(".weight")].flatten(0, 1) for name in names], dim=1)
        outer = Outer(total=torch.zeros(some_TO.shape[1], some_TO.shape[1]))
        outer.add(some_TO)
        estimate = outer.estimate()
        assert estimate is not None
        found[key] = estimate
    return found


def test_factors_are_second_moments_of_transformers_own_gradients(folder: Path, corpus: Corpus, tmp_path: Path) -> None:
    wanted = _wanted(folder, corpus.windows)
    for run in _gather(folder, tmp_path / "out", corpus, GROUPS):
        for key, estimate in wanted.items():
            found = read_side(run, 1, key)
            assert found is not None
            assert len(found) == 1
            error = float((found[0] - estimate).norm() / estimate.norm())
            assert error < 1e-3, f"{key} differs by {error:.1e}"  # it is kept in fp16
        assert read_side(run, 0) is None, "layer 0 has no experts"
        assert read_side(run, 99) is None


class _CutError(Exception):
    """The run ends here."""


def test_a_run_that_ends_after_any_piece_goes_on_to_the_same_factors(
    folder: Path, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, left = Run.write, [10**6]

    def counted(self: Run, *arguments: Any) -> Any:
        if not left[0]:
            raise _CutError
        left[0] -= 1
        return write(self, *arguments)

    monkeypatch.setattr(Run, "write", counted)

    def factors(run: Run) -> dict[str, str]:
        return {piece.id: piece.sha256 for piece in run.pieces.values()}

    (wanted,) = (factors(run) for run in _gather(folder, tmp_path / "whole", corpus, GROUPS))
    assert set(wanted) == {"ends", *(f"end-factors-{n}" for n in range(_layers(folder)))}
    pieces = 10**6 - left[0]
    for cut in range(1, pieces):
        out = tmp_path / f"cut-{cut}"
        left[0] = cut
        with pytest.raises(_CutError):
            list(_gather(folder, out, corpus, GROUPS))
        left[0] = 10**6
        (found,) = (factors(run) for run in _gather(folder, out, corpus, GROUPS, resume=True))
        assert found == wanted, f"cut after {cut} pieces"
        assert 10**6 - left[0] <= pieces - cut + 2, "finished pieces are made again"


def _layers(folder: Path) -> int:
    return open_checkpoint(folder).shape.layers


def test_what_is_done_is_not_done_again(folder: Path, corpus: Corpus, tmp_path: Path) -> None:
    for run in _gather(folder, tmp_path / "out", corpus, GROUPS):
        model = StreamedModel(open_checkpoint(folder), device=CPU, dtype=torch.float32)
        before = dict(run.pieces)
        gather_ends(model, corpus, run, LIMITS, TOKENS, GROUPS)
        assert run.pieces == before
        ends.drop_ends(run, 1)
        assert read_side(run, 1) is None
        ends.drop_all_ends(run)
        assert not run.pieces
