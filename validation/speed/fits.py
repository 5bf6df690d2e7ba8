"""The report's section on GPUs: which one holds the measured models, and how fast they would be there.

All of it is projected, but where this machine has such a GPU: there its measured speeds stand beside.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict

from moepress.converters.safetensors.artifact import Artifact
from moepress.models.families.family import Part, part_of
from moepress.models.forward.inventory import Weight, cache_bytes
from moepress.models.storage.checkpoint import Checkpoint, Source
from moepress.validation.quality.measure import Elsewhere
from moepress.validation.quality.results import Throughput
from moepress.validation.speed.projection import FORMULAS, load_of
from moepress.validation.speed.results import SubjectLoad, TargetFit, Targets
from moepress.validation.speed.target_here import speed_checks
from moepress.validation.speed.targets import DEFAULT_CONTEXT, RESERVE, TIGHT_RESERVE, Target, fit


def fits_section(
    subjects: Iterable[tuple[str, Source | Elsewhere]],
    targets: Sequence[Target],
    context: int | None = None,
    *,
    here: Target | None = None,
    throughput: Throughput | None = None,
    chosen: str | None = None,
) -> Targets | None:
    """Every folder of safetensors on every GPU; what other programs run is left out.

    Args:
        subjects: label and opened folder; what is in memory only is left out too.
        targets: the GPUs.
        context: tokens in the KV cache; None for 8192, or the shortest context of the models.
        here: this machine's GPU, if it is one of them.
        throughput: measured on this machine.
        chosen: id of the GPU that the user aims at, one of the targets.

    Returns:
        None where there is no such folder.
    """
    folders = [(label, source) for label, source in subjects if isinstance(source, Checkpoint | Artifact)]
    if not folders:
        return None
    longest = min(source.outline.shape.context for _, source in folders)
    tokens = context or min(DEFAULT_CONTEXT, longest)
    loads = tuple(_load(label, source, tokens) for label, source in folders)
    rows = tuple(_row(target, subject) for subject in loads for target in targets)
    return Targets(
        context=tokens,
        reserve=RESERVE,
        tight_reserve=TIGHT_RESERVE,
        projection=FORMULAS,
        loads=loads,
        table=tuple(targets),
        rows=rows,
        measured=speed_checks(throughput, here, rows) if throughput is not None and here is not None else (),
        chosen=chosen,
    )


def weights_of(source: Checkpoint | Artifact) -> dict[Part, Weight]:
    """Parameters, dense, and stored bytes of every part; codes and scales belong to the part of their matrix."""
    layers = source.outline.shape.layers
    parameters, sizes = dict.fromkeys(Part, 0), dict.fromkeys(Part, 0)
    for name, entry in source.stored.items():
        sizes[part_of(source.family, name, layers)] += entry.bytes
    for name, shape in source.shapes.items():
        parameters[part_of(source.family, name, layers)] += math.prod(shape)
    return {part: Weight(parameters=parameters[part], bytes=sizes[part]) for part in Part if sizes[part]}


def _load(label: str, source: Checkpoint | Artifact, tokens: int) -> SubjectLoad:
    shape = source.outline.shape
    return SubjectLoad(
        subject=label,
        weight_bytes=source.total_bytes,
        cache_bytes=cache_bytes(source.config, tokens),
        load=load_of(weights_of(source), shape, cache_bytes(source.config, 1), source.outline.moe_layers),
    )


def _row(target: Target, subject: SubjectLoad) -> TargetFit:
    needed = subject.weight_bytes + subject.cache_bytes
    found = asdict(fit(target, needed, subject.load))
    return TargetFit(
        subject=subject.subject, name=target.name, memory_bytes=target.memory_bytes, needed_bytes=needed, **found
    )
