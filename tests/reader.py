"""One who reads the documents and runs every command in them: MODEL is the demo model, texts are small.

The documents share one folder, as one person reading them all would. Long settings are made short by options at the
command's end, which win over the document's; nothing else is changed. Models that a document names by an id of the hub
are the demo model too, on a hub of the test's own, which also takes what is pushed.
"""

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import hub_server
import pytest
from documents import ROOT, blocks, name_of
from hub_client import client, contents
from stage_runs import command

from moepress.hub.snapshot import hub_model
from moepress.stages.places import model_folder

NOT_RUN = {
    r"make (demo|test)$": "installs packages from the network; continuous integration runs `make test`",
    r"make test-runtimes$|tests/runtimes/environments.sh ": "installs runtimes from the network, gigabytes of them",
    r"\.venv/bin/pytest tests/runtimes$": "these are tests already",
    r"pip install ": "installs packages from the network",
}
"""Lines that no test runs, and why."""

TEXT = ("--tokens", "512", "--window", "32")
SHORT = {
    "profile": TEXT,
    "quantize": TEXT,
    "plan-work": TEXT,
    "run": (*TEXT, "--max-windows", "1", "--no-throughput"),
    "validate": ("--max-windows", "1", "--no-throughput"),
    "generate": ("--max-new-tokens", "4"),
    "calibration": ("--max-new-tokens", "8"),
}
FEW_ANSWERS = ("--generations", "2", "--max-new-tokens", "64")
MADE_BEFORE = (
    "profile MODEL -o profile",
    "plan profile --keep 0.75 -o plan.json",
    "quantize MODEL --plan plan.json -o pressed",
    "export pressed --to gptq -o pressed-gptq",
    "export pressed --to onnx -o pressed-onnx",
)
"""What a document may take as made by another one."""


def lines_of(document: Path) -> list[str]:
    """The commands of a document's shell blocks, without comments."""
    text = document.read_text(encoding="utf-8")
    found = [line.strip() for block in blocks(text, "sh") for line in block.splitlines()]
    found += re.findall(r"^    (moepress .*)", text, re.MULTILINE)
    return [re.sub(r"\s+#.*", "", line) for line in found if line and not line.startswith("#")]


def reason_not_to_run(line: str) -> str | None:
    return next((why for pattern, why in NOT_RUN.items() if re.match(pattern, line)), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """One who sits in `folder`, which is the current one, and may ask `hub`."""

    folder: Path
    hub: hub_server.Hub

    def read(self, document: Path) -> None:
        """Run the commands of a document, in order; a line that nobody runs, and for no reason, fails."""
        for line in lines_of(document):
            if reason_not_to_run(line) is None:
                assert line.startswith("moepress "), f"{name_of(document)}: `{line}` is run by no test; see NOT_RUN"
                self.run(line)

    def run(self, line: str) -> None:
        """Run a command of a document; where it makes something, as if for the first time."""
        words = shlex.split(re.split(r" >>? ", line)[0])[1:]  # whatever stdout is sent to, the test holds it
        outputs = {"-o", "--output", "--timings", "--save-reference"}
        for place in (Path(words[n + 1]) for n, word in enumerate(words[:-1]) if word in outputs):
            if place.is_dir() and not {"--resume", "--force"} & set(words):
                shutil.rmtree(place)
            elif place.is_file():
                place.unlink()
        self._publish(words)
        short = SHORT.get(words[0], TEXT if "--repair" in words else ())
        if words[0] in ("run", "validate") and {"--generations", "--prompts"} & set(words):
            short += FEW_ANSWERS
        code, printed, errors = command(*words, *short)
        limits = {"--max-ppl-increase", "--max-kl", "--max-loop-increase", "--min-recovery"}
        allowed = {0} | ({3} if limits & set(words) else set())
        allowed |= {4} if words[0] == "check" and " does not work in " in errors else set()  # the demo is a small model
        assert code in allowed, f"`{line}` ended with {code}: {errors}"
        assert printed

    def _publish(self, words: list[str]) -> None:
        """Put MODEL on the hub by every id in a command, and let its user write where it is to be pushed to."""
        for before, word in pairwise(["", *words]):
            found = hub_model(word)
            if found is None or Path(word).exists():
                continue
            if before == "--push":
                hub_server.TOKENS[hub_server.WRITER] = (found.repo.split("/")[0], "write")
            elif not before.startswith("-"):
                branch = {"branch": found.revision} if found.revision else {}
                self.hub.repos.setdefault(found.repo, hub_server.Repo()).commit(
                    contents(self.folder / "MODEL"), **branch
                )


@contextmanager
def reader(folder: Path) -> Iterator[Reader]:
    """A reader in this folder, with all that the documents speak of as there."""
    demo = model_folder("demo")
    shutil.copytree(demo, folder / "MODEL", ignore=shutil.ignore_patterns("__*", "text", "*ing.json", "metrics.json"))
    settings = json.loads((folder / "MODEL" / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    (folder / "MODEL" / "tokenizer_config.json").write_text(json.dumps(settings))
    for name in ("my-text", "my-test-text"):
        (folder / name).mkdir()
    for domain in ("german", "math", "wiki"):
        text = (demo / "text" / domain / "calibration.txt").read_text(encoding="utf-8")
        (folder / "my-text" / f"{domain}.txt").write_text(text[:6000], encoding="utf-8")
        (folder / "my-test-text" / f"{domain}.txt").write_text(text[6000:9000], encoding="utf-8")
    for name in ("code.txt", "test-code.txt"):
        shutil.copy(Path(__file__), folder / name)
    (folder / "prompts.txt").write_text("Where does the river come from?\nWhat is 7 plus 5?\n" * 4)
    (folder / "chats.jsonl").write_text('{"text": "How are you? Fine, and what about you?"}\n' * 60)
    (folder / "my-prompts.jsonl").write_text('{"prompt": "What is 7 plus 5?"}\n{"prompt": "What is 8 plus 5?"}\n')
    shutil.copy(ROOT / "docs" / "examples" / "recipe.yaml", folder)
    with client(folder / "home") as hub, pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HF_TOKEN", hub_server.WRITER)
        patch.setitem(hub_server.TOKENS, hub_server.WRITER, hub_server.TOKENS[hub_server.WRITER])
        made = Reader(folder=folder, hub=hub)
        for line in MADE_BEFORE:
            made.run(f"moepress {line}")
        yield made
