"""How matrices are quantized, and what comes of it: codes and scales, or blocks."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from moepress.calibration.hessian import HessianOptions
from moepress.compress.gptq.block_choice import BlockChoice
from moepress.compress.gptq.block_solver import BlockCoded
from moepress.compress.gptq.options import SolverOptions
from moepress.converters.safetensors import floats
from moepress.converters.safetensors.artifact import dense
from moepress.converters.safetensors.scheme import Scheme
from moepress.models.families.family import Part
from moepress.models.forward.streamed import StreamedModel
from moepress.models.storage.block_types import BlockType
from moepress.models.storage.experts import Expert


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeOptions:
    """How matrices are quantized.

    Attributes:
        scheme: bits, group size and what codes are.
        scale_dtype: dtype the scales of integers are rounded to before codes are chosen.
        stored_dtype: dtype they are stored in, the model's.
        hessian: how tokens are weighed.
        solver: options of the GPTQ solver.
        layer_bits: layer -> bits, of the layers that do not have the scheme's.
        part_bits: of the parts besides the routed experts that have bits of their own, whatever their layer's are.
        blocks: GGUF's types, in the place of the scheme; None for the scheme.
    """

    scheme: Scheme
    scale_dtype: torch.dtype
    stored_dtype: torch.dtype
    hessian: HessianOptions = field(default_factory=HessianOptions)
    solver: SolverOptions = field(default_factory=SolverOptions)
    layer_bits: Mapping[int, int] = field(default_factory=dict)
    part_bits: Mapping[Part, int] = field(default_factory=dict)
    blocks: BlockChoice | None = None

    def kind_of(self, name: str, layer: int | None, columns: int) -> BlockType | None:
        """The block type of a matrix by its name on disk; None where it gets codes by the scheme."""
        return None if self.blocks is None else self.blocks.of(name, layer, columns)

    def scheme_of(self, layer: int | None, part: Part = Part.ROUTED) -> Scheme:
        """The scheme of a part's matrices in a layer, or of those outside of the layers."""
        bits = self.scheme.bits if layer is None else self.layer_bits.get(layer, self.scheme.bits)
        return self.scheme.of_bits(self.part_bits.get(part, bits))

    def of_layer(self, layer: int) -> "QuantizeOptions":
        """The same, with that layer's scheme."""
        return replace(self, scheme=self.scheme_of(layer), layer_bits={})

    def of_part(self, part: Part) -> "QuantizeOptions":
        """The same, with that part's scheme."""
        return replace(self, scheme=self.scheme_of(None, part))


@dataclass(frozen=True, slots=True, kw_only=True)
class Coded:
    """A quantized matrix of integers, on the CPU: codes int8 [O, I], scales [O, G] in the dtype they are stored in;
    zero points int16 [O, G] where it has some."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None

    def dense(self, device: torch.device | None = None) -> Tensor:
        """What it stands for, [O, I], in the scales' dtype, computed on that device."""
        zeros = None if self.zeros is None else self.zeros.to(device)
        return dense(self.codes.to(device), self.scales.to(device), zeros)

    def rows(self, rows: slice) -> "Coded":
        """Some of its rows."""
        zeros = None if self.zeros is None else self.zeros[rows]
        return Coded(codes=self.codes[rows], scales=self.scales[rows], zeros=zeros)


@dataclass(frozen=True, slots=True, kw_only=True)
class FloatCoded:
    """A quantized matrix of 4-bit floats, on the CPU.

    Attributes:
        codes: int8 [O, I], 0 to 15.
        scales: fp32 [O, G], as they are stored.
        divisor: what scales are divided by, of the whole matrix and those that were solved with it; or None.
    """

    codes: Tensor
    scales: Tensor
    divisor: Tensor | None = None

    def dense(self, device: torch.device | None = None) -> Tensor:
        """What it stands for, [O, I] bf16, computed on that device."""
        scales = self.scales if self.divisor is None else self.scales / self.divisor
        return floats.dense(self.codes.to(device), scales.to(device))

    def rows(self, rows: slice) -> "FloatCoded":
        """Some of its rows."""
        return replace(self, codes=self.codes[rows], scales=self.scales[rows])


Matrix = Coded | FloatCoded | BlockCoded


@dataclass(frozen=True, slots=True, kw_only=True)
class CodedExpert:
    """One quantized expert and what is known of its error.

    Attributes:
        gate, up, down: the matrices; `gate` is None where experts have none.
        biases: by their names in `Expert`, as they are in the original.
        tokens: calibration tokens that reached it.
        error: relative output error of gate/up and of down on its Hessians, ||(W - Q) X||^2 / ||W X||^2; W is the
            original matrix, whatever the codes were to meet.
        rounded: a Hessian could not be factorised and the matrix was rounded to nearest.
        middle: what the quantized gate and up give its tokens [T, F], in the compute dtype on the device; None where it
            was not kept.
    """

    gate: Matrix | None
    up: Matrix
    down: Matrix
    tokens: int
    error: tuple[float, float]
    rounded: bool
    middle: Tensor | None = None
    biases: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """Gate (where there is one), up and down."""
        return tuple(matrix for matrix in (self.gate, self.up, self.down) if matrix is not None)

    def expert(self, model: StreamedModel) -> Expert:
        """Dequantized, on the model's device, in its compute dtype; without gate and up where `middle` was kept."""
        if self.middle is None:
            return self.dense(model.device).to(model.device, model.dtype)
        down = Expert(gate=None, up=torch.empty(0), down=self.down.dense(model.device), **self.biases)
        return down.to(model.device, model.dtype)

    def dense(self, device: torch.device | None = None) -> Expert:
        """What the codes stand for, computed on that device."""
        gate = None if self.gate is None else self.gate.dense(device)
        return Expert(gate=gate, up=self.up.dense(device), down=self.down.dense(device), **self.biases)


def biases_of(expert: Expert, stored: torch.dtype) -> dict[str, Tensor]:
    """Those that an expert has, by their names in `Expert`, as they are stored."""
    found = {name: getattr(expert, name) for name in BIASES}
    return {name: value.to("cpu", stored) for name, value in found.items() if value is not None}


BIASES = ("gate_bias", "up_bias", "down_bias")
