"""Real processes that are killed while they work: the commands on a small model, and what they give uninterrupted."""

import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import fork_server
from fork_client import Child
from stage_runs import add_tokenizer, command, content

from moepress.calibration.profile import load_profile
from moepress.compress.pruning.plan import make_plan, plan_text
from moepress.converters.safetensors.scheme import Scheme
from moepress.runs.files import JOURNAL
from moepress.runs.output import partial_folder

LAYERS = 5
TIMED = ("report.html", "report.json", "report.md", "junit.xml", "provenance.json", "README.md", JOURNAL, "recipe.yaml")
"""What `run` leaves that holds times, or the name of its folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """A model, text, and for every command its arguments and what it gives when nobody interrupts it."""

    folder: Path
    model: Path
    arguments: dict[str, list[str]]
    whole: dict[str, dict[str, bytes]]


def prepared(folder: Path, tiny_model: Callable[..., Path]) -> Work:
    """The commands that take a profile, a plan or a quantized folder, and those."""
    model = folder / "model"
    shutil.copytree(tiny_model("deepseek_v3", num_hidden_layers=LAYERS, shards=8), model)
    add_tokenizer(model)
    (model / "LICENSE").write_text("licence")
    draw = random.Random(0)
    for name in ("one", "two"):
        (folder / f"{name}.txt").write_text("".join(draw.choices("abcdefgh ABCDEFGH.,;", k=4000)))
    text = ["--domain", f"one={folder / 'one.txt'}", "--domain", f"two={folder / 'two.txt'}"]
    text += ["--tokens", "512", "--window", "16"]
    arguments = {"profile": ["profile", str(model), *text]}
    finish([*arguments["profile"], "-o", str(folder / "profile")])
    # 12: as keys of a journal, experts 10 and 11 come before 2
    plan = make_plan(load_profile(folder / "profile"), count=12, scheme=Scheme(bits=4, group_size=32))
    (folder / "plan.json").write_text(plan_text(plan))
    arguments["prune"] = ["prune", str(model), "--plan", str(folder / "plan.json")]
    arguments["quantize"] = ["quantize", str(model), "--plan", str(folder / "plan.json"), "--include", "shared", *text]
    finish([*arguments["quantize"], "-o", str(folder / "quantize")])
    finish([*arguments["prune"], "-o", str(folder / "prune")])
    arguments["repair"] = [*arguments["prune"], "--repair", "gain,bias,router", *text]
    finish([*arguments["repair"], "-o", str(folder / "repair")])
    arguments["export"] = ["export", str(folder / "quantize"), "--to", "gptq"]
    finish([*arguments["export"], "-o", str(folder / "export")])
    return Work(
        folder=folder, model=model, arguments=arguments, whole={name: content(folder / name) for name in arguments}
    )


def with_more(work: Work) -> Work:
    """And those that take seconds each: another repair, an export to ONNX, and all stages in one."""
    folder, arguments = work.folder, dict(work.arguments)
    arguments["down"] = ["down" if word == "gain,bias,router" else word for word in arguments["repair"]]
    arguments["onnx"] = ["export", str(folder / "quantize"), "--to", "onnx", "--no-check"]
    data = ["--data-domain", f"one={folder / 'one.txt'}", "--window", "16", "--max-windows", "1", "--no-throughput"]
    plain = [word for word in arguments["profile"][1:] if word not in ("--window", "16")]
    arguments["run"] = ["run", *plain, *data, "--experts", "12", "--bits", "4", "--group-size", "32", "--to", "gptq"]
    for name in ("down", "onnx", "run"):
        finish([*arguments[name], "-o", str(folder / name)])
    whole = work.whole | {name: result(folder / name) for name in ("down", "onnx", "run")}
    return Work(folder=folder, model=work.model, arguments=arguments, whole=whole)


def result(out: Path) -> dict[str, bytes]:
    """An output's files, but for those of `run` that hold times."""
    is_run = (out / "plan.json").exists() and (out / JOURNAL).exists()
    return {name: data for name, data in content(out).items() if not (is_run and Path(name).name in TIMED)}


def finish(arguments: Sequence[str]) -> None:
    code, _, errors = command(*arguments)
    assert code == 0, errors


def start(arguments: Sequence[str], errors: IO[str] | None = None) -> Child:
    """With a niceness: on a busy machine what is watched must not outrun the one that watches."""
    stderr = None if errors is None else errors.fileno()
    return fork_server.start(["-m", "moepress", *arguments], stderr=stderr, niceness=10)


def lines(out: Path) -> int:
    """Whole lines in the journal of an unfinished run: its settings, and its finished or dropped pieces."""
    try:
        return (partial_folder(out) / JOURNAL).read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def resume(arguments: Sequence[str], out: Path) -> None:
    finish([*arguments, "-o", str(out), "--resume"])
    assert not partial_folder(out).exists()
