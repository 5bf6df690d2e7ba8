"""DeepSeek-R1 has 91,991 tensors: what reads and plans must grow with their number, not with its square.

Checkpoints of headers alone (tests/r1_models.py): all names of R1, tiny shapes, data that is a hole in the file.
"""

import gc
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from r1_models import hollow_r1
from stage_runs import keep_of, plan_of

from moepress.calibration.accumulators import ACCUMULATORS
from moepress.calibration.profile import SHARDS, Profile, Statistic, fingerprint
from moepress.compress.gptq.coded import QuantizeOptions
from moepress.compress.gptq.include import Include, unquantized_modules
from moepress.compress.gptq.layer_bits import check_scheme
from moepress.compress.gptq.pieces import piece_names, plan_chunks
from moepress.compress.pruning.plan import check_plan, make_plan
from moepress.compress.pruning.rewrite import mtp_keep, planned_bytes, planned_entries
from moepress.converters.safetensors.scheme import Scheme
from moepress.models.forward.inventory import describe, inventory
from moepress.models.forward.tensor_check import check_tensors
from moepress.models.storage.checkpoint import Checkpoint, open_checkpoint
from moepress.models.storage.experts import prune_source
from moepress.models.storage.mtp import Mtp

TOTALS = ("tokens", "routed_squared", "residual_squared")
SCHEME = Scheme(bits=4, group_size=32)
LONGEST_SECONDS = 60.0  # on 2 shared cores the slowest takes 2
QUICK_SECONDS = 1.0  # 92,000 squared would be hours: what takes less is not quadratic, and too short to be compared
STEPS = ("open", "check", "describe", "fingerprint", "plan", "prune", "quantize")


def profile(source: Checkpoint) -> Profile:
    """Random statistics of all layers."""
    draw, layers = torch.Generator().manual_seed(0), source.outline.moe_layers

    def drawn(*size: int) -> Statistic:
        return torch.rand(1, SHARDS, *size, generator=draw, dtype=torch.float64).numpy() * 1000

    return Profile(
        model="",
        model_name="R1",
        family=source.family.name,
        config=source.config,
        shape=source.shape,
        domains=("all",),
        layers=layers,
        calibration={},
        inventory=inventory(source),
        statistics={n: {a: drawn(256) for a in ACCUMULATORS} | {t: drawn() for t in TOTALS} for n in layers},
    )


def plan_pruning(source: Checkpoint) -> None:
    plan = plan_of(source, keep_of(source, 128))
    check_plan(plan, source.shape, source.outline.moe_layers, None)
    planned = planned_entries(source, {**plan.keep, **mtp_keep(source, plan, Mtp.KEEP)})
    assert 0.4 < planned_bytes(planned) / source.total_bytes < 0.6
    left = sum(map(len, planned.values())) / len(source.stored)
    assert 0.49 < left < 0.52


def plan_quantizing(source: Checkpoint) -> None:
    seen, layers = prune_source(source, keep_of(source, 128)), source.shape.layers
    include = frozenset({Include.SHARED, Include.DENSE})
    check_scheme(seen, SCHEME, include)
    options = QuantizeOptions(scheme=SCHEME, scale_dtype=torch.bfloat16, stored_dtype=torch.bfloat16)
    chunks = plan_chunks(seen, layers, dict.fromkeys(seen.outline.moe_layers, 128), options)
    assert len(piece_names(chunks)) == layers + 1
    # Attention (5 Linears) and router of a layer, and lm_head; the router of the MTP layer is not among them.
    assert len(unquantized_modules(seen, layers, include)) == 5 * layers + (layers - 3) + 1


def seconds(step: Callable[[], Any]) -> float:
    """Of this process: others share the machine."""
    gc.collect()
    start = time.process_time()
    step()
    return time.process_time() - start


Steps = dict[str, Callable[[], Any]]


def steps_of(source: Checkpoint) -> Steps:
    observed = profile(source)
    return {
        "open": lambda: open_checkpoint(source.folder),
        "check": lambda: check_tensors(
            source.family, source.config, source.outline.shape, source.shapes, folder=source.folder
        ),
        "describe": lambda: describe(source),
        "fingerprint": lambda: fingerprint(source),
        "plan": lambda: make_plan(observed, count=128, scheme=SCHEME),
        "prune": lambda: plan_pruning(source),
        "quantize": lambda: plan_quantizing(source),
    }


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> tuple[Steps, Steps]:
    """The steps for half of R1's layers and for all of them: 44,000 and 92,000 tensors."""
    folder, made = tmp_path_factory.mktemp("hollow"), []
    for moe in (27, 58):
        source = open_checkpoint(hollow_r1(folder / str(moe), moe_layers=moe))
        assert len(source.stored) == 91_991 - (58 - moe) * 1558
        made.append(steps_of(source))
    made[0]["check"]()  # imports transformers
    return made[0], made[1]


@pytest.mark.parametrize("step", STEPS)
def test_twice_the_tensors_take_about_twice_the_time(halves: tuple[Steps, Steps], step: str) -> None:
    half, whole = (seconds(steps[step]) for steps in halves)
    for _ in range(3):  # 2.1 times the tensors; squared that is 4.4. A busy machine gets other tries.
        assert whole < LONGEST_SECONDS
        if whole < max(3.2 * half, QUICK_SECONDS):
            return
        half, whole = (min(before, seconds(steps[step])) for before, steps in zip((half, whole), halves, strict=True))
    pytest.fail(f"{half:.2f} s for half of the layers, {whole:.2f} s for all")


def test_every_step_is_measured(halves: tuple[Steps, Steps]) -> None:
    assert tuple(halves[0]) == tuple(halves[1]) == STEPS
