# Everything runs in .venv, which each target makes when it is not there. PYTHON may name another interpreter (3.10 to 3.12).
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python -m

.PHONY: quickstart test test-slow lint types docs clean

quickstart: $(VENV)/.installed
	$(RUN) tandem quickstart

test: $(VENV)/.installed-dev
	$(RUN) pytest -n 2 --dist loadfile -m "not slow"

test-slow: $(VENV)/.installed-dev
	$(RUN) pytest -m slow

lint: $(VENV)/.installed-dev
	$(RUN) ruff check .
	$(RUN) ruff format --check .

types: $(VENV)/.installed-dev
	$(RUN) mypy

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(RUN) mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) build dist *.egg-info

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(RUN) pip install --quiet --upgrade pip

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml constraints.txt
	$(RUN) pip install --quiet -c constraints.txt -e '.[torch,mindspore]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/bin/python pyproject.toml constraints.txt
	$(RUN) pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

$(VENV)/.installed-docs: $(VENV)/bin/python pyproject.toml constraints.txt
	$(RUN) pip install --quiet -c constraints.txt -e '.[docs]'
	touch $@
