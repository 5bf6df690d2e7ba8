"""The report as data: what report.json holds. Measured rows are those of `moepress.validation.results`, unchanged."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

from moepress.validation.results import ALL_WINDOWS, Quality, QualityRow, Throughput
from moepress.validation.thresholds import Outcome

SCHEMA_VERSION: Literal["1.0"] = "1.0"


class _Section(BaseModel):
    """Read-only; unknown keys are refused; infinities are written as strings, which JSON can hold."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class SubjectInfo(_Section):
    """One model of the report.

    Attributes:
        label: as in the rows.
        folder: name of its folder, without the path; None: it was only in memory.
        stored_bytes: size of its weights on disk.
        parameters: weights when dense; 0 where nobody knows.
        experts_per_layer: routed experts in each MoE layer; (fewest, most) where layers differ.
        bits: stored bits per weight, over all weights, scales included.
        onnx: it is an ONNX folder.
    """

    label: str
    folder: str | None = None
    stored_bytes: int
    parameters: int
    experts_per_layer: int | tuple[int, int] | None = None
    bits: float | None = None
    onnx: bool = False


class DomainLoss(_Section):
    """What the removed experts had carried in one calibration domain, as shares (0 to 1) of all routed experts.

    Attributes:
        domain: its name.
        gate_mass_lost: of the sum of combine weights.
        reap_mass_lost: of the sum of combine weight times output norm (`reap-sum`).
    """

    domain: str
    gate_mass_lost: float
    reap_mass_lost: float


class Pruning(_Section):
    """Which experts were removed, and why.

    Attributes:
        criterion: its name.
        kept: experts kept in each layer.
        total: experts that each layer had.
        domains: loss in each calibration domain.
        keep_set_stability: share of kept experts (0 to 1) that two halves of the calibration tokens agree on.
    """

    criterion: str
    kept: int
    total: int
    domains: tuple[DomainLoss, ...] = ()
    keep_set_stability: float | None = None


class LayerError(_Section):
    """Mean relative error of a layer's quantized matrices, |(W - Wq) X| / |W X|."""

    layer: int
    mean_relative_error: float


class ExpertName(_Section):
    """One routed expert by its layer and its number."""

    layer: int
    expert: int


class Quantization(_Section):
    """How the weights were quantized.

    Attributes:
        scheme: in words, for example `4 bits, groups of 128, symmetric`.
        layers: errors by layer.
        fallback_experts: rounded to nearest because the solver failed on them.
        unsupported_experts: with too few calibration tokens of their own.
    """

    scheme: str
    layers: tuple[LayerError, ...] = ()
    fallback_experts: tuple[ExpertName, ...] = ()
    unsupported_experts: tuple[ExpertName, ...] = ()


class Calibration(_Section):
    """The text that decisions were based on.

    Attributes:
        sources: files, folders or datasets.
        embedded: whether any of it is the default text that comes with moepress.
        domains: names.
        tokens: how many.
        seed: that chose them.
        digest: SHA-256 of the windows.
    """

    sources: tuple[str, ...]
    embedded: bool
    domains: tuple[str, ...] = ()
    tokens: int
    seed: int | None = None
    digest: str | None = None


class Environment(_Section):
    """Where it ran: package to version, device, processor."""

    versions: dict[str, str]
    device: str
    cpus: int | None
    platform: str


class Report(_Section):
    """Everything that `report.json`, `report.md` and `report.html` show.

    Attributes:
        created: ISO 8601 time with its zone.
        title: the model's name.
        subjects: in the order of the rows; the first one is the reference.
        quality: of all subjects.
        recipe: the recipe file's text.
        commands: that reproduce the result.
        notes: warnings that the reader must see.
    """

    schema_version: Literal["1.0"] = SCHEMA_VERSION
    tool_version: str | None = None
    created: str | None = None
    title: str | None = None
    subjects: tuple[SubjectInfo, ...]
    quality: Quality
    throughput: Throughput | None = None
    thresholds: tuple[Outcome, ...] = ()
    pruning: Pruning | None = None
    quantization: Quantization | None = None
    calibration: Calibration | None = None
    notes: tuple[str, ...] = ()
    environment: Environment | None = None
    commands: tuple[str, ...] = ()
    recipe: str | None = None

    def overall(self, label: str) -> QualityRow:
        """A subject's row over all windows."""
        return self.quality.row(label, ALL_WINDOWS)
