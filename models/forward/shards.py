"""A shard of windows as a file: hidden states, and what reaches the experts of the layer that is gone through."""

from collections.abc import Mapping

import torch
from torch import Tensor

from moepress.models.forward.walk import Stream
from moepress.models.storage.safetensors_file import Stored
from moepress.models.storage.tensors import read_row, read_tensor, tensor_entry
from moepress.models.storage.writer import Entry

_ROUTED = ("inputs", "chosen", "weights", "logits")


def shard_file(shard: int) -> str:
    """A shard's states, by the name that tasks give to it."""
    return f"shard-{shard:05d}.safetensors"


def hidden_entries(stream: Stream, shard: range, name: str) -> list[Entry]:
    """Hidden states of some windows, and what layers hand on besides; as `Stream.kept`, of a part."""
    rows = slice(shard.start, shard.stop)
    entries = [tensor_entry(name, stream.hidden[rows])]
    if stream.form:
        entries.append(tensor_entry(f"{name}.form", torch.tensor([stream.form])))
        entries += [tensor_entry(f"{name}.{place}", state[rows]) for place, state in sorted(stream.states.items())]
    return entries


def fill_hidden(stream: Stream, shard: range, stored: Mapping[str, Stored], name: str) -> None:
    """The inverse of `hidden_entries`, into a stream of at least these windows."""
    entry = stored[name]
    for place, window in enumerate(shard):
        stream.hidden[window] = read_row(entry, place)
        stream.touch(stream.hidden.shape[1])
    form = stored.get(f"{name}.form")
    stream.form = 0 if form is None else int(read_tensor(form))
    for place in range(1, stream.form):
        if (state := stored.get(f"{name}.{place}")) is not None:
            value = read_tensor(state)
            if place not in stream.states:
                stream.states[place] = torch.empty((len(stream.hidden), *value.shape[1:]), dtype=value.dtype)
            stream.states[place][shard.start : shard.stop] = value


def routed_entries(stream: Stream, shard: range, name: str) -> list[Entry]:
    """What reaches the experts from some windows."""
    rows = _rows(stream, shard)
    return [tensor_entry(f"{name}.{key}", table[rows]) for key, table in _tables(stream).items()]


def fill_routed(stream: Stream, shard: range, stored: Mapping[str, Stored], name: str) -> None:
    """The inverse of `routed_entries`."""
    rows = _rows(stream, shard)
    for key, table in _tables(stream).items():
        table[rows] = read_tensor(stored[f"{name}.{key}"])
    stream.touch(rows.stop - rows.start)


def _tables(stream: Stream) -> dict[str, Tensor]:
    found = {key: getattr(stream, key) for key in _ROUTED}
    return {key: table for key, table in found.items() if table is not None}


def _rows(stream: Stream, shard: range) -> slice:
    length = stream.hidden.shape[1]
    return slice(shard.start * length, shard.stop * length)
