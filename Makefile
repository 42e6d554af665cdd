# Each target sets up .venv itself when it is missing. PYTHON picks the interpreter.
PYTHON ?= python3
NAME ?= gla
SCALE ?= small
SUITE ?= cpu
PORT ?= 8000
CONSTRAINTS ?= constraints.txt
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PYDEVD_DISABLE_FILE_VALIDATION := 1

.PHONY: book test chapter bench bench-report serve clean setup

setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Gatebook needs Python 3.11 or newer; set PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[book,test]'
	touch $@

book: setup  ## run chapters whose evidence is stale, build the HTML, print where it is
	$(BIN)/gatebook refresh
	$(BIN)/jupyter-book build . -W -n --keep-going --quiet
	@echo "The book is at _build/html/index.html (make serve shows it on http://localhost:$(PORT))"

test: setup  ## everything that CI runs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest tests --ignore=tests/book --durations=10 -q
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --durations=10 \
	  --nbval --nbval-sanitize-with tests/nbval.cfg --nbval-cell-timeout 300 chapters
	$(BIN)/gatebook verify
	$(BIN)/jupyter-book build . -W -n --keep-going --quiet
	$(BIN)/python -m pytest tests/book --durations=10 -q

chapter: setup  ## make chapter NAME=gla SCALE=small
	$(BIN)/gatebook run $(NAME) --scale $(SCALE)

bench: setup  ## measures the kernels and records it; make bench SUITE=gpu on a machine with one
	$(BIN)/python benchmarks/kernels.py $(SUITE)

bench-report: setup  ## make -s bench-report: every recorded benchmark, tab-separated
	@$(BIN)/python benchmarks/report.py

serve: book
	$(BIN)/python -m http.server $(PORT) --bind 127.0.0.1 --directory _build/html

clean:
	rm -rf _build runs .venv .pytest_cache .ruff_cache
