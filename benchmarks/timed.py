"""Run a command and say what it took: a launcher that stays small.

    python benchmarks/timed.py REPORT.json COMMAND ...

The kernel counts a process's peak from the moment of its fork, when it still is its parent: started from a benchmark
that holds torch, every command would have at least that peak. This file imports nothing large for that reason.
REPORT.json: wall_seconds, cpu_seconds, peak_rss_bytes of the process (and of those that it waited for), exit_status.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path


def main() -> int:
    report, command = Path(sys.argv[1]), sys.argv[2:]
    start = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    figures = {
        "wall_seconds": time.perf_counter() - start,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_rss_bytes": 1024 * usage.ru_maxrss,
        "exit_status": process.returncode,
    }
    report.write_text(json.dumps(figures))
    return process.returncode


if __name__ == "__main__":
    raise SystemExit(main())
