# Needs make and Python 3.11 or newer; everything else is installed into .venv here. `make` alone lists the targets.
#   make test PYTHON=python3.12     another interpreter, for a .venv that is yet to be made
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -qq --constraint constraints.txt
INSTALL_INPUTS := pyproject.toml setup.py compress/gptq/loops.cpp constraints.txt __init__.py

.DEFAULT_GOAL := help
.PHONY: help venv dev demo test gates unit test-slow test-faults test-work test-families test-runtimes clean

help:
	@echo "make demo       run moepress on its embedded model, from profile to report, into demo-out"
	@echo "make test       all gates (ruff, mypy, import-linter) and the tests"
	@echo "make test-slow  the tests that take longer      make test-faults   10,000 spoiled inputs and kills"
	@echo "make test-work  shared runs of quantize: kills, a bucket through a faulty proxy, a Ray cluster (10 minutes)"
	@echo "make test-families   every mixture-of-experts model of transformers, against transformers (10 minutes)"
	@echo "make test-runtimes   vLLM, GPTQModel, mlx-lm and others load our outputs (makes their environments: 10 minutes, 8 GB)"
	@echo "make gates      the gates alone        make unit   the tests alone"
	@echo "make venv       install moepress into .venv   make dev   with the tools for tests"
	@echo "make clean      remove all that these made"

# A stamp is written only when the installation is whole, so an interrupted one is repeated.
.venv/.installed-run: $(INSTALL_INPUTS)
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@echo "Installing moepress into .venv (a minute or two the first time) ..."
	@$(PIP) --editable ".[onnx,gguf]"
	@touch $@

.venv/.installed-dev: $(INSTALL_INPUTS)
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@echo "Installing moepress with its development tools into .venv (a minute or two the first time) ..."
	@$(PIP) --editable ".[dev]"
	@touch .venv/.installed-run $@

venv: .venv/.installed-run
dev: .venv/.installed-dev

demo: venv
	$(BIN)/moepress run demo -o demo-out --keep 0.75 --bits 4 --group-size 64 --to gptq,onnx,gguf \
		--tasks moepress_continuation,moepress_sums --generations 64 --max-new-tokens 64 --force
	@echo
	@echo "The report is $(CURDIR)/demo-out/report.html (and report.md, report.json beside it)."

test: dev
	@$(MAKE) --no-print-directory gates
	@$(MAKE) --no-print-directory unit

gates: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p moepress
	$(BIN)/lint-imports

# A process per core, each with one thread: most of a test is Python. A file stays in one process, with its fixtures;
# the order is that of tests/conftest.py, the longest first.
unit: dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist loadfile --no-loadscope-reorder

test-slow: dev
	$(BIN)/pytest -m slow

# All model types that the installed transformers has; `make test` has ten of them.
test-families: dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto tests/models/test_families.py -m "slow or not slow"

# Each runtime in an environment of its own, in ~/.cache/moepress-runtimes; those that are there stay.
test-runtimes: dev
	@for name in mlx gptqmodel vllm; do tests/runtimes/environments.sh $$name "" $(PYTHON) >/dev/null || exit 1; done
	OMP_NUM_THREADS=1 $(BIN)/pytest tests/runtimes -m "slow or not slow"

# Ten thousand spoiled inputs of a seed that is printed, and the kills; `make test` has a short part of a fixed seed.
test-faults: dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto tests/faults --inputs 10000 --seed random -m "slow or not slow"

# Runs that several workers share, in all ways that are too long for `make test`.
test-work: dev
	OMP_NUM_THREADS=1 $(BIN)/pytest tests/runs/work tests/stages/test_work.py tests/stages/test_workers.py \
		tests/commands/test_work.py tests/faults/test_work_kills.py tests/faults/test_work_ray.py \
		-m "slow or not slow"

clean:
	rm -rf .venv build dist *.egg-info demo-out demo-out.partial
	rm -f compress/gptq/_loops_*
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
