# Everything here works in a fresh clone: each target sets up what it needs, once.
#   make demo         train a small model on real text, compile, verify and prompt it
#   make test         the tests that take seconds;  make test-slow  the others
#   make lint         ruff and mypy
# Variables: PYTHON (3.11 to 3.13), TORCH_INDEX (an extra index for torch's CPU wheel), EXTRAS, TEST_EXTRAS, PYTEST_ARGS.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
  command -v $$p >/dev/null && $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' \
  && echo $$p && break; done)
EXTRAS ?= dev,metal,transformers,train,report
TEST_EXTRAS ?= onnx,mlir,iree,eval,plan,pictures
TORCH_INDEX ?=
PYTEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
MOEC := $(BIN)/moec
INSTALLED := $(VENV)/.moec-installed
TESTABLE := $(VENV)/.moec-testable
KERNEL := $(VENV)/.moec-kernel
KERNEL_SOURCES := $(shell find targets/xnnpack -name '*.cpp' -o -name '*.cc' -o -name '*.h' -o -name 'CMakeLists.txt' \
  -o -name '*.cmake' -o -name native.py)
BUILD := build

.PHONY: help setup demo test test-slow test-sanitize lint format lock bench-kernel bench-passes new-rule bench-peers bench-roles bench-training train-report paper-tables clean distclean

help:
	@sed -n 's/^#   //p' Makefile

setup: $(INSTALLED) $(KERNEL)
	@:

$(INSTALLED): pyproject.toml requirements.lock
	@test -n "$(PYTHON)" || { echo "moec needs Python 3.11, 3.12 or 3.13; install one, or give PYTHON=..." >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "cannot make a virtual environment: install the venv package of $(PYTHON)" >&2; exit 2; }
	@echo "installing moec and its dependencies into $(VENV) (torch is large: minutes without a package cache)"
	$(BIN)/python -m pip install --disable-pip-version-check -q -c requirements.lock \
	  $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -e '.[$(EXTRAS)]'
	@touch $@

# what only tests need; the tests of an extra that has no wheel for this Python skip with a reason
$(TESTABLE): $(INSTALLED)
	@echo "installing the extras that tests use: $(TEST_EXTRAS)"
	@$(BIN)/python -m pip install --disable-pip-version-check -q -c requirements.lock -e '.[$(EXTRAS),$(TEST_EXTRAS)]' \
	  || echo "not all of them could be installed: their tests will skip" >&2
	@touch $@

$(KERNEL): $(INSTALLED) $(KERNEL_SOURCES)
	$(BIN)/python -m moec.targets.xnnpack.native build
	@touch $@

# text of the running Python's own library: nothing is downloaded. What is there already is not done again.
DEMO := $(BUILD)/demo
DEMO_SPEC := specs/models/mobilemoe-tiny.yaml
demo: setup
	@test -e $(DEMO)/corpus/corpus.json || { set -x; \
	  $(MOEC) data build --out $(DEMO)/corpus --domains code --vocab-size 4096; }
	$(MOEC) train $(DEMO_SPEC) --data $(DEMO)/corpus --out $(DEMO)/run $$(test ! -e $(DEMO)/run/run.json || echo --resume)
	$(MOEC) compile $(DEMO_SPEC) --checkpoint $(DEMO)/run/qat --out $(DEMO)/artifact
	$(MOEC) inspect $(DEMO)/artifact
	$(MOEC) verify $(DEMO)/artifact --json $(DEMO)/verify.json
	$(MOEC) run $(DEMO)/artifact --prompt "    def __init__(self" --max-new-tokens 64
	$(MOEC) run $(DEMO)/artifact --prompt "class Connection" --max-new-tokens 96 --temperature 0.7 --top-p 0.9 --seed 7

test: setup $(TESTABLE)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n auto -m "not slow" $(PYTEST_ARGS)

test-slow: setup $(TESTABLE)
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

# the kernel library under AddressSanitizer and UndefinedBehaviorSanitizer, driven by its own tests
test-sanitize: $(INSTALLED)
	$(BIN)/python -m moec.targets.xnnpack.native sanitize

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix-only -q .
	$(BIN)/ruff format .

# the versions that this checkout's environment holds, as constraints; no index, no hashes
lock: $(INSTALLED)
	{ sed -n '/^#/p' requirements.lock; $(BIN)/python -m pip list --format freeze --exclude-editable \
	  | sed -E 's/\+[a-z0-9.]+$$//' | grep -viE '^(pip|setuptools)=' | LC_ALL=C sort -f; } > $(BUILD)-lock
	mv $(BUILD)-lock requirements.lock
	touch $(INSTALLED)

bench-kernel: setup
	$(BIN)/python -m pip install --disable-pip-version-check -q -c requirements.lock -e '.[bench]'
	$(BIN)/python bench/bench_kernel.py --out $(BUILD)/bench $(BENCH_ARGS)

bench-passes: $(INSTALLED)
	$(BIN)/python bench/bench_passes.py

bench-peers: setup
	$(BIN)/python -m pip install --disable-pip-version-check -q -c requirements.lock -e ".[bench]"
	$(BIN)/python bench/bench_peers.py --out $(BUILD)/bench $(BENCH_ARGS)

bench-roles: setup
	$(BIN)/python -W ignore bench/bench_roles.py --out $(BUILD)/bench $(BENCH_ARGS)

# S and the dense MobileLLM-Pro (M and L where they fit) as in the paper's tables; BENCH_ARGS=--quick for a look
paper-tables: setup
	$(BIN)/python -m pip install --disable-pip-version-check -q -c requirements.lock -e ".[report]"
	$(BIN)/python bench/paper_tables.py --out $(BUILD)/bench $(BENCH_ARGS)

# how the experts are multiplied in training; give a quiet machine
bench-training: $(INSTALLED)
	$(BIN)/python -W ignore bench/bench_training.py --out $(BUILD)/bench $(BENCH_ARGS)

# corpus, four stages, controls, QAT against PTQ, tasks: continues where it was stopped; under an hour on two cores
train-report: setup
	$(BIN)/python -m pip install --disable-pip-version-check -q -c requirements.lock -e ".[train,eval,report]"
	$(BIN)/python -W ignore bench/train_report.py --out $(BUILD)/train-report $(BENCH_ARGS)

new-rule: $(INSTALLED)
	@test -n "$(NAME)" || { echo "give NAME=verb_what, e.g. make new-rule NAME=fuse_norms" >&2; exit 2; }
	@$(BIN)/python -m moec.compiler.new_rule $(NAME)

# planned beside measured memory and speed: `make plan-accuracy PLAN_ARGS="--artifact DIR ..."`; alone on the machine
.PHONY: plan-accuracy
plan-accuracy: setup
	$(BIN)/python bench/plan_accuracy.py $(PLAN_ARGS)

clean:
	rm -rf $(BUILD) dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf

distclean: clean
	rm -rf $(VENV)
