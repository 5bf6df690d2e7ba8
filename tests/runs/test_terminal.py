"""What terminals, pipes and shells get to see: real pseudo-terminals, closed pipes, NO_COLOR, completion in bash."""

import os
import pty
import re
import select
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import fork_server
import pytest
from stage_runs import command

from moepress.runs.progress import stage, track

ESCAPE = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]")
STYLE = re.compile(rb"\x1b\[[0-9;]*m")
BAR = "from moepress.runs.progress import track\nwith track('pressing', 3) as advance:\n    advance(1)\n    advance(2)"
LONG = "A GPU of our own with a name that is longer than eighty columns, as tables in a pipe may well have to hold"


def moepress(*arguments: str) -> tuple[str, ...]:
    return (*fork_server.python(), "-m", "moepress", *arguments)


def progress() -> tuple[str, ...]:
    return (*fork_server.python(), "-c", BAR)


def environment(**changes: str) -> dict[str, str]:
    """This process's, as a plain terminal has it, with changes."""
    asked = ("NO_COLOR", "FORCE_COLOR", "COLORTERM", "COLUMNS", "TTY_COMPATIBLE", "TTY_INTERACTIVE")
    found = {name: value for name, value in os.environ.items() if name not in asked}
    return found | {"TERM": "xterm-256color"} | changes


def in_terminal(arguments: tuple[str, ...], **changes: str) -> bytes:
    """What a command that ends with 0 shows on a terminal of 80 columns, stdout and stderr together."""
    master, slave = pty.openpty()
    with subprocess.Popen(
        arguments, stdin=slave, stdout=slave, stderr=slave, env=environment(COLUMNS="80", **changes)
    ) as process:
        os.close(slave)
        shown = read_until(master, lambda seen: False)
    os.close(master)
    assert process.returncode == 0, shown
    return shown


def read_until(master: int, done: Callable[[bytes], bool]) -> bytes:
    """What comes from a terminal until its other side is closed, enough was seen, or nothing comes for a minute."""
    seen = b""
    while not done(seen) and select.select([master], [], [], 60)[0]:
        try:
            piece = os.read(master, 65536)
        except OSError:  # Linux says so when the last process behind the terminal has gone
            break
        if not piece:
            break
        seen += piece
    return seen


def in_pipe(arguments: tuple[str, ...], **changes: str) -> subprocess.CompletedProcess[bytes]:
    found = subprocess.run(arguments, capture_output=True, env=environment(**changes), check=False)
    assert found.returncode == 0, found.stderr
    return found


@pytest.fixture(scope="module")
def long_name(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with a GPU whose row is wider than a terminal."""
    file = tmp_path_factory.mktemp("gpus") / "gpus.toml"
    file.write_text(
        f'[[target]]\nid = "own"\nname = "{LONG}"\nkind = "gaming"\nmemory_gib = 48\n'
        "bandwidth_gb_per_second = 936\nfp16_tflops = 71.2\n"
    )
    return file


def test_a_pipe_gets_no_escape_codes_and_whole_tables(long_name: Path) -> None:
    found = in_pipe(moepress("targets", "--targets-file", str(long_name)), COLUMNS="80")
    assert not ESCAPE.search(found.stdout)
    assert found.stderr == b""
    assert re.search(rf"^own +{LONG} +gaming +48 +936 +71\.2$".encode(), found.stdout, re.MULTILINE)
    gpus, memory, disks = found.stdout.split(b"\n\n")
    for rows in (gpus.splitlines()[1:-1], memory.splitlines(), disks.splitlines()):  # columns, not sentences
        assert len({len(line) for line in rows}) == 1


@pytest.mark.parametrize(
    ("changes", "styled"),
    [({}, True), ({"NO_COLOR": "1"}, False), ({"NO_COLOR": "1", "FORCE_COLOR": "1"}, False), ({"TERM": "dumb"}, False)],
    ids=["plain", "NO_COLOR", "both", "dumb"],
)
def test_a_terminal_gets_styles_unless_it_wants_none(changes: Mapping[str, str], styled: bool) -> None:
    shown = in_terminal(moepress("targets"), **changes)
    assert b"RTX 3060 12GB" in shown
    assert bool(ESCAPE.search(shown)) == styled


def test_force_color_sends_styles_through_a_pipe_and_no_color_takes_them_back() -> None:
    assert STYLE.search(in_pipe(moepress("targets"), FORCE_COLOR="1").stdout)
    assert not ESCAPE.search(in_pipe(moepress("targets"), FORCE_COLOR="1", NO_COLOR="1").stdout)
    assert not ESCAPE.search(in_pipe(moepress("targets", "--json"), FORCE_COLOR="1").stdout)


def test_a_bar_is_drawn_where_a_person_watches_and_nowhere_else() -> None:
    shown = in_terminal(progress())
    assert b"pressing" in shown
    assert STYLE.search(shown)
    plain = in_terminal(progress(), NO_COLOR="1")
    assert b"pressing" in plain
    assert not STYLE.search(plain)
    for changes in ({}, {"FORCE_COLOR": "1"}):
        found = in_pipe(progress(), **changes)
        assert (found.stdout, found.stderr) == (b"", b"")


def without_reader(*arguments: str, stderr: bool = False) -> tuple[int, bytes]:
    """Exit code and stderr of a command whose stdout nobody reads any more; with `stderr`, its stderr neither."""
    readable, writable = os.pipe()
    os.close(readable)
    with subprocess.Popen(
        moepress(*arguments), stdout=writable, stderr=writable if stderr else subprocess.PIPE, env=environment()
    ) as process:
        os.close(writable)
        _, errors = process.communicate()
    return process.returncode, errors or b""


@pytest.mark.parametrize(
    "arguments",
    [("targets",), ("targets", "--json"), ("completion", "bash"), ("generate", "demo", "def", "--max-new-tokens", "2")],
    ids=" ".join,
)
def test_a_reader_that_has_gone_is_no_error(arguments: tuple[str, ...]) -> None:
    code, errors = without_reader(*arguments)
    assert code == 0
    assert b"Traceback" not in errors
    assert b"roken" not in errors


def test_a_pipe_into_head_ends_well_under_pipefail() -> None:
    line = f"set -o pipefail; {shlex.join(moepress('targets'))} | head -1"
    found = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True, env=environment())
    assert found.stdout.split() == ["id", "GPU", "kind", "GiB", "GB/s", "TFLOPS"]
    assert found.stderr == ""


def test_what_a_command_found_wrong_is_still_its_exit_code() -> None:
    code, errors = without_reader("check", "demo", "--runtime", "gptqmodel")
    assert code == 4
    assert errors.startswith(b"Error: demo does not work in gptqmodel")
    assert without_reader("check", "demo", "--runtime", "gptqmodel", "--json", stderr=True) == (4, b"")


needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")


@pytest.fixture(scope="module")
def bash(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A folder with `complete.sh` and some models, and an environment in which `moepress` is this package's."""
    folder = tmp_path_factory.mktemp("bash")
    (folder / "bin").mkdir()
    script = folder / "bin" / "moepress"
    script.write_text(f'#!/bin/sh\nexec {shlex.join(moepress())} "$@"\n')
    script.chmod(0o755)
    code, printed, errors = command("completion", "bash")
    assert (code, errors) == (0, "")
    (folder / "complete.sh").write_text(printed)
    for name in ("pressed", "pressed-gptq", "models/mine"):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text("{}")
    (folder / "models/notes").mkdir()
    found = environment(PATH=f"{folder / 'bin'}:{os.environ['PATH']}", INPUTRC="/dev/null", PS1="> ")
    return folder, found


COMPLETIONS: list[tuple[str, list[str]]] = [
    ("moepress pro", ["profile"]),
    ("moepress comp", ["completion"]),
    ("moepress run d", ["demo"]),
    ("moepress check pr", ["pressed", "pressed-gptq"]),
    ("moepress inspect models/", ["models/mine"]),
    ("moepress plan profile --target rtx-30", ["rtx-3060-12gb", "rtx-3090", "rtx-3080-10gb", "rtx-3090-ti"]),
    ("moepress plan --targets-file gpus.toml --target tw", ["two-3090"]),
    ("moepress plan --targets-file nowhere.toml --target rtx-309", ["rtx-3090", "rtx-3090-ti"]),
    ("moepress plan profile --criterion e", ["easy-ep", "ean"]),
    ("moepress check pressed --runtime v", ["vllm"]),
    ("moepress check pressed --runtime vllm,s", ["vllm,sglang"]),
    ("moepress check pressed --runtime vllm,v", []),
    ("moepress run demo --to gptq,", ["gptq,onnx", "gptq,gguf"]),
    ("moepress run demo --repair g", ["gain"]),
    ("moepress export pressed --to o", ["onnx"]),
    ("moepress quantize demo --group", ["--group-size"]),
]


@needs_bash
def test_bash_completes_commands_models_gpus_criteria_and_runtimes(bash: tuple[Path, dict[str, str]]) -> None:
    folder, found = bash
    (folder / "gpus.toml").write_text('[[target]]\nid = "two-3090"\n')
    lines = ["source ./complete.sh", "compopt() { :; }"]  # which bash allows while a person presses TAB alone
    for typed, _ in COMPLETIONS:
        words = typed.split(" ")
        lines += [f"COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; COMPREPLY=()"]
        lines += ["_moepress_completion moepress; (IFS=' '; echo \"${COMPREPLY[*]}\")"]
    done = subprocess.run(
        ["bash", "--norc", "-c", "\n".join(lines)], capture_output=True, text=True, check=True, env=found, cwd=folder
    )
    assert done.stderr == ""
    assert [line.split() for line in done.stdout.splitlines()] == [expected for _, expected in COMPLETIONS]


@needs_bash
def test_tab_completes_a_gpu_in_an_interactive_bash(bash: tuple[Path, dict[str, str]]) -> None:
    folder, found = bash
    master, slave = pty.openpty()
    with subprocess.Popen(
        ["bash", "--norc", "--noprofile", "-i"],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env=found,
        cwd=folder,
        start_new_session=True,
    ) as process:
        os.close(slave)
        os.write(master, b"source ./complete.sh && echo rea''dy\n")
        shown = read_until(master, lambda seen: b"ready" in seen)
        os.write(master, b"moepress plan profile --target rtx-4060-t\t")
        shown += read_until(master, lambda seen: b"i-16gb " in seen)
        os.write(master, b"\x15exit\n")
        process.wait(timeout=30)
    os.close(master)
    assert b"--target rtx-4060-ti-16gb " in shown.replace(b"\x07", b"")


@pytest.mark.parametrize(("shell", "sign"), [("zsh", "#compdef moepress"), ("fish", "complete --no-files")])
def test_other_shells_have_a_script_too(shell: str, sign: str, monkeypatch: pytest.MonkeyPatch) -> None:
    code, printed, errors = command("completion", shell)
    assert (code, errors) == (0, "")
    assert sign in printed
    monkeypatch.setenv("SHELL", f"/usr/bin/{shell}")
    assert command("completion") == (0, printed, "")


def test_a_shell_without_a_script_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHELL", "/bin/ksh")
    assert command("completion") == (2, "", "Error: There is no completion for ksh; name one of bash, zsh, fish.\n")
    assert command("completion", "ksh")[0] == 2


@needs_bash
def test_completion_is_quick_because_nothing_heavy_is_imported() -> None:
    typed = environment(COMP_WORDS="moepress plan --target rtx", COMP_CWORD="3", _MOEPRESS_COMPLETE="bash_complete")
    heavy = "{'torch', 'transformers', 'numpy', 'pydantic', 'rich'}"
    code = (
        "import sys\nfrom moepress.cli import cli\n"
        f"try:\n    cli.main(prog_name='moepress')\nfinally:\n    print(sorted({heavy} & set(sys.modules)))"
    )
    started = time.monotonic()
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=typed)
    assert "plain,rtx-3090" in found.stdout
    assert found.stdout.splitlines()[-1] == "[]"
    assert time.monotonic() - started < 60


def test_a_stage_of_a_job_leaves_a_line_in_a_log_and_a_short_command_none(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moepress.runs.progress.SHORT_SECONDS", 0.0)
    with track("pressing", 3, unit="layers") as advance:
        advance(3)
    with stage(2, 4), track("pressing", 3, unit="layers", about="5 tokens") as advance:
        advance(3)
    assert capsys.readouterr().err == "[2/4] pressing: 3 layers, 5 tokens, done in 0 s\n"
