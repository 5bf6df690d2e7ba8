"""What `calibration.ends` gathers for a run of `quantize`, and how its layers take it."""

from collections.abc import Iterable

import torch
from torch import Tensor

from moepress.calibration.ends import Groups, read_side
from moepress.calibration.hessian import END_BITS
from moepress.compress.gptq.coded import QuantizeOptions
from moepress.compress.gptq.include import Include, LinearGroup, linear_groups
from moepress.compress.gptq.job import Job
from moepress.compress.gptq.sides import floored
from moepress.compress.gptq.two_sided import Side
from moepress.models.storage.checkpoint import Source


def end_groups(source: Source, layers: int, options: QuantizeOptions, include: Iterable[Include]) -> Groups:
    """The Linears whose factors are wanted: those that get few bits."""
    include, by_layer = list(include), source.outline.names_by_layer
    return {
        layer: [
            group.names
            for group in linear_groups(source, layer, layers, include, by_layer.get(layer, []))
            if _few(options.of_layer(layer), source, layer, group)
        ]
        for layer in range(layers)
    }


def _few(options: QuantizeOptions, source: Source, layer: int, group: LinearGroup) -> bool:
    bits = options.of_part(group.part).scheme.bits
    if options.blocks is not None:
        kinds = [options.kind_of(name, layer, source.shapes[name][1]) for name in group.names]
        bits = min(kind.bits for kind in kinds if kind is not None)
    return bits < END_BITS


def side_of(job: Job, layer: int, group: LinearGroup) -> Side | None:
    """B of a group of Linears of a layer, on the solver's device."""
    found = read_side(job.run, layer, group.names[0])
    return None if found is None else floored(found, job.options.hessian.end_floor, job.stream.model.solver_device)


def metric_of(job: Job, layer: int) -> Tensor | None:
    """What errors of the sum of a layer's experts cost, fp32 [D, D] on the device; None where they get many bits."""
    if job.options.blocks is None and job.options.of_layer(layer).scheme.bits >= END_BITS:
        return None
    found = read_side(job.run, layer)
    return None if found is None else found[0].to(job.stream.model.device, torch.float32)
