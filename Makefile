# Thin: the same commands as CI. VENV and PYTHON may be set; ARGS is handed to cortexd or pytest.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INPUTS := constraints.txt setup.cfg pyproject.toml setup.py $(wildcard engine/kernels/cpu/*.cpp engine/kernels/cpu/*.h)

# A machine may stall for longer than the product's own deadlines. A test that failed once is run
# again, and its first failure shown, so that it is seen and mended.
AGAIN := --reruns 1 --rerun-show-tracebacks

.PHONY: setup lint type test chaos bench demo clean

setup: $(VENV)/.ready
demo: $(VENV)/.ready
	$(BIN)/cortexd start --demo $(ARGS)
lint: $(VENV)/.ready-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
type: $(VENV)/.ready-test
	$(BIN)/mypy
test: lint type
	$(BIN)/python -m pytest $(AGAIN) $(ARGS)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/engine/kernels/triton $(AGAIN) $(ARGS)
	$(BIN)/python -m pytest -m "slow and not gpu and not chaos" $(AGAIN) $(ARGS)
chaos: $(VENV)/.ready-test
	$(BIN)/python -m pytest -m chaos -s $(ARGS)
bench: $(VENV)/.ready
	$(BIN)/python -m bench $(ARGS)
clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
# torch first and alone: a range, asked for by another package, could pull another build.
$(VENV)/.ready: $(INPUTS) | $(VENV)/bin/python
	$(PIP) install -q -c constraints.txt torch==2.13.0
	$(PIP) install -q -c constraints.txt -e .
	touch $@
$(VENV)/.ready-test: $(VENV)/.ready
	$(PIP) install -q -c constraints.txt -e '.[test]'
	touch $@
