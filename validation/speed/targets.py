"""GPUs that people own, and whether a model fits into one."""

import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moepress.errors import InvalidInputError, UsageError
from moepress.runs.files import read_text
from moepress.runs.text import suggestion
from moepress.validation.speed.projection import Interval, Load, project, project_behind

TABLE = Path(__file__).with_name("targets.toml")
RESERVE = 0.15
"""Share of a card's memory that stays free beside weights and KV cache: activations, the runtime, the screen."""
TIGHT_RESERVE = 0.05
DEFAULT_CONTEXT = 8192
"""Tokens in the KV cache where none are named; fewer where the model's context is shorter."""
GIB = 1 << 30
Row = TypeVar("Row")


class Ram(BaseModel):
    """A machine's own memory, behind a card.

    Attributes:
        id: short name, such as ddr5-128.
        name: in words.
        memory_gib: of it.
        bandwidth_gb_per_second: theoretical, 10^9 bytes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str = Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")
    name: str = Field(min_length=1)
    memory_gib: float = Field(gt=0)
    bandwidth_gb_per_second: float = Field(gt=0)

    @property
    def memory_bytes(self) -> int:
        """All of it."""
        return round(self.memory_gib * GIB)


class Disk(BaseModel):
    """A disk behind that memory.

    Attributes:
        id: short name, such as nvme-4.
        name: in words.
        bandwidth_gb_per_second: of reading, as its maker says, 10^9 bytes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str = Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")
    name: str = Field(min_length=1)
    bandwidth_gb_per_second: float = Field(gt=0)


class Target(BaseModel):
    """One card, or one machine whose GPU shares the CPU's memory.

    Attributes:
        id: short name, such as rtx-4060-ti-16gb.
        name: as it is sold.
        kind: `gaming`; `unified` memory, the largest there is; or `reference`, a data-centre card.
        memory_gib: memory of the GPU.
        bandwidth_gb_per_second: of that memory, 10^9 bytes.
        fp16_tflops: tensor cores, dense, accumulating in fp32.
        pcie: generation and lanes, None where there is no bus in between.
        uncertain: `fp16_tflops` is less certain than the other figures.
        ram: memory behind it, which may hold experts.
        disk: behind that memory, from which experts are read that it does not hold.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str = Field(pattern=r"^[a-z0-9]+([-+][a-z0-9]+)*$")
    name: str = Field(min_length=1)
    kind: Literal["gaming", "unified", "reference"]
    memory_gib: float = Field(gt=0)
    bandwidth_gb_per_second: float = Field(gt=0)
    fp16_tflops: float = Field(gt=0)
    pcie: str | None = Field(default=None, pattern=r"^\d\.\d x\d+$")
    uncertain: bool = False
    ram: Ram | None = None
    disk: Disk | None = None

    @property
    def memory_bytes(self) -> int:
        """The GPU's memory."""
        return round(self.memory_gib * GIB)


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    target: tuple[Target, ...] = Field(min_length=1)
    ram: tuple[Ram, ...] = ()
    disk: tuple[Disk, ...] = ()


def load_targets(file: Path = TABLE) -> tuple[Target, ...]:
    """Read a table of GPUs, in its own order; raises as `_read_table`."""
    return _read_table(file).target


def _read_table(file: Path) -> _Table:
    """A table of GPUs, and of memory behind them.

    Raises:
        InvalidInputError: it cannot be read, is not TOML, a field is wrong, or two cards have the same id.
    """
    try:
        table = _Table.model_validate(tomllib.loads(read_text(file)))
    except OSError as error:
        remedy = "restore it" if file == TABLE else "give a TOML file with a [[target]] table for each GPU"
        raise InvalidInputError(f"Cannot read {file}: {error.strerror or error}; {remedy}.") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InvalidInputError(f"{file}: {where}: {' '.join(first['msg'].split())}; mend it.") from error
    except (ValueError, RecursionError) as error:
        raise InvalidInputError(f"{file} is not valid TOML ({' '.join(str(error).split())}); mend it.") from error
    ids = [target.id for target in table.target]
    twice = next((name for name in ids if ids.count(name) > 1), None)
    if twice is not None:
        raise InvalidInputError(f"{file} has two targets with the id {twice!r}; mend it.")
    return table


def all_targets(own: Path | None = None) -> tuple[Target, ...]:
    """The shipped table with a user's own rows: one with an id of the table takes that place, others come last.

    Raises:
        InvalidInputError: the file can not be used; see `load_targets`.
    """
    rows = {target.id: target for target in load_targets()}
    if own is not None:
        rows |= {target.id: target for target in load_targets(own)}
    return tuple(rows.values())


def target_of(name: str, own: Path | None = None) -> Target:
    """The GPU of that id, or with that name as shops write it, `RTX 4090`; several of it, `2xrtx-3090`, and with the
    machine's memory behind it, `rtx-4090+ddr5-128`, and a disk behind that, `rtx-4090+ddr5-128+nvme-4`.

    Raises:
        UsageError: there is none, or several cards are sold under that name; the message says which there are.
        InvalidInputError: the user's own file can not be used.
    """
    card, plus, behind = name.partition("+")
    if plus:
        memory, _, disk = behind.partition("+")
        if memory.strip() in all_disks(own):
            raise UsageError(f"--target {name}: a disk lies behind a machine's memory, as in rtx-4090+ddr5-128+nvme-4.")
        machine = _with_ram(target_of(card.strip(), own), memory.strip(), own)
        return _with_disk(machine, disk.strip(), own) if disk else machine
    several = re.fullmatch(r"(\d{1,2})\s*x\s*(.+)", name)
    targets = {target.id: target for target in all_targets(own)}
    if name in targets:
        return targets[name]
    if several is not None and int(several[1]) > 0:
        return _several(int(several[1]), target_of(several[2], own))
    asked = _plain(name)
    found = [t for t in targets.values() if asked in {_plain(t.id), _plain(t.name)}]
    sold = re.compile(re.escape(asked) + r"-(sxm|\d+gb)")  # what follows tells sizes apart, not cards
    found = found or [t for t in targets.values() if sold.fullmatch(_plain(t.id))]
    if len(found) == 1:
        return found[0]
    if found:
        raise UsageError(f"--target {name} may be {' or '.join(t.id for t in found)}; say which.")
    near = suggestion(name, targets)
    raise UsageError(f"--target {name} is not in the table{near}; it has {', '.join(targets)}.")


def _several(count: int, target: Target) -> Target:
    """So many of a card: their memory together, and the speed of one, since a token passes them one after the other."""
    return target.model_copy(
        update={
            "id": f"{count}x{target.id}",
            "name": f"{count} x {target.name}",
            "memory_gib": count * target.memory_gib,
        }
    )


def all_ram(own: Path | None = None) -> dict[str, Ram]:
    """Memory that may lie behind a card, by id; rows of the user's own take the place of those of the table.

    Raises:
        InvalidInputError: the user's table can not be used.
    """
    return {ram.id: ram for file in (TABLE, own) if file is not None for ram in _read_table(file).ram}


def _with_ram(target: Target, name: str, own: Path | None) -> Target:
    ram = _row_of(name, all_ram(own))
    if target.kind == "unified":
        raise UsageError(
            f"--target {target.id}+{ram.id}: {target.name} shares its memory with the CPU; leave +{ram.id} out."
        )
    return target.model_copy(
        update={"id": f"{target.id}+{ram.id}", "name": f"{target.name} with {ram.name}", "ram": ram}
    )


def all_disks(own: Path | None = None) -> dict[str, Disk]:
    """Disks that may lie behind a machine's memory, by id; raises as `all_ram`."""
    return {disk.id: disk for file in (TABLE, own) if file is not None for disk in _read_table(file).disk}


def _row_of(name: str, rows: Mapping[str, Row]) -> Row:
    """What a target names behind a `+`."""
    if name not in rows:
        raise UsageError(f"--target ...+{name} is not in the table{suggestion(name, rows)}; it has {', '.join(rows)}.")
    return rows[name]


def _with_disk(target: Target, name: str, own: Path | None) -> Target:
    disk = _row_of(name, all_disks(own))
    return target.model_copy(
        update={"id": f"{target.id}+{disk.id}", "name": f"{target.name} and {disk.name}", "disk": disk}
    )


def _plain(name: str) -> str:
    """A card's name without its maker, in the form of an id."""
    words = re.findall(r"[a-z0-9]+", name.lower())
    return "-".join(word for word in words if word not in {"nvidia", "geforce", "amd", "radeon", "intel"})


class Verdict(StrEnum):
    """Whether a model runs on a card alone."""

    FITS = "fits"
    TIGHT = "tight"
    NO = "no"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """One model of one size on one card.

    Attributes:
        target: the card's id.
        verdict: `fits` leaves `RESERVE` of the memory free, `tight` only `TIGHT_RESERVE`.
        left_bytes: memory beside weights and KV cache; negative where they alone are too much.
        lacking_bytes: how much memory more would make it `tight`; 0 where it is that already.
        pp512, tg128: projected tokens per second; None where it does not fit, or nobody asked.
        ram_layers: layers whose routed experts lie in the memory behind the card; 0 where all is on the card.
        ram_bytes: what those experts take there, and on the disk.
        disk_bytes: of that, what memory does not hold.
        cpu_moe: llama.cpp's `--n-cpu-moe`, which counts layers from the first, dense ones too.
    """

    target: str
    verdict: Verdict
    left_bytes: int
    lacking_bytes: int
    pp512: Interval | None = None
    tg128: Interval | None = None
    ram_layers: int = 0
    ram_bytes: int = 0
    disk_bytes: int = 0
    cpu_moe: int = 0


def fit(target: Target, needed_bytes: int, load: Load | None = None) -> Fit:
    """Hold weights and KV cache against a card's memory; with a load, project the speed where they fit."""
    left = target.memory_bytes - needed_bytes
    share = left / target.memory_bytes
    verdict = Verdict.FITS if share >= RESERVE else Verdict.TIGHT if share >= TIGHT_RESERVE else Verdict.NO
    lacking = 0 if verdict is not Verdict.NO else math.ceil(needed_bytes / (1 - TIGHT_RESERVE)) - target.memory_bytes
    pp512, tg128 = None, None
    if load is not None and verdict is not Verdict.NO:
        pp512, tg128 = project(load, bandwidth=1e9 * target.bandwidth_gb_per_second, flops=1e12 * target.fp16_tflops)
    alone = Fit(target=target.id, verdict=verdict, left_bytes=left, lacking_bytes=lacking, pp512=pp512, tg128=tg128)
    if verdict is not Verdict.NO or target.ram is None or load is None or not load.expert_layers:
        return alone
    return _behind(target, target.ram, needed_bytes, load) or alone


def _behind(target: Target, ram: Ram, needed_bytes: int, load: Load) -> Fit | None:
    """The experts of some layers in the memory behind the card; None where that is not enough either.

    All else and the KV cache stay on the card, as llama.cpp's `--n-cpu-moe` has it. With a disk there is always room:
    llama.cpp maps the file, and the system keeps in memory what is used most.
    """
    room = target.memory_bytes * (1 - RESERVE) - (needed_bytes - load.routed_bytes)
    layers = len(load.expert_layers)
    layer = load.routed_bytes / layers
    on_card = math.floor(room / layer)
    moved = layers - max(0, on_card)
    ram_bytes = math.ceil(moved * layer)
    over = max(0, math.ceil(ram_bytes - ram.memory_bytes * (1 - RESERVE)))
    if room < 0 or (over and target.disk is None):
        return None
    tg128 = project_behind(
        load,
        bandwidth=1e9 * target.bandwidth_gb_per_second,
        ram_bandwidth=1e9 * ram.bandwidth_gb_per_second,
        share=moved / layers,
        disk_bandwidth=0.0 if target.disk is None else 1e9 * target.disk.bandwidth_gb_per_second,
        held=1 - over / max(1, ram_bytes),
    )
    left = round(target.memory_bytes - (needed_bytes - ram_bytes))
    return Fit(
        target=target.id,
        verdict=Verdict.TIGHT if over else Verdict.FITS,
        left_bytes=left,
        lacking_bytes=0,
        tg128=tg128,
        ram_layers=moved,
        ram_bytes=ram_bytes,
        disk_bytes=over,
        cpu_moe=load.expert_layers[moved - 1] + 1,
    )


def offload_options(found: Fit) -> str:
    """llama.cpp's options for a fit; empty where all is on the card."""
    return f"-ngl 999 --n-cpu-moe {found.cpu_moe}" if found.ram_layers else ""


def gaming(targets: Sequence[Target]) -> tuple[Target, ...]:
    """The cards that a person has at home, the largest memory last."""
    return tuple(sorted((t for t in targets if t.kind == "gaming"), key=lambda t: t.memory_gib))
