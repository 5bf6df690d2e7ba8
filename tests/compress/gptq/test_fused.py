"""The Triton kernels against the torch loops that they stand for, in Triton's interpreter where there is no GPU."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from moepress.compress.gptq import columns, fused

CUDA = torch.cuda.is_available()
# In a process of its own: Triton decides when it is imported whether it interprets.
SCRIPT = """
import torch
from moepress.compress import columns, fused, gptq
from moepress.converters.safetensors.scheme import Scheme

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
torch.manual_seed(0)
for width, group in ((64, 32), (80, 16), (48, 48)):
    weight = (torch.randn(2, 70, width) * 0.05).to(device)
    inputs = torch.randn(2, 200, width).to(device)
    hessian, scheme = inputs.mT @ inputs / 200, Scheme(bits=4, group_size=group)
    found = []
    for loops in ((fused.round_columns, fused.improve_columns), (columns.round_columns, columns.improve_columns)):
        gptq.inner_loops = lambda _device, loops=loops: loops
        found.append(gptq.solve(weight, hessian, scheme, scale_dtype=torch.bfloat16))
    quick, plain = found
    assert torch.allclose(quick.loss, plain.loss, rtol=1e-3), (quick.loss, plain.loss)
    assert (quick.codes != plain.codes).float().mean() < 0.01
assert fused.agrees(device, columns.round_columns, columns.improve_columns)
print("agreed")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_kernels_give_the_codes_of_the_torch_loops() -> None:
    environment = dict(os.environ) | ({} if CUDA else {"TRITON_INTERPRET": "1"})
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "agreed", done.stderr


def test_kernels_that_cannot_run_or_give_other_codes_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")
    plain = (columns.round_columns, columns.improve_columns)

    def wrong(
        _work: object, _upper: object, _scales: object, codes: torch.Tensor, errors: torch.Tensor, *_: int
    ) -> None:
        codes.zero_()
        errors.zero_()

    def broken(*_: object) -> None:
        raise RuntimeError("no compiler\nhere")

    monkeypatch.setattr(fused, "available", lambda _device: True)
    monkeypatch.setattr(fused, "improve_columns", columns.improve_columns)
    for kernel, reason in ((wrong, "differ"), (broken, r"\(no compiler\)")):
        monkeypatch.setattr(fused, "round_columns", kernel)
        columns.inner_loops.cache_clear()
        with pytest.warns(UserWarning, match=reason):
            assert columns.inner_loops(device) == plain
    monkeypatch.setattr(fused, "round_columns", columns.round_columns)
    columns.inner_loops.cache_clear()
    assert columns.inner_loops(device) == (fused.round_columns, fused.improve_columns)
    columns.inner_loops.cache_clear()
