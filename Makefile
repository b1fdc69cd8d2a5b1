# Every target sets up .venv by itself; nothing has to be installed by hand.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PLUGINS := $(sort $(patsubst %/pyproject.toml,%,$(wildcard plugins/*/pyproject.toml)))
# Some tests wait for processes of their own, so one more than two cores keeps both busy.
JOBS ?= 3
export OMP_NUM_THREADS ?= 1
# Where there are more threads than cores, those that wait for others sleep.
export OMP_WAIT_POLICY ?= PASSIVE
export HF_HUB_OFFLINE ?= 1
# Tests start many processes, each of which would compile every module anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-fast lint bench figures docs wheels clean

demo: $(VENV)/.ready
	$(BIN)/plait run pipelines/demo.yaml

test: $(VENV)/.ready lint
	$(BIN)/pytest -n $(JOBS) --dist worksteal

test-fast: $(VENV)/.ready
	$(BIN)/pytest -n $(JOBS) --dist worksteal -m "not slow"

lint: $(VENV)/.ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.ready
	failed=0; for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script || failed=1; done; exit $$failed

# Runs what is behind the recorded figures again, puts them on record, and makes tables and pictures of the records.
figures: $(VENV)/.ready
	$(BIN)/plait reproduce figures --write
	-$(BIN)/python figures/benchmarks.py
	$(BIN)/python figures/tables.py
	$(BIN)/python figures/pictures.py

docs: $(VENV)/.ready
	$(BIN)/python docs/reference.py
	$(BIN)/mkdocs build --strict --quiet

wheels: $(VENV)/.ready
	rm -rf dist
	for package in . $(PLUGINS); do $(BIN)/python -m build --wheel --no-isolation --outdir dist $$package > /dev/null || exit 1; done

# Everything in one resolution, at the versions that were tested. What pip says goes to the log; a failure is one sentence.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
$(VENV)/.ready: pyproject.toml constraints.txt $(PLUGINS:%=%/pyproject.toml)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null || { \
		echo "set-up failed: $(PYTHON) is not Python 3.11 or newer; name one that is: make PYTHON=python3.12" >&2; exit 1; }
	@mkdir -p $(VENV); echo "setting up $(VENV), which takes a few minutes"
	@{ test -x $(BIN)/python && $(BIN)/python -m pip --version || $(PYTHON) -m venv $(VENV); } > $(VENV)/set-up.log 2>&1 || { \
		echo "set-up failed: $(PYTHON) cannot make a virtual environment; see $(VENV)/set-up.log" >&2; exit 1; }
	@{ $(PIP) pip hatchling editables && $(PIP) --no-build-isolation \
		--editable ".[dev]" $(foreach package,$(PLUGINS),--editable $(package)); } >> $(VENV)/set-up.log 2>&1 || { \
		echo "set-up failed: $$(grep -im 1 '^error: ' $(VENV)/set-up.log || echo pip ended with an error); see $(VENV)/set-up.log" >&2; exit 1; }
	@touch $@

clean:
	rm -rf $(VENV) dist site .plait runs
