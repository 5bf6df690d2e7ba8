"""The documents' code blocks and the commands in them, for the tests that hold or run these."""

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").rglob("*.md")])
FENCE = re.compile(r"^( *)```([^\n]*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)


def name_of(document: Path) -> str:
    return document.relative_to(ROOT).as_posix()


def blocks(text: str, language: str | None = None) -> Iterator[str]:
    """What stands in code fences, of one language where it is named, with continued lines joined."""
    for found in FENCE.finditer(text):
        if language is None or found[2].strip() == language:
            yield re.sub(r"\\\n\s*", " ", found[3])


def commands_of(block: str) -> Iterator[str]:
    """The `moepress ...` commands of a code block, without prompts, comments, pipes and redirections."""
    for line in block.splitlines():
        line = line.strip().removeprefix("$ ")
        for part in re.split(r"\s(?:&&|\|\|?|;)\s", line):
            part = re.sub(r"^(?:\S*/)?moepress(?=\s|$)", "moepress", part.strip())
            if part == "moepress" or part.startswith("moepress "):
                yield re.split(r"\s\d?(?:>>?|<)\s?", part)[0]
