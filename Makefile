# make demo: trains a LoRA on the bundled tiny FLUX.   make test: runs the tests.   Nothing but Python 3.11+ needed.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Test processes, each with one thread: as many as there are cores, or 0 for none beside the main one
JOBS ?= auto
PYTEST = $(BIN)/python -m pytest --numprocesses $(JOBS) --durations=15
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# Instruction sets and numbers of threads that `make test-isa` runs the tests with
ISA := ATEN_CPU_CAPABILITY=default ATEN_CPU_CAPABILITY=avx2 MKL_CBWR=COMPATIBLE \
	OMP_NUM_THREADS=1 OMP_NUM_THREADS=2 OMP_NUM_THREADS=4
ISA += $(shell grep -qs avx512f /proc/cpuinfo && echo ATEN_CPU_CAPABILITY=avx512)

# An environment of its own: the tests of the other one run without DeepSpeed
DEEPSPEED_VENV ?= .venv-deepspeed

.PHONY: demo test test-all test-isa test-deepspeed soak quality docs figures clean

demo: $(VENV)/.installed
	$(BIN)/diffusers-mixgrpo train $(ARGS)

test: $(VENV)/.test
	$(PYTEST) $(ARGS)

test-all: $(VENV)/.test
	$(PYTEST) -m "slow or not slow" $(ARGS)

test-isa: $(VENV)/.test
	for setting in $(ISA); do \
		echo "== $$setting"; \
		env OMP_WAIT_POLICY=passive $$setting $(PYTEST) $(ARGS) || exit 1; \
	done

test-deepspeed:
	$(MAKE) VENV=$(DEEPSPEED_VENV) $(DEEPSPEED_VENV)/.deepspeed
	DS_ACCELERATOR=cpu $(DEEPSPEED_VENV)/bin/python -m pytest tests/training/test_sharding.py $(ARGS)

# A long run that is killed again and again, against the same run left alone. Takes half an hour on two cores.
soak: $(VENV)/.test
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python tests/soak.py --output outputs/soak $(ARGS)

quality: $(VENV)/.quality
	$(BIN)/ruff check src examples tests docs
	$(BIN)/ruff format --check src examples tests docs
	$(BIN)/mypy

# The site. Warnings, such as links to nothing, are errors.
docs: $(VENV)/.docs
	$(BIN)/python -m sphinx --builder html --nitpicky --fail-on-warning --keep-going docs docs/_build

# The figures of docs/theory.md and docs/windows.md. Each other page names the command that makes its figures.
figures: $(VENV)/.installed
	$(BIN)/python examples/studies/theory_plots.py --output docs/images

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

$(VENV)/.deepspeed: $(VENV)/.test
	DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(BIN)/python -m pip install --quiet --no-build-isolation \
		--constraint constraints.txt --editable ".[deepspeed]" setuptools wheel
	touch $@

$(VENV)/.quality: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[quality]"
	touch $@

$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	touch $@

clean:
	rm -rf $(VENV) outputs build docs/_build src/*.egg-info
