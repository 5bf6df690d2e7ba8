"""Part `bytes` of prune_quality.py: pruned and quantized models against unpruned ones at fewer bits."""

import shutil
import time
from pathlib import Path
from typing import Any

import torch
from prune_setting import InMemory, Pressed, Setting, calibration, count_of, figures, measured, profile_of, subject
from setting import bench_model

from moepress.calibration.hessian import hessian_for
from moepress.calibration.profile import Profile
from moepress.compress.gptq.include import Include
from moepress.compress.pruning.plan import make_plan
from moepress.compress.pruning.scoring import Criterion
from moepress.converters.safetensors.artifact import Artifact, open_artifact
from moepress.converters.safetensors.scheme import Scheme
from moepress.models.storage.checkpoint import Checkpoint, open_checkpoint
from moepress.stages.places import Machine, Output
from moepress.stages.quantize import QuantizeRequest, quantize_stage

GROUP_SIZE = 64
INCLUDE = frozenset({Include.ATTENTION, Include.SHARED, Include.DENSE})


def bytes_seed(seed: int, setting: Setting, work: Path) -> dict[str, Any]:
    """Every model of the second table, for one seed; attention, shared experts, dense layers in the same bits."""
    torch.set_num_threads(1)
    disk, own = open_checkpoint(bench_model()), work / f"bytes-{seed}"
    profile, subjects = profile_of(seed, setting, work), []
    for number, wanted in enumerate(setting.pressed):
        start = time.perf_counter()
        source = pressed(profile, disk, wanted, seed, setting, own / f"artifact-{number}")
        print(f"seed {seed}: {wanted} {time.perf_counter() - start:.0f} s", flush=True)
        subjects.append(subject(str(number), source, source.total_bytes))
    found = measured(InMemory(base=disk), subjects, setting, own)
    rows = [
        {
            "criterion": wanted.criterion if wanted.keep < 1 else "",
            "keep": wanted.keep,
            "bits": wanted.bits,
            "bytes": made.stored_bytes,
            "seed": seed,
            **figures(found, made.label),
        }
        for wanted, made in zip(setting.pressed, subjects, strict=True)
    ]
    shutil.rmtree(own)
    return {"original": figures(found, "original"), "rows": rows}


def pressed(profile: Profile, disk: Checkpoint, wanted: Pressed, seed: int, setting: Setting, folder: Path) -> Artifact:
    """The model at that share and width, as an opened artifact."""
    plan = make_plan(profile, count=count_of(disk, wanted.keep), criterion=Criterion(wanted.criterion))
    folder.parent.mkdir(exist_ok=True)
    request = QuantizeRequest(
        scheme=Scheme(bits=wanted.bits, group_size=GROUP_SIZE),
        include=INCLUDE,
        hessian=hessian_for("auto", wanted.bits, {}),
    )
    given = calibration(seed, setting.repair_tokens)
    quantize_stage(str(bench_model()), Output(folder=folder), plan, request, given, Machine())
    return open_artifact(folder)
