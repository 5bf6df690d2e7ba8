"""Folders spoiled at random, and what is said of them: a sentence of ours, in time."""

import json
import math
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from mutations import json_text, mutate, not_a_file, spoiled_bytes, spoiled_header

from moepress.commands.console import quiet_libraries
from moepress.errors import MoepressError
from moepress.runs.text import LONGEST, message
from moepress.validation.rules.check import check_folder
from moepress.validation.rules.findings import parse_runtimes

SECONDS = 30  # none of this takes longer than a hang
Spoiler = Callable[[Path, random.Random], None]


class HangError(Exception):
    """It took too long."""


@contextmanager
def in_time(seconds: int) -> Iterator[None]:
    def late(_number: int, _frame: FrameType | None) -> None:
        raise HangError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(work: Callable[[], object]) -> str | None:
    """What is said, None where all went well; anything but an error of ours is raised.

    The libraries below are as quiet as the command line has them: they would print what a file says as it stands.
    """
    quiet_libraries()
    try:
        with in_time(SECONDS):
            work()
    except MoepressError as error:
        said = message(str(error))
        assert said.strip()
        assert "\x1b" not in said
        assert len(said) <= LONGEST + 100
        said.encode()
        return said
    return None


def checked(folder: Path) -> None:
    """Held against the rules of every runtime."""
    check_folder(folder, parse_runtimes(None))


def spoil_json(name: str) -> Spoiler:
    def spoil(folder: Path, draw: random.Random) -> None:
        file = folder / name
        if draw.random() < 0.03:
            not_a_file(file, draw)
            return
        file.write_bytes(json_text(mutate(json.loads(file.read_bytes()), draw), draw))

    return spoil


def spoil_quantization(folder: Path, draw: random.Random) -> None:
    """What the config says of the codes; more often than a config of many keys would have it changed."""
    file = folder / "config.json"
    config = json.loads(file.read_bytes())
    config["quantization_config"] = mutate(config["quantization_config"], draw)
    file.write_bytes(json_text(config, draw))


def spoil_records(folder: Path, draw: random.Random) -> None:
    """Each of them, so that JSON stays."""
    file = folder / "records.json"
    file.write_text(json.dumps([mutate(row, draw) for row in json.loads(file.read_bytes())]))


def spoil_types(folder: Path, draw: random.Random) -> None:
    """A header that is sound but for one tensor's dtype, shape or name: other readers' bytes under our names."""
    file = draw.choice(sorted(folder.glob("*.safetensors")))
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    name = draw.choice([key for key in header if key != "__metadata__"])
    entry = header.pop(name)
    size, kind = entry["data_offsets"][1] - entry["data_offsets"][0], draw.randrange(3)
    if kind < 2:
        dtype, width = draw.choice(
            (("U8", 1), ("F8_E4M3", 1), ("I16", 2), ("F16", 2), ("F32", 4), ("I32", 4), ("I64", 8))
        )
        if kind == 0 or size % width:
            dtype, width = entry["dtype"], max(size // max(math.prod(entry["shape"]), 1), 1)
        count = size // width
        shapes = ([count], [1, count], [count, 1], [1, 1, count], [count // 2, 2] if count % 2 == 0 else [count])
        entry |= {"dtype": dtype, "shape": draw.choice(shapes)}
    text = json.dumps(header | {name if kind < 2 else f"{name}.{draw.choice('abc')}": entry}).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def spoil_shard(folder: Path, draw: random.Random) -> None:
    file = draw.choice(sorted(folder.glob("*.safetensors")))
    if draw.random() < 0.05:
        not_a_file(file, draw)
        return
    raw = file.read_bytes()
    file.write_bytes(spoiled_header(raw, draw) if draw.random() < 0.8 else spoiled_bytes(raw, draw))
