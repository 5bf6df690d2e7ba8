"""Batches against single inputs, in families that do not mind padding and in those that do."""

import every_family
import pytest
import torch

from moepress.validation.tasks.runner import Input
from moepress.validation.tasks.torch_runner import TorchRunner

STOP = frozenset({1})


def never(_new: object) -> bool:
    return False


@pytest.mark.parametrize(
    ("model_type", "behind", "before"),
    [
        ("qwen3_moe", True, True),
        ("deepseek_v3", True, True),
        ("qwen3_next", True, True),
        ("gpt_oss", True, True),
        ("minimax", False, False),  # linear attention in blocks
        ("deepseek_v4", True, False),  # compressed attention, in blocks from the first position
    ],
)
def test_batches_give_what_single_inputs_give(model_type: str, behind: bool, before: bool) -> None:
    runner = TorchRunner(every_family.build(model_type), device=torch.device("cpu"), dtype=torch.float32)
    assert (runner._takes_padding_behind, runner._takes_padding_before) == (behind, before)
    chance = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 99, (length,), generator=chance).tolist() for length in (21, 21, 11, 4)]
    inputs = [Input(tokens=tuple(prompt), first=2) for prompt in prompts]
    together, alone = runner.logits(inputs), (next(runner.logits([one])) for one in inputs)
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    written = list(runner.greedy(prompts, room=5, stop=STOP, ended=never))
    assert written == [next(runner.greedy([one], room=5, stop=STOP, ended=never)) for one in prompts]
