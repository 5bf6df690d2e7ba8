"""Processes that a benchmark watches: their memory, and workers that stay alive and are asked in turn."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

FIELDS = ("VmHWM", "VmRSS", "RssAnon", "RssFile")


def memory_mib(pid: int | None = None) -> dict[str, float]:
    """The kernel's figures for a process (this one by default) in MiB; nothing once it has ended.

    VmHWM is the peak of VmRSS, what is resident. RssAnon is the part that belongs to the process alone; pages of mapped
    files (RssFile) can be dropped and shared.
    """
    try:
        lines = Path(f"/proc/{pid or 'self'}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    found = {line.split(":")[0]: line.split() for line in lines}
    return {name: int(found[name][1]) / 1024 for name in FIELDS if name in found}


def watched(command: Sequence[str], interval_seconds: float) -> dict[str, Any]:
    """Run a command; its peaks in MiB, its seconds and what it wrote on stdout."""
    start, peaks, samples = time.perf_counter(), dict[str, float](), 0
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    while process.poll() is None:
        now = memory_mib(process.pid)
        peaks |= {name: max(value, peaks.get(name, 0.0)) for name, value in now.items()}
        samples += bool(now)
        time.sleep(interval_seconds)
    said, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}; what it said is above.")
    return {"peak_mib": peaks, "samples": samples, "seconds": time.perf_counter() - start, "stdout": said}


class Worker:
    """A Python script in a process of its own, which `serve`s."""

    def __init__(self, script: str, arguments: Sequence[str]) -> None:
        self._name = f"{Path(script).name} {' '.join(arguments)}"
        self._process = subprocess.Popen(
            [sys.executable, script, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, question: str) -> Any:
        """The answer to a question, once it is there."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(question + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            line = ""
        else:
            line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self._name} ended with {self._process.wait()}; what it said is above.")
        return json.loads(line)

    def close(self) -> None:
        """End it: it reads until there is nothing more to come."""
        self._process.communicate()


def serve(prepare: Callable[[], Mapping[str, Callable[[], Any]]]) -> None:
    """Answer the questions on stdin, one a line, with JSON on stdout; what libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    known = prepare()
    for line in sys.stdin:
        print(json.dumps(known[line.strip()]()), file=answers, flush=True)
