"""Files spoiled at random, the way downloads, editors, other tools and ill will spoil them. All of a seed."""

import copy
import json
import os
import random
import socket
from pathlib import Path
from typing import Any

HUGE = 10**400
NASTY: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 0.5, -0.0, 1e308, float("nan"), float("inf"), float("-inf")),
    *(2**31 - 1, 2**31, 2**63, 2**64, -(2**63), HUGE, 10**12),
    *("", " ", "0", "8", "-1", "1e9", "true", "auto", "a" * 5000, "\x1b]0;owned\x07", "two\nlines", "\ud800", "\x00"),
    *("../../etc/passwd", "/etc/passwd", "C:\\x", "con", ".", "..", "float16", "fp8", "re:(a+)+$", "Linear", "%s{0}"),
    *([], {}, [None], [1], [[1]], [1, 2, 3], ["x"], {"x": 1}, {"": None}, {"a": {"b": []}}),
)


def nested(depth: int) -> Any:
    """Lists within lists."""
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values in plain JSON, the whole one's first."""
    found = [path]
    if isinstance(value, dict):
        for key, inner in value.items():
            found += places(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value[:6]):
            found += places(inner, (*path, index))
    return found


def mutate(value: Any, draw: random.Random) -> Any:
    """Plain JSON with one to three values replaced, removed, doubled or put elsewhere."""
    value = copy.deepcopy(value)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        path = draw.choice(places(value))
        if not path:
            if draw.random() < 0.05:
                return draw.choice(NASTY)
            continue
        holder = value
        for step in path[:-1]:
            holder = holder[step]
        _spoil(holder, path[-1], draw)
    return value


def _spoil(holder: Any, key: Any, draw: random.Random) -> None:
    kind = draw.randrange(8)
    old = holder[key]
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(old, int | float) and not isinstance(old, bool) and abs(old) < 1e300:
        holder[key] = draw.choice((old + 1, old - 1, -old, old * 2, old * 1000, str(old), float(old), [old], 0))
    elif kind == 2 and isinstance(old, list):
        holder[key] = draw.choice((old + old, old[:-1], old[::-1], [old], old[:1] * 5000))
    elif kind == 3 and isinstance(old, str):
        holder[key] = draw.choice(
            (old.upper(), old[:-1], old + old, f" {old}", list(old), old.encode("utf-8", "surrogatepass").hex())
        )
    elif kind == 4 and isinstance(old, dict) and old:
        chosen = draw.choice(list(old))
        old[draw.choice(("x", "", chosen + "x", chosen.upper(), "\x1b[2J", "../" + chosen))] = old.pop(chosen)
    elif kind == 5:
        holder[key] = nested(draw.choice((3, 100, 250)))  # three of these one in another are still encoded
    else:
        holder[key] = copy.deepcopy(draw.choice(NASTY))


def json_text(value: Any, draw: random.Random) -> bytes:
    """As JSON, mostly; sometimes with a key twice, too deep, with NaN, a byte order mark, or cut off."""
    text = json.dumps(value, indent=draw.choice((None, 2)))
    kind = draw.randrange(30)
    if kind == 0 and isinstance(value, dict) and value:
        key = draw.choice(list(value))
        text = "{" + f"{json.dumps(key)}: null, " + text.lstrip()[1:]
    elif kind == 1:
        text = "[" * 100_000 + text
    raw = text.encode("utf-8", "surrogatepass")
    if kind == 2:
        return b"\xef\xbb\xbf" + raw
    if kind == 3:
        return raw[: draw.randrange(len(raw) + 1)]
    return spoiled_bytes(raw, draw) if kind == 4 else raw


def spoiled_bytes(raw: bytes, draw: random.Random) -> bytes:
    """Some bytes changed, put in, taken out, or the end cut off or made longer."""
    data = bytearray(raw)
    for _ in range(draw.choice((1, 1, 2, 8))):
        at = draw.randrange(len(data) + 1)
        kind = draw.randrange(6)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            data[at:at] = draw.randbytes(draw.choice((1, 8, 64)))
        elif kind == 2:
            del data[at : at + draw.choice((1, 8, 4096))]
        elif kind == 3:
            del data[at:]
        elif kind == 4:
            data += draw.randbytes(draw.choice((1, 7, 4096)))
        elif at < len(data):
            data[at : at + 8] = draw.choice((b"\x00" * 8, b"\xff" * 8, (2**62).to_bytes(8, "little")))
    return bytes(data)


def spoiled_header(raw: bytes, draw: random.Random) -> bytes:
    """A safetensors file whose header was changed as JSON, with a length that fits it or does not."""
    length = int.from_bytes(raw[:8], "little")
    header, body = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    text = json_text(mutate(header, draw), draw)
    stated = len(text) if draw.random() < 0.9 else draw.choice((0, len(text) - 1, len(text) + 1, 2**40, 2**63))
    return max(stated, 0).to_bytes(8, "little") + text + body


def not_a_file(file: Path, draw: random.Random) -> None:
    """Something else under a file's name: nothing, a folder, a link that leads out or nowhere, a FIFO, a socket."""
    file.unlink()
    kind = draw.randrange(7)
    if kind == 0:
        return
    if kind == 1:
        file.mkdir()
    elif kind == 2:
        file.symlink_to("/etc/hostname")
    elif kind == 3:
        file.symlink_to(file.with_name("nowhere"))
    elif kind == 4:
        os.mkfifo(file)
    elif kind == 5:
        file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n")
    else:
        here, folder = Path.cwd(), file.parent
        os.chdir(folder)  # the name of a socket has a hundred letters at most
        try:
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(file.name)
        finally:
            os.chdir(here)
