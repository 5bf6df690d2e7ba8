#!/usr/bin/env bash
# Makes a virtual environment with one other quantizer, so that its reader or its quality can be compared with ours.
#
#   setup.sh gptqmodel|autogptq|autoround|llmcompressor [FOLDER [PYTHON]]
#
# FOLDER defaults to ~/.cache/moepress-peers/NAME, PYTHON to python3 (AutoGPTQ was tried with 3.11). Each
# peer pins another torch or transformers than moepress, which is why none of them is an extra. Versions are those of
# NAME.txt beside this file. The CPU is enough; on Linux PyPI's torch brings CUDA's libraries along, and
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu gives the one without them. The last line printed is the
# environment's python.
set -euo pipefail

usage() {
    sed -n '2,11s/^# \{0,1\}//p' "$0" >&2
    exit 2
}

[ $# -ge 1 ] && [ $# -le 3 ] || usage
name=$1
folder=${2:-$HOME/.cache/moepress-peers/$name}
case $name in gptqmodel | autogptq | autoround | llmcompressor) ;; *) usage ;; esac

"${3:-python3}" -m venv "$folder"
pip=("$folder/bin/python" -m pip install --quiet --disable-pip-version-check)

pins=$(cd "$(dirname "$0")" && pwd)/$name.txt

case $name in
    gptqmodel)
        # 7.7.0 asks for torch >= 2.14.1; it runs with 2.13, hence --no-deps.
        "${pip[@]}" -c "$pins" torch setuptools wheel
        "${pip[@]}" -c "$pins" transformers accelerate safetensors numpy threadpoolctl packaging \
            device-smi protobuf pillow requests pypcre tokenicer logbar jinja2 datasets pyarrow dill defuser
        "${pip[@]}" -c "$pins" --no-deps --no-build-isolation gptqmodel
        "${pip[@]}" -c "$pins" --no-deps torchao
        check='import gptqmodel, torch; print("gptqmodel", gptqmodel.__version__, "torch", torch.__version__)'
        ;;
    autogptq)
        # Archived in 2025: transformers 4.49 and later no longer have the names it imports, peft must be as old.
        "${pip[@]}" torch==2.13.0 "numpy<3" "transformers==4.48.3" "accelerate==1.3.0" "peft==0.14.0" datasets gekko safetensors
        BUILD_CUDA_EXT=0 "${pip[@]}" --no-deps auto-gptq==0.7.1
        check='import auto_gptq, torch; print("auto_gptq", auto_gptq.__version__, "torch", torch.__version__)'
        ;;
    autoround)
        "${pip[@]}" -c "$pins" torch
        "${pip[@]}" -c "$pins" auto-round
        check='import auto_round, torch; print("auto_round", auto_round.__version__, "torch", torch.__version__)'
        ;;
    llmcompressor)
        "${pip[@]}" -c "$pins" torch
        "${pip[@]}" -c "$pins" llmcompressor
        check='import llmcompressor, torch; print("llmcompressor", llmcompressor.__version__, "torch", torch.__version__)'
        ;;
esac
GPTQMODEL_CPU_WORKERS=2 "$folder/bin/python" -c "$check" >&2
echo "$folder/bin/python"
