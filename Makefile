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

# Environments of their own: the tests of the other one run without DeepSpeed, and with current versions
DEEPSPEED_VENV ?= .venv-deepspeed
OLDEST_VENV ?= .venv-oldest
HPSV2_VENV ?= .venv-hpsv2
# These two fit each other; another torch needs another torchvision.
HPSV2_TORCH ?= torch==2.14.1 torchvision==0.29.1
# open_clip's, which the wheel of hpsv2 has left out
HPSV2_VOCABULARY = open_clip/bpe_simple_vocab_16e6.txt.gz
# torch of `make test-oldest`: all other packages have the lowest version that setup.cfg allows
OLDEST_TORCH ?= $(shell grep '^torch==' constraints.txt)
OLDEST_TESTS = tests/core tests/policies tests/training tests/test_mixgrpo_trainer.py tests/test_mixgrpo_config.py

.PHONY: demo test test-all test-isa test-deepspeed test-oldest test-hpsv2 soak quality docs figures dist clean

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

# The core tests with the lowest versions that setup.cfg allows
test-oldest: $(OLDEST_VENV)/.installed
	$(OLDEST_VENV)/bin/python -m pytest --numprocesses $(JOBS) $(OLDEST_TESTS) \
		--ignore tests/training/test_distributed.py --ignore tests/training/test_sharding.py $(ARGS)

# Our HPSv2 against the original package, which pins versions that conflict with this package's
test-hpsv2: $(HPSV2_VENV)/.installed
	$(HPSV2_VENV)/bin/python -m pytest tests/rewards/test_hpsv2.py -rs $(ARGS)

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

$(OLDEST_VENV)/.installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(OLDEST_VENV)
	$(OLDEST_VENV)/bin/python -m pip install --quiet $(OLDEST_TORCH) uv
	echo "$(OLDEST_TORCH)" > $(OLDEST_VENV)/torch.txt
	$(OLDEST_VENV)/bin/uv pip install --quiet --python $(OLDEST_VENV)/bin/python --resolution lowest-direct \
		--constraint $(OLDEST_VENV)/torch.txt --editable ".[test]"
	touch $@

$(HPSV2_VENV)/.installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(HPSV2_VENV)
	$(HPSV2_VENV)/bin/python -m pip install --quiet $(HPSV2_TORCH) uv
	grep -v '^torch==' constraints.txt > $(HPSV2_VENV)/constraints.txt
	$(HPSV2_VENV)/bin/uv pip install --quiet --python $(HPSV2_VENV)/bin/python \
		--constraint $(HPSV2_VENV)/constraints.txt $(HPSV2_TORCH) --editable ".[test,hpsv2]"
	$(HPSV2_VENV)/bin/python -m pip install --quiet --no-deps hpsv2==1.2.0
	cd $(HPSV2_VENV)/lib/python3*/site-packages && cp $(HPSV2_VOCABULARY) hpsv2/src/open_clip/
	touch $@

# The sdist and the wheel, checked
dist: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet build twine
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

$(VENV)/.quality: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[quality]"
	touch $@

$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST_VENV) $(HPSV2_VENV) $(DEEPSPEED_VENV) outputs build dist docs/_build src/*.egg-info
