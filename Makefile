# Every target builds what it needs, once: a virtual environment from pyproject.toml with the versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help demo test test-slow lint type crash faults hostile long-run format clean

help:
	@echo "make demo    train clip, fixed KL and adaptive KL on CartPole-v1 and compare them"
	@echo "make test    run the tests"
	@echo "make test-slow  run those that start programs, or train to the end"
	@echo "make crash   kill trainings, and compare what they end with: about ten minutes"
	@echo "make faults  inject NaN and infinity into trainings, at random"
	@echo "make hostile try a catalogue of bad input"
	@echo "make long-run  train for 1,000 updates, and watch memory, time, threads and files"
	@echo "make lint    check style"
	@echo "make type    check types"
	@echo "make format  put the code into its format"
	@echo "make clean   remove the virtual environment and caches"

demo: $(INSTALLED)
	$(BIN)/python -m benchmarks.compare --preset demo $(ARGS)

test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 $(ARGS)

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 -m slow $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: $(INSTALLED)
	$(BIN)/mypy

crash: $(INSTALLED)
	$(BIN)/python -m benchmarks.crash $(ARGS)

faults: $(INSTALLED)
	$(BIN)/python -m benchmarks.faults $(ARGS)

hostile: $(INSTALLED)
	$(BIN)/python -m benchmarks.hostile $(ARGS)

long-run: $(INSTALLED)
	$(BIN)/python -m benchmarks.long_run $(ARGS)

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $(INSTALLED)

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
