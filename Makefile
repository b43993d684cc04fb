# Retrace. `make help` lists what can be made; SCALE and HARDWARE choose the size and the machine.
SCALE    ?= laptop
HARDWARE ?= cpu
PYTHON   ?= python3
BIN      := .venv/bin
READY    := .venv/.ready
PAPERS   := $(notdir $(patsubst %/,%,$(dir $(wildcard configs/*/main.yaml))))

.DEFAULT_GOAL := help
.PHONY: help setup test lint smoke reproduce-% reproduce report bench clean

help:  ## show this
	@grep -hE '^[a-z%-]+:.*## ' Makefile | sed -E 's/:[^#]*## /\t/' | expand -t 24
	@echo "SCALE=smoke|laptop (now $(SCALE)), HARDWARE=a file of configs/hardware (now $(HARDWARE))"

setup: $(READY)  ## a virtual environment in .venv with everything that is needed

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Retrace needs Python 3.11 or newer; set PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	@echo "setting up .venv: two to five minutes, most of it torch; only once"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $(READY)

test: $(READY)  ## the tests: offline, minutes
	$(BIN)/python -m pytest -m "not slow and not gpu" --numprocesses auto --maxprocesses 4 --dist loadfile

lint: $(READY)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

smoke: $(READY)  ## every ablation and arm at its smallest, seed 0
	RETRACE_HOME=$${RETRACE_HOME:-$(CURDIR)/runs/smoke} $(BIN)/retrace run $(PAPERS) scale=smoke seed=0

reproduce-%: $(READY)  ## run a paper's ablations, judge its claims: reproduce-quietstar
	@$(BIN)/retrace run $* scale=$(SCALE) hardware=$(HARDWARE); code=$$?; \
	$(if $(filter slurm_%,$(HARDWARE)),$(BIN)/retrace status $* scale=$(SCALE) --watch --every 30;) \
	test $$code -gt 1 || $(BIN)/retrace report $* --scale $(SCALE); exit $$code

reproduce: $(addprefix reproduce-,$(PAPERS))  ## all papers

report: $(READY)  ## the verdicts and the page, from the records there are
	$(foreach paper,$(PAPERS),$(BIN)/retrace report $(paper) --scale $(SCALE) &&) true

bench: $(READY)  ## benchmarks: ratios against a reference, never a test
	for name in thought_step generation scoring component_moments deepscale_training mm1_training mm1_data checkpoints harness; do \
		$(BIN)/python benchmarks/$$name.py || exit 1; done

clean:  ## forget runs; records and reports stay
	rm -rf runs
