# make demo: trains a LoRA on the bundled tiny FLUX.   make test: runs the tests.   Nothing but Python 3.11+ needed.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test test-all quality docs clean

demo: $(VENV)/.installed
	$(BIN)/python examples/train_flux_mixgrpo.py $(ARGS)

test: $(VENV)/.test
	$(BIN)/python -m pytest $(ARGS)

test-all: $(VENV)/.test
	$(BIN)/python -m pytest -m "slow or not slow" $(ARGS)

quality: $(VENV)/.quality
	$(BIN)/ruff check src examples tests
	$(BIN)/ruff format --check src examples tests
	$(BIN)/mypy

# The figures of docs/theory.md and docs/windows.md; those of the other pages come from the commands that these name.
docs: $(VENV)/.installed
	$(BIN)/python examples/theory_plots.py --output docs/images

# torch is installed first and by its exact version, so that nothing pulls in another build of it.
$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; assert sys.version_info >= (3, 11), 'Python 3.11 or newer is needed: make PYTHON=...'"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $$(grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test,ocr]"
	touch $@

$(VENV)/.quality: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[quality]"
	touch $@

clean:
	rm -rf $(VENV) outputs build src/*.egg-info
