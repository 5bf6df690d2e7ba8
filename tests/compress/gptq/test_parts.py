"""A batch solved in parts, a thread each."""

from collections.abc import Iterator

import pytest
import torch

from moepress.compress.gptq.parts import part_slices, side_by_side
from moepress.compress.gptq.solver import solve
from moepress.converters.safetensors.scheme import Scheme

CPU = torch.device("cpu")


@pytest.fixture
def threads() -> Iterator[int]:
    """Two threads of torch's, whatever this run of tests has."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield 2
    torch.set_num_threads(before)


@pytest.mark.parametrize("inference", [False, True])
def test_parts_give_what_the_whole_batch_gives(threads: int, inference: bool) -> None:
    torch.manual_seed(0)
    weight_EOI, inputs_ETI = torch.randn(5, 24, 32) * 0.1, torch.randn(5, 80, 32)
    hessian_EII = inputs_ETI.mT @ inputs_ETI / 80
    hessian_EII[3] = 0  # an expert without tokens is another path
    found = []
    with torch.inference_mode(inference):
        for count in (threads, 1):
            torch.set_num_threads(count)
            found.append(solve(weight_EOI, hessian_EII, Scheme(bits=3, group_size=16), scale_dtype=torch.bfloat16))
    parts, whole = found
    for name in ("codes", "scales", "loss", "energy", "damping", "rounded"):
        assert torch.allclose(getattr(parts, name).double(), getattr(whole, name).double()), name
    assert parts.rounded.tolist() == [False, False, False, True, False]


def test_every_expert_is_in_one_part(threads: int) -> None:
    for experts in (1, 2, 3, 48):
        covered = [expert for part in part_slices(experts, CPU) for expert in range(experts)[part]]
        assert covered == list(range(experts))
        assert len(part_slices(experts, CPU)) == min(experts, threads)
    assert part_slices(8, torch.device("cuda")) == [slice(0, 8)]


def test_parts_have_one_thread_each_and_the_number_is_set_back(threads: int) -> None:
    with side_by_side(2) as each:
        assert each(lambda _part: torch.get_num_threads(), [0, 1]) == [1, 1]
        assert torch.get_num_threads() == threads
        with pytest.raises(ZeroDivisionError):
            each(lambda part: 1 // part, [0, 1])
        assert torch.get_num_threads() == threads
    assert (torch.ones(64, 64) @ torch.ones(64, 64)).sum() == 64**3
