# Everything runs in .venv, made on first use. Only python3 (3.10 or newer, with its venv module) and make are needed.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# What litgpt's TextFiles and LitData read with. litdata asks for torchvision, which it needs for images only, and with
# which pip would replace torch by a CUDA build: so litdata comes alone, and what else it requires by name.
LITDATA := boto3 filelock obstore requests tifffile
RECIPE := recipes/trainer/pretrain
FIT    := $(BIN)/lightning-adapm fit --config $(RECIPE)/quickstart.yaml
# Three eighths of the recipe, with a validation after every third of it: three runs, one after another.
SHORT  := --trainer.limit_train_batches=180 --trainer.val_check_interval=60
# Every test keeps to one thread, so that each core takes tests of its own.
PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal

.PHONY: help pretrain test test-slow lint types package docs clean

help:
	@echo "make pretrain   train the quick start with AdamW, AdaPM and PartialMuon (at most five minutes on two CPU cores)"
	@echo "make test       the tests"
	@echo "make test-slow  the tests that take minutes"
	@echo "make lint       ruff"
	@echo "make types      mypy"
	@echo "make package    the wheel and the source archive in dist/, checked and tried"
	@echo "make docs       the site of the documentation, in site/"
	@echo "make clean      remove the environment, caches and runs"

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "lightning-adapm needs Python 3.10 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." \
		       "Name another: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
		{ echo "'$(PYTHON)' lacks the venv module (on Debian and Ubuntu: the package python3-venv)."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[quickstart,test,lint]' $(LITDATA)
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps --no-warn-conflicts litdata
	@touch $@

# Where another process takes one of two cores, threads that spin while they wait make every step ten times slower.
pretrain: export GOMP_SPINCOUNT ?= 1000
pretrain: $(STAMP)
	$(FIT) --config $(RECIPE)/quickstart-adamw.yaml $(SHORT)
	$(FIT) $(SHORT)
	$(FIT) --config $(RECIPE)/quickstart-partial-muon.yaml $(SHORT)

test: $(STAMP)
	$(PYTEST) -m "not slow"

# pytest ends with 5 when it selects no test, which is no failure here.
test-slow: $(STAMP)
	$(PYTEST) -m slow || [ $$? -eq 5 ]
	NUMBA_DISABLE_JIT=0 $(BIN)/python -m pytest tests/step/test_loops.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

# The wheel is tried outside the clone, whose recipes it must not need.
package: $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt build twine
	rm -rf dist build/wheel
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python -m pip install --quiet --no-deps --target build/wheel dist/*.whl
	cd build/wheel && $(abspath $(BIN))/python -m lightning_adapm plan --config recipe:finetune/pythia-1b-full
	diff -r recipes build/wheel/lightning_adapm/recipes

docs: export NO_MKDOCS_2_WARNING := 1
docs: $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	$(BIN)/python -m mkdocs build --strict --config-file docs/site/mkdocs.yml

clean:
	rm -rf $(VENV) build dist site runs lightning_logs *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
