# Every target sets up what it needs in .venv, and does so once.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CPP_FILES = $(shell find $(wildcard csrc tests bench) -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h')

# Threads that wait must not keep another process from running.
IN_PARALLEL := OMP_WAIT_POLICY=passive

.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo paper test microbench bench bench-peers kernels gpu-suite lint format clean FORCE

help:
	@echo "make demo        train a small GPT next to torch.optim.AdamW (ARGS=... for train_gpt.py)"
	@echo "make paper       the papers' experiments: numbers and pictures into docs/figures"
	@echo "make test        run every test (ARGS=... for pytest)"
	@echo "make bench       our engines and their peers side by side: a table and a picture"
	@echo "                 (ARGS=... for bench: --quick, --help)"
	@echo "make bench-peers install the peers that torch does not bring, as far as they install"
	@echo "make microbench  time the steps in bench/ (ARGS=... for pytest)"
	@echo "make kernels     what the compilers make of every GPU kernel, into bench/results/kernels.md"
	@echo "make gpu-suite   everything that needs a GPU, into OUT=build/gpu-suite (WHEELS=folder of peers)"
	@echo "make lint        ruff, mypy, clang-format"
	@echo "make format      let ruff and clang-format rewrite the files"
	@echo "make clean       remove .venv and everything built"

demo: $(VENV)/built
	$(BIN)/python examples/train_gpt.py $(ARGS)

paper: $(VENV)/built $(VENV)/dev
	for script in $(filter-out %/common.py,$(wildcard examples/paper/*.py)); do \
	  $(BIN)/python $$script $(ARGS) || exit 1; \
	done

test: $(VENV)/built $(VENV)/dev
	$(IN_PARALLEL) $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadgroup $(ARGS)

microbench: $(VENV)/built $(VENV)/dev
	$(BIN)/python -m pytest bench --benchmark-only $(ARGS)

bench: $(VENV)/built $(VENV)/dev
	$(BIN)/python -m bench $(ARGS)

kernels: $(VENV)/built $(VENV)/dev
	$(BIN)/python -m bench.kernels $(ARGS)

bench-peers: $(VENV)/built $(VENV)/dev $(VENV)/peers

gpu-suite:
	bench/gpu_suite.sh $(or $(OUT),build/gpu-suite) $(WHEELS)

lint: $(VENV)/dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP_FILES)

format: $(VENV)/dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CPP_FILES)

clean:
	rm -rf $(VENV) build dist *.egg-info fused_adamw/_C.*.so
	find . -name __pycache__ -prune -exec rm -rf {} +

# The files below $(VENV) without an extension record what has been done.

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "Python 3.10 or later is needed; try 'make PYTHON=python3.12 ...'" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo: requirements/demo.txt | $(BIN)/python
	$(BIN)/pip install -r $<
	@touch $@

$(VENV)/dev: requirements/dev.txt $(VENV)/demo
	$(BIN)/pip install -r $<
	@touch $@

# One at a time, without touching torch, so that one that does not install leaves the others.
# DeepSpeed is told not to look for CUDA; it compiles what it needs when it is first used.
$(VENV)/peers: requirements/peers.txt $(VENV)/demo
	@grep -v '^#' $< | while read -r peer; do \
	  DS_IGNORE_CUDA_DETECTION=1 $(BIN)/pip install -c requirements/demo.txt "$$peer" || \
	    echo "$$peer does not install here" >&2; \
	done
	@touch $@

$(VENV)/built: $(VENV)/demo $(VENV)/options setup.py pyproject.toml $(shell find csrc -type f)
	$(BIN)/python setup.py -q build_ext --inplace
	$(BIN)/pip install -q --no-build-isolation --no-deps -e .
	@touch $@

# Rewritten only where the options of the build have changed.
OPTIONS := $(CXX) $(FUSED_ADAMW_CUDA) $(FUSED_ADAMW_CUDA_ARCHS)
$(VENV)/options: FORCE | $(BIN)/python
	@echo '$(OPTIONS)' | cmp -s - $@ || echo '$(OPTIONS)' > $@
