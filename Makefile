# make train   set up, then train the U-Net on the built-in data on four MPI ranks
# make train REAL=FOLDER   the same, and segment a scan of a BraTS case at the end
# make test    set up, then run every test
# make docs    set up, then build the book into build/docs; all its code runs, on this machine
# make check   the tests, ruff and mypy
# Needs Python 3.11 or newer and make. Everything is installed into .venv.

PYTHON ?= python3
RANKS ?= 4
REAL ?=
BIN := .venv/bin

.PHONY: train test docs check lint setup clean clean-cache

train: setup
	$(BIN)/mpirun -n $(RANKS) $(BIN)/python -m tinyunet.train $(if $(REAL),--real '$(REAL)')

# For two cores. Those of commands and ranks come after the others, which have compiled the kernels: some of
# them watch the clock. They wait for each other, too: three at a time keep two cores busy. "worksteal" runs
# the tests of a file in one process, where they share trainings, until another process has none left.
test: setup
	$(BIN)/python -m pytest -n 2 --dist worksteal --ignore=tests/commands --ignore=tests/parallel
	$(BIN)/python -m pytest -n 3 --dist worksteal tests/commands tests/parallel

docs: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	$(BIN)/python -m sphinx -W --keep-going -q docs build/docs
	@echo "build/docs/index.html: open it in a browser"

check: lint test

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

setup: .venv/installed

.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "tinyunet needs Python 3.11 or newer; try: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[mpi,tensorflow,viz,dev]'
	@touch $@

clean-cache:
	find kernels tinyunet tests -name '*.nb[ic]' -delete

clean: clean-cache
	rm -rf .venv build *.egg-info
