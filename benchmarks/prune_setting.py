"""What both parts of prune_quality.py share: how much is measured, profiles, repairs, quality, and the results file."""

import json
import multiprocessing
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from setting import bench_model, machine, texts

from moepress.calibration.profile import Profile, load_profile
from moepress.compress.pruning.plan import Plan
from moepress.compress.pruning.repair import Repair
from moepress.compress.pruning.repaired import Repairs
from moepress.compress.pruning.scoring import Criterion
from moepress.models.forward.walk import Limits
from moepress.models.storage.checkpoint import Checkpoint, Source, SourceView
from moepress.stages.evaluation import load_evaluation
from moepress.stages.places import Calibration, Machine, Output
from moepress.stages.profile import profile_stage
from moepress.stages.repair import repair_stage
from moepress.validation.quality.measure import Subject, measure
from moepress.validation.quality.results import DOMAIN_MEAN, Quality

REPAIRS: Mapping[str, frozenset[Repair]] = {
    "none": frozenset(),
    "gain": frozenset({Repair.GAIN}),
    "bias": frozenset({Repair.BIAS}),
    "gain+bias": frozenset({Repair.GAIN, Repair.BIAS}),
}
WINDOW = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Pressed:
    """A quantized model of the second part: share of experts kept and what chose them, and bits."""

    keep: float
    bits: int
    criterion: str = Criterion.REAP.value


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """How much is measured.

    Attributes:
        seeds: of calibration.
        tokens: of calibration, for the profile.
        repair_tokens: of calibration, for repair and quantization.
        windows: of evaluation, per domain.
        shares: of experts kept.
        criteria: all that are compared.
        repaired: those of them that are also repaired, in every way.
        rounds: those of them that also prune in two rounds, at the smallest share.
        random: keep sets drawn by chance, per seed and share.
        pressed: models of the second part.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    tokens: int = 16_384
    repair_tokens: int = 8_192
    windows: int = 4
    shares: tuple[float, ...] = (0.75, 0.5)
    criteria: tuple[str, ...] = tuple(c.value for c in Criterion)
    repaired: tuple[str, ...] = (Criterion.REAP.value, Criterion.LOO.value)
    rounds: tuple[str, ...] = (Criterion.REAP.value, Criterion.LOO.value)
    random: int = 3
    pressed: tuple[Pressed, ...] = field(
        default=(
            Pressed(keep=1.0, bits=4),
            Pressed(keep=1.0, bits=3),
            Pressed(keep=1.0, bits=2),
            Pressed(keep=0.5, bits=8),
            Pressed(keep=0.75, bits=4),
            Pressed(keep=0.5, bits=4),
            Pressed(keep=0.5, bits=4, criterion=Criterion.LOO.value),
        )
    )


QUICK = Setting(
    seeds=(0, 1),
    tokens=4096,
    repair_tokens=2048,
    windows=2,
    shares=(0.5,),
    criteria=("reap", "gate"),
    repaired=("reap",),
    rounds=("reap",),
    random=1,
    pressed=(Pressed(keep=1.0, bits=2), Pressed(keep=0.5, bits=4)),
)


SeedFunction = Callable[[int, Setting, Path], dict[str, Any]]
"""Seed, setting, folder -> what it found."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InMemory(SourceView):
    """A source that reads every tensor once."""

    kept: dict[str, torch.Tensor] = field(default_factory=dict)

    def read(self, name: str) -> torch.Tensor:
        if name not in self.kept:
            self.kept[name] = self.base.read(name)
        return self.kept[name]

    def read_row(self, name: str, row: int) -> torch.Tensor:
        return self.read(name)[row]


def calibration(seed: int, tokens: int) -> Calibration:
    every = texts("train")
    return Calibration(domains=every, tokens=tokens if every else None, window=WINDOW, seed=seed)


def count_of(base: Checkpoint, share: float) -> int:
    count = round(base.shape.experts * share)
    return count - count % base.shape.groups


def profile_of(seed: int, setting: Setting, work: Path, model: Path | None = None) -> Profile:
    """The model's profile for a seed: made once in a folder, for both parts. Without `model` of the bench model."""
    folder = work / f"profile-{seed}"
    if not folder.exists():
        given = calibration(seed, setting.tokens)
        profile_stage(str(model or bench_model()), Output(folder=folder), given, Machine(), bit_losses=False)
    return load_profile(folder)


def repairs_of(
    plan: Plan, parts: frozenset[Repair], seed: int, setting: Setting, work: Path, model: Path | None = None
) -> Repairs:
    folder = work / "repair"
    work.mkdir(exist_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    given = calibration(seed, setting.repair_tokens)
    return repair_stage(str(model or bench_model()), Output(folder=folder), plan, parts, given, Machine())


def subject(label: str, source: Source, size: int = 0) -> Subject:
    return Subject(label=label, source=source, folder=None, stored_bytes=size, parameters=0)


def measured(
    base: Source, subjects: Sequence[Subject], setting: Setting, work: Path, model: Path | None = None
) -> Quality:
    """Quality on held-out text: of the original, which all others are paired with, and of the subjects."""
    corpus = load_evaluation(
        model or bench_model(),
        (),
        texts("test"),
        window=WINDOW,
        max_windows=setting.windows,
        vocabulary=base.config["vocab_size"],
    )
    every, limits = [subject("original", base), *subjects], Limits(memory_bytes=4 << 30, batch_windows=12)
    return measure(
        every, corpus, device=torch.device("cpu"), dtype=torch.float32, limits=limits, scratch_folder=work / "eval"
    )


def figures(found: Quality, label: str) -> dict[str, Any]:
    """One seed's row."""
    row = found.row(label, DOMAIN_MEAN)
    domains = {d: found.row(label, d).perplexity.value for d in found.domains}
    if row.paired is None:
        return {"perplexity": row.perplexity.value, "domains": domains}
    return {
        "perplexity": row.perplexity.value,
        "change": row.paired.perplexity_ratio.value - 1,
        "paired_error": row.paired.perplexity_ratio.error,
        "kl": row.paired.kl.value,
        "kl_by_domain": {d: p.kl.value for d in found.domains if (p := found.row(label, d).paired)},
        "domains": domains,
    }


def read_results(file: Path) -> dict[str, Any]:
    """All parts of the results file; none where there is no file."""
    return json.loads(file.read_text())["parts"] if file.exists() else {}


def over_seeds(
    part: str,
    function: SeedFunction,
    setting: Setting,
    work: Path,
    file: Path | None,
    jobs: int,
    model: str | None = None,
) -> dict[str, Any]:
    """A part's results of all seeds; a seed that is done is written, and not done again.

    Args:
        part: its name in the file.
        function: measures one seed.
        setting: results of another setting, or of another model, are not taken from the file.
        work: folder for what is made on the way.
        file: where results are kept; None: nowhere.
        jobs: processes at once; with one the seeds are measured in this process.
        model: what is measured, where it is not the bench model.
    """
    given, here = json.loads(json.dumps(asdict(setting))), machine() | ({"model": model} if model else {})
    before = read_results(file).get(part, {}) if file else {}
    same = before.get("setting") == given and before["machine"]["model"] == here["model"]
    seeds: dict[str, Any] = before["seeds"] if same else {}
    todo = [seed for seed in setting.seeds if str(seed) not in seeds]
    for seed, found in _each(function, todo, setting, work, jobs):
        seeds[str(seed)] = found
        print(f"{part}: seed {seed} done", flush=True)
        if file:
            write_part(file, part, {"machine": here, "window": WINDOW, "setting": given, "seeds": seeds})
    return seeds


def _each(
    function: SeedFunction, seeds: Sequence[int], setting: Setting, work: Path, jobs: int
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Seeds and what was found, as they come."""
    if jobs == 1:
        yield from ((seed, function(seed, setting, work)) for seed in seeds)
        return
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        waiting = {pool.submit(function, seed, setting, work): seed for seed in seeds}
        yield from ((waiting[done], done.result()) for done in as_completed(waiting))


def write_part(file: Path, part: str, found: Mapping[str, Any]) -> None:
    """Put a part into the results file; the others stay."""
    file.parent.mkdir(exist_ok=True)
    new = file.with_suffix(".new")
    new.write_text(json.dumps({"parts": {**read_results(file), part: found}}, indent=1) + "\n")
    new.replace(file)
