# make demo: the main job. make test: lint, types, quick tests. make docs: the site. make pages: every page, and screenshots. make bench: beside the peers, DATA=folder for real weights.
# make dist: wheel and sdist, checked and tried in an empty environment. make test-oldest: the quick tests with the oldest versions that pyproject.toml allows.
# Each sets up its own virtual environment.
PYTHON ?= python3
VENV := .venv
BENCH := .venv-bench
DIST := .venv-dist
OLDEST := .venv-oldest
BIN := $(VENV)/bin
# Tests at once, each with one thread and about 1.3 GB.
WORKERS ?= 2
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)

.PHONY: demo docs pages test test-all test-oldest bench dist lint format clean

# Torch comes first and alone: resolved together with the rest, pip may choose a newer build with gigabytes of CUDA.
$(VENV)/done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "torch==$(TORCH)" -c constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[all]"
	touch $@

$(VENV)/dev: $(VENV)/done
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

demo: $(VENV)/done
	$(BIN)/foveate demo --out demo

# Every page from small runs, with a contact sheet of screenshots, for the eyes of whoever changes a page.
pages: $(VENV)/dev
	$(BIN)/python tests/every_page.py pages

$(VENV)/docs: $(VENV)/done
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	touch $@

# The site, warnings as errors, into site/. Open site/index.html, or serve it with: .venv/bin/mkdocs serve
docs: $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	! grep -rlE '<(script|link|img|iframe)[^>]*(src|href)="?(https?:)?//' site --include='*.html'  # it loads nothing from elsewhere

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -n $(WORKERS)

test-all: lint
	$(BIN)/python -m pytest -m ""

# PyTorch stays: the oldest builds that pip finds bring gigabytes of CUDA.
$(OLDEST)/done: pyproject.toml constraints.txt tests/oldest.py
	$(PYTHON) -m venv $(OLDEST)
	grep -E "^(torch|torchvision)==" constraints.txt > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python tests/oldest.py >> $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check "torch==$(TORCH)" -c $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -c $(OLDEST)/constraints.txt -e ".[dev]"
	touch $@

test-oldest: $(OLDEST)/done
	$(OLDEST)/bin/python -m pytest -n $(WORKERS)

$(BENCH)/done: pyproject.toml constraints.txt benchmarks/requirements.txt
	$(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/python -m pip install --quiet --disable-pip-version-check "torch==$(TORCH)" -c constraints.txt
	$(BENCH)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[all]" -r benchmarks/requirements.txt
	$(BENCH)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps quantus
	touch $@

# ROWS=cams,score for some of them, ARGS=--give-back or another of its options. Stopped and started again, it goes on where it stopped.
bench: $(BENCH)/done
	$(BENCH)/bin/python -m benchmarks.peers $(if $(DATA),"$(DATA)") --rows "$(or $(ROWS),all)" --out bench $(ARGS)

$(DIST)/done: constraints.txt
	$(PYTHON) -m venv $(DIST)
	$(DIST)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt build twine
	touch $@

# ARGS=--no-demo for the short form.
dist: $(VENV)/done $(DIST)/done
	rm -rf build dist
	$(DIST)/bin/python -m build --outdir dist .
	$(DIST)/bin/python -m twine check --strict dist/*
	$(BIN)/python tests/dist.py dist $(ARGS)

format: $(VENV)/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(BENCH) $(DIST) $(OLDEST) dist demo pages site build *.egg-info src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
