"""A GGUF file tried in a process of its own: llama.cpp ends the process over some, and rules can not name them all.

python -m moepress.converters.gguf.trial FILE        loads it and computes one token
"""

import os
import re
import subprocess
import sys
from pathlib import Path

from moepress.converters.gguf.runtime import exact_context, require_llama
from moepress.errors import InvalidInputError

_TOKENS = 32  # of the context


def require_survived(file: Path) -> None:
    """Refuse a file over which llama.cpp ends its process; what it refuses in an orderly way is not told here.

    Raises:
        InvalidInputError: with the assertion, where it says one.
    """
    quiet = os.environ | {"GGML_NO_BACKTRACE": "1"}
    command = [sys.executable, "-m", "moepress.converters.gguf.trial", os.fspath(file)]
    done = subprocess.run(command, capture_output=True, env=quiet, check=False)
    if done.returncode in (0, 1, 2):  # of Python: what went wrong went wrong in an orderly way
        return
    said = re.search(r"GGML_ASSERT\([^\n]*", done.stderr.decode("utf-8", "replace"))
    why = said[0] if said else f"exit code {done.returncode}"
    raise InvalidInputError(f"llama.cpp ends its process over {file} ({why[:200]}); make or download it again.")


def _try(file: str) -> None:
    """Load a file and compute one token, without a word about what goes wrong in an orderly way."""
    llama = require_llama()
    call = llama.call
    model = call["model_load_from_file"](os.fsencode(file), call["model_default_params"]())
    state = call["init_from_model"](model, exact_context(llama, _TOKENS, 1)) if model else None
    if not state:
        return
    batch = call["batch_init"](1, 0, 1)
    batch.n_tokens, batch.token[0], batch.pos[0] = 1, 0, 0
    batch.n_seq_id[0], batch.seq_id[0][0], batch.logits[0] = 1, 0, True
    call["decode"](state, batch)


if __name__ == "__main__":
    _try(sys.argv[1])
