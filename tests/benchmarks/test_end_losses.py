"""The benchmark of other losses: its factors, its rotation, and the whole of it on the demo."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM

from moepress.compress.gptq import native
from moepress.models.storage.checkpoint import open_checkpoint
from moepress.stages.places import model_folder

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
needs_loops = pytest.mark.skipif(native.library() is None, reason="no native loops")


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("ends")


@pytest.fixture
def rotation(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("rotation")


def test_factors_are_those_of_the_jacobian_and_of_every_token(ends: ModuleType) -> None:
    folder = model_folder("demo")
    source, windows = open_checkpoint(folder), torch.arange(3, 67).view(2, 32)
    seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).requires_grad_(False)
    experts = model.get_submodule("model.layers.2.mlp.experts")
    experts.register_forward_hook(lambda _module, given, _output: seen.append(given))
    model(windows)
    hidden_TD, chosen_TK, weights_TK = seen[0]
    expert = int(chosen_TK.flatten().bincount().argmax())
    gate_name, up_name, down_name = source.family.expert_names(2, expert)
    tokens, slots = (chosen_TK == expert).nonzero(as_tuple=True)
    both_TO = hidden_TD[tokens] @ experts.gate_up_proj[expert].T
    wanted_OO = torch.zeros(both_TO.shape[1], both_TO.shape[1])
    for both_O, share in zip(both_TO, weights_TK[tokens, slots], strict=True):

        def output(both_O: torch.Tensor, share: torch.Tensor = share) -> torch.Tensor:
            gate, up = both_O.chunk(2)
            return share * ((experts.act_fn(gate) * up) @ experts.down_proj[expert].T)

        jacobian_DO = torch.autograd.functional.jacobian(output, both_O)
        wanted_OO += jacobian_DO.T @ jacobian_DO
    found = importlib.import_module("layer_ends").gather_layers(source, str(folder), windows)
    torch.testing.assert_close(found.sides[gate_name, up_name], wanted_OO, rtol=1e-3, atol=1e-5)
    network, routers = ends.gather_ends(source, str(folder), windows, frozenset(), samples=1)
    for one in (network, routers):
        key = (down_name,)
        reached = torch.zeros(64, dtype=torch.bool).index_fill_(0, tokens, True)
        assert torch.equal(one.tokens[key] > 0, reached)
        assert float(one.tokens[key].sum()) == pytest.approx(float(one.sides[key].trace()), rel=1e-4)
    last = (ends.layer_key(source.shape.layers - 1), network, routers)
    assert last[0] in last[1].sides
    assert last[0] not in last[2].sides  # no router comes after the last layer


def test_a_turned_model_gives_the_same_logits(rotation: ModuleType, tmp_path: Path) -> None:
    folder, out = model_folder("demo"), tmp_path / "turned"
    rotation.rotate(folder, out, dtype=torch.float32)
    tokens = torch.arange(3, 67).view(1, 64)
    with torch.no_grad():
        before, after = (
            AutoModelForCausalLM.from_pretrained(str(f), dtype=torch.float32)(tokens).logits for f in (folder, out)
        )
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3)
    weights = [open_checkpoint(f).read("model.embed_tokens.weight").float() for f in (folder, out)]
    assert (weights[0] - weights[1]).abs().max() > 0.1 * weights[0].abs().max()


@needs_loops
@pytest.mark.slow
def test_trials_are_measured_on_the_demo(tmp_path: Path) -> None:
    file = tmp_path / "runs.json"
    metrics = "layer's end by metrics, match own"
    trials = ["match original", "end", metrics, "token weights", "rotated", "rotated, not quantized"]
    command = [sys.executable, FOLDER / "end_losses.py", "--quick", "--threads", "1", "--bits", "3", "--seeds", "0"]
    done = subprocess.run(
        [*command, "--trials", *trials, "--json", file],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| 3 | end |" in done.stdout
    (found,) = json.loads(file.read_text()).values()
    kl = {run["trial"]: run["kl"] for run in found["runs"]}
    assert list(kl) == trials
    assert len(set(kl.values())) == len(trials)
    assert kl["end"] < kl["match original"]
    assert 0 < kl["rotated, not quantized"] < 0.1 * kl["rotated"]
