"""Runs of `quantize` that several workers share: planned by the command, done in turns within this process.

A worker of these is one of `moepress work` with its own model, desk and leases. Whose turn it is, is drawn: so orders
occur that real processes would need many runs for, and each is repeated by its seed.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from stage_runs import add_tokenizer, command, content

from moepress.models.forward import walk
from moepress.runs.store.store import open_store
from moepress.runs.work.desk import Desk
from moepress.runs.work.leases import Leases
from moepress.runs.work.shared import Shared, open_shared
from moepress.runs.work.worker import Worker
from moepress.stages.places import Machine
from moepress.stages.work import reopened

TOKENS = ("--tokens", "768", "--window", "16")


def text_of(folder: Path, letters: int = 3000) -> list[str]:
    """Options of a calibration text of two domains, which is written into a folder."""
    draw = random.Random(0)
    for name in ("one", "two"):
        (folder / f"{name}.txt").write_text("".join(draw.choices("abcdefgh ABCDEFGH.,;", k=letters)))
    return ["--domain", f"one={folder / 'one.txt'}", "--domain", f"two={folder / 'two.txt'}", *TOKENS]


def with_tokenizer(folder: Path) -> Path:
    """A model's folder with a tokenizer of bytes, for the commands."""
    if not (folder / "tokenizer.json").exists():
        add_tokenizer(folder)
    return folder


def moepress(*arguments: object) -> str:
    """A command that must succeed; what it prints."""
    code, printed, errors = command(*arguments)
    assert code == 0, errors
    return printed


@dataclass(slots=True, kw_only=True)
class Hand:
    """A worker that does one task when told to."""

    worker: Worker
    shared: Shared

    def turn(self, tasks: int = 1) -> int:
        """Do so many tasks, or those that there are; how many were done."""
        before = len(self.worker.did)
        looks = iter(range(tasks * 50))
        self.worker.work(lambda *_: None, lambda: len(self.worker.did) - before >= tasks or next(looks, None) is None)
        return len(self.worker.did) - before

    @property
    def finished(self) -> bool:
        return len(self.shared.look()) == len(self.shared.tasks)


@contextmanager
def hands(store: Path | str, folder: Path, count: int, *, term_seconds: float = 60.0) -> Iterator[list[Hand]]:
    """So many workers of a planned run."""
    with ExitStack() as stack:
        made = []
        for number in range(count):
            shared = open_shared(open_store(str(store)))
            machine = Machine()
            stage = reopened(shared, machine)
            desk = Desk(shared, folder / f"desk-{number}", 1 << 30)
            performer = stage.performer(shared, machine, desk)
            stack.callback(performer.forget)
            leases = stack.enter_context(Leases(shared.store, f"hand-{number}", term_seconds))
            worker = Worker(shared=shared, leases=leases, desk=desk, perform=performer, share=(number, count))
            made.append(Hand(worker=worker, shared=shared))
        yield made


def in_turns(store: Path | str, folder: Path, count: int, seed: int = 0) -> list[list[str]]:
    """A run done by so many workers, of whom one at a time does a task; which tasks each did."""
    draw = random.Random(seed)
    with hands(store, folder, count) as all_hands:
        while not all_hands[0].finished:
            draw.choice(all_hands).turn()
        return [list(hand.worker.did) for hand in all_hands]


def both(model: Path | str, place: Path, options: Sequence[object], count: int, seed: int = 0) -> list[list[str]]:
    """The plain run and the shared one, which must be the same folder byte for byte; who did what."""
    moepress("quantize", model, *options, "-o", place / "plain")
    moepress("plan-work", model, "--store", place / "store", *options)
    did = in_turns(place / "store", place, count, seed)
    moepress("work", "--store", place / "store", "-o", place / "shared")
    assert_same(place / "shared", place / "plain")
    return did


def assert_same(one: Path, other: Path) -> None:
    """The same files with the same bytes, named where they are not."""
    first, second = content(one), content(other)
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []


def small_shards(monkeypatch: pytest.MonkeyPatch, tokens: int = 256) -> None:
    """Shards of so many tokens, so that a small text has several."""
    monkeypatch.setattr(walk, "_SHARD_TOKENS", tokens)
