# Everything runs in .venv beside this file, from whatever folder make was called.
# What is installed is marked by a stamp, so that calling make again costs nothing.

ROOT    := $(patsubst %/,%,$(dir $(realpath $(firstword $(MAKEFILE_LIST)))))
PYTHON  ?= $(shell command -v python3 || command -v python)
WORKERS ?= 2
# Options for pip, for a machine that has its own index.
PIP_FLAGS ?=

VENV    := $(ROOT)/.venv
BIN     := $(VENV)/bin
PIP     := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(ROOT)/constraints.txt $(PIP_FLAGS)
# DeepSpeed is a source distribution: nothing of it is compiled before it is used.
export DS_BUILD_OPS := 0
# What a test compiles of it, its aio, stays for the next time, and is linked to this libaio if the system has none.
export TORCH_EXTENSIONS_DIR ?= $(VENV)/.torch_extensions
export MEMPLAN_LIBAIO ?= $(VENV)/.libaio
# Other estimators, which want other versions of libraries.
PEERS   := $(VENV)/.peers
INPUTS  := $(ROOT)/pyproject.toml $(ROOT)/constraints.txt

.DELETE_ON_ERROR:
.PHONY: help demo test lint format bench bench-peers fuzz oracles campaign docs clean

help: ## what there is to make
	@grep -hE '^[a-z-]+:.*## ' $(ROOT)/Makefile | sed 's/:.*## /\t/'

demo: $(VENV)/.base ## estimate a 7B model on two GPUs, offline, with the base dependencies only
	@# Exit codes 1 and 3 are answers too (does not fit, tight), unless an error was written.
	@cd $(ROOT) && HF_HUB_OFFLINE=1 $(BIN)/memplan estimate meta-llama/Llama-2-7b --gpus 2 2>$(VENV)/.errors; \
	status=$$?; cat $(VENV)/.errors >&2; [ $$status -eq 0 ] || { [ $$status -ne 2 ] && [ ! -s $(VENV)/.errors ]; }

test: $(VENV)/.test $(VENV)/.libaio $(VENV)/.chromium ## all tests, the doctests among them
	cd $(ROOT) && HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) $(PYTEST_FLAGS)

lint: $(VENV)/.test ## ruff and mypy
	cd $(ROOT) && $(BIN)/ruff check && $(BIN)/ruff format --check && $(BIN)/mypy

format: $(VENV)/.test ## let ruff mend what it can
	cd $(ROOT) && $(BIN)/ruff check --fix && $(BIN)/ruff format

bench: $(VENV)/.test ## speed, beside accelerate, DeepSpeed's estimator and the trace
	cd $(ROOT) && OMP_NUM_THREADS=1 $(BIN)/python benchmarks/speed.py

bench-peers: $(VENV)/.test $(PEERS)/.installed ## other estimators on the published rows, side by side; archived
	cd $(ROOT) && OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu $(BIN)/python benchmarks/peers.py --python $(PEERS)/bin/python

SECONDS ?= 1800
fuzz: $(VENV)/.test ## look for inputs that raise what is no error of memplan's, for SECONDS
	$(PIP) atheris && cd $(ROOT) && OMP_NUM_THREADS=1 nice -n 19 $(BIN)/python -m tests.fuzz --seconds $(SECONDS)

oracles: $(VENV)/.test $(VENV)/.libaio ## run the full grids against the real libraries and archive the truth: hours
	cd $(ROOT) && HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m tests.oracles

campaign: $(VENV)/.test ## measure on this machine's GPU what its archive, or OUT, lacks: hours; may be cut and taken up
	cd $(ROOT) && $(BIN)/python benchmarks/campaign.py $(if $(OUT),--out $(OUT))

docs: $(VENV)/.docs ## build the documentation, strictly
	cd $(ROOT) && $(BIN)/mkdocs build --strict

clean: ## remove the environment and what tools left behind
	rm -rf $(VENV) $(ROOT)/.mypy_cache $(ROOT)/.pytest_cache $(ROOT)/.ruff_cache $(ROOT)/.hypothesis $(ROOT)/site

$(VENV)/.base: $(INPUTS)
	@test -n "$(PYTHON)" || { echo "memplan needs Python 3.10 or later as python3 or python" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e $(ROOT)
	@touch $@

$(VENV)/.test: $(VENV)/.base
	$(PIP) -e '$(ROOT)[test,notebook,docs]'
	@touch $@

$(VENV)/.libaio: | $(VENV)/.base
	@mkdir -p $@
	-@$(ROOT)/tests/oracles/libaio.sh $@

$(VENV)/.chromium: | $(VENV)/.base
	-@$(ROOT)/tests/chromium.sh
	@touch $@

# llm-analysis asks for old versions of what the others need new ones of; it runs with those.
$(PEERS)/.installed: | $(VENV)/.base
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) \
		fitcheck-llm==0.3.1 ftuneai==0.4.1 fire transformers
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) --no-deps llm-analysis==0.2.2
	@touch $@

$(VENV)/.docs: $(VENV)/.base
	$(PIP) -e '$(ROOT)[docs]'
	@touch $@
