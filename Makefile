# make train   sets up its own virtual environment and runs the main job
# make test    sets up and passes the tests, the linters and the floors
# make bench   how fast: the short form, beside other trainers (docs/how-fast.md); writes README's table and picture
# make bench-all  all figures of benchmarks/results
# make test-gpu  what only a CUDA device can show, and the contracts on it
# make faults  the long form of the fault harness (docs/faults.md)
# make test-tpu  trains on torch-tpu over XLA's plugin for the CPU, in an environment of its own (docs/tpu.md)
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: train test test-gpu test-tpu lint bench bench-all faults clean

train: .venv/run.stamp
	$(BIN)/thalweg train pycode

# One thread a process: torch's threads wait by spinning, and two processes with two each slow each other tenfold. One worker
# more than cores: many tests wait for processes that they start. Each worker has whole files while there are enough, so that what
# the tests of a file share is made once. Bytecode is kept: hundreds of processes would compile the sources anew.
test: lint .venv/test.stamp
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $$(( $$(nproc) + 1 )) --dist worksteal

test-gpu: .venv/test.stamp
	$(BIN)/python -m pytest -n 0 -rs -m gpu
	@if $(BIN)/python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; \
	then $(BIN)/python -m pytest -n 0 tests/test_step.py tests/test_resume.py tests/test_compiled.py tests/test_precision_table.py; \
	else echo "No CUDA device on this machine: the contracts were not run on one."; fi

lint: .venv/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

# The other trainers' environments are made first, once; that takes minutes and is not part of the fifteen.
bench: .venv/test.stamp
	$(BIN)/python -m benchmarks.speed.environments
	$(BIN)/python -m benchmarks.short

bench-all: .venv/test.stamp
	$(BIN)/python -m benchmarks

faults: .venv/test.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults

# Where the wheels cannot be had, it says so and passes: nothing was tested.
test-tpu:
	@if [ -e .venv-tpu/test.stamp ] || $(PYTHON) -m pip download --quiet --disable-pip-version-check --no-deps \
			--dest .venv-tpu.wheels torch-tpu libtpu xla-cpu-pjrt > .venv-tpu.log 2>&1; then \
		rm -rf .venv-tpu.wheels .venv-tpu.log; \
		$(MAKE) --no-print-directory .venv-tpu/test.stamp && \
		TORCH_DEVICE_BACKEND_AUTOLOAD=0 .venv-tpu/bin/python -m pytest tests/tpu -p no:randomly -rs; \
	else \
		tail -n 3 .venv-tpu.log; rm -rf .venv-tpu.wheels .venv-tpu.log; \
		echo "test-tpu was SKIPPED: torch-tpu, libtpu or xla-cpu-pjrt cannot be had here (the lines above say why)."; \
	fi

.venv-tpu/test.stamp: pyproject.toml
	$(PYTHON) -m venv .venv-tpu
	.venv-tpu/bin/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	.venv-tpu/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[digits,tpu,tpu-test]"
	touch $@

.venv/run.stamp: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -c "import torch" 2>/dev/null || $(PIP) "$(TORCH)"
	$(PIP) --editable ".[digits]"
	touch $@

.venv/test.stamp: .venv/run.stamp
	$(PIP) --editable ".[test,lint]"
	touch $@

clean:
	rm -rf .venv .venv-tpu .venv-peers runs
