# Everything runs in .venv, which each target makes when it is not there. PYTHON may name another interpreter (3.10 to 3.12).
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python -m
# PyTorch alone, with NumPy 2: an environment of its own, and the tests of what touches arrays most.
NUMPY2 := .venv-numpy2
NUMPY2_TESTS := tests/api tests/bench tests/config tests/backends/test_torch.py tests/checkpoints/test_hf_and_native.py \
	tests/data/test_indexed.py tests/data/preprocess/test_preprocess.py tests/training/test_runs.py

.PHONY: quickstart test test-slow test-numpy2 lint types docs clean

quickstart: $(VENV)/.installed
	$(RUN) tandem quickstart

# Three workers for two cores: jobs of several processes wait for each other much of their time.
test: $(VENV)/.installed-dev
	$(RUN) pytest -n 3 --dist worksteal -m "not slow"

# All parts, or the one named: make test-slow PART=kills (tests/slow_parts.py). Two workers, as there are two cores.
test-slow: $(VENV)/.installed-dev
	$(RUN) pytest -n 2 --dist worksteal -m slow $(if $(PART),--part $(PART))

test-numpy2: $(NUMPY2)/.installed
	$(NUMPY2)/bin/python -m pytest -n 2 --dist loadfile -m "not slow" $(NUMPY2_TESTS)

lint: $(VENV)/.installed-dev
	$(RUN) ruff check .
	$(RUN) ruff format --check .

types: $(VENV)/.installed-dev
	$(RUN) mypy

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(RUN) mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) $(NUMPY2) build dist *.egg-info

# What a failure leaves behind would be taken for an environment.
$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' || \
		{ echo "$(PYTHON) is `$(PYTHON) --version 2>&1`: expected Python 3.10 to 3.12, for example make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV) && $(RUN) pip install --quiet --upgrade pip || { rm -rf $(VENV); exit 1; }

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml constraints.txt
	$(RUN) pip install --quiet -c constraints.txt -e '.[torch,mindspore]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/bin/python pyproject.toml constraints.txt
	$(RUN) pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

$(NUMPY2)/.installed: pyproject.toml constraints.txt constraints-numpy2.txt
	$(PYTHON) -m venv $(NUMPY2)
	grep -vE '^(numpy|pyarrow)==' constraints.txt | cat - constraints-numpy2.txt > $(NUMPY2)/constraints.txt
	$(NUMPY2)/bin/python -m pip install --quiet -c $(NUMPY2)/constraints.txt -e '.[torch,test]'
	touch $@

$(VENV)/.installed-docs: $(VENV)/bin/python pyproject.toml constraints.txt
	$(RUN) pip install --quiet -c constraints.txt -e '.[docs]'
	touch $@
