# The first two are for newcomers: `make demo` trains a model, `make test` passes the tests.
PYTHON ?= python3
VENV := .venv
BENCH := .venv-bench
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet install --constraint constraints.txt
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

.PHONY: demo test test-distributed lint bench bench-doctor campaign clean

demo: $(VENV)/epochal
	$(BIN)/epochal demo

test: $(VENV)/test
	$(TEST) -m "not distributed"

test-distributed: $(VENV)/test
	$(TEST) -m distributed

lint: $(VENV)/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check

# Side by side with loops written by hand and with other trainers, which are installed for this alone; docs/performance.md
# has what came of it. `make bench WORKS="digits mnist"` for others.
WORKS ?= seed
bench: $(BENCH)/bench
	OMP_NUM_THREADS=1 $(BENCH)/bin/python -m benchmarks.speed $(WORKS) \
		--arms seed hand bare bare_graph epochal compiled lightning transformers accelerate skorch ignite keras poutyne

# Faulty and healthy programs, and what the doctor says of them; docs/doctor.md has what came of it.
bench-doctor: $(VENV)/test
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.faults

# Hours of trying to lose something; docs/reliability.md has what came of it. `make campaign ROWS="r1 r5"` runs some.
campaign: $(VENV)/test
	OMP_NUM_THREADS=1 $(BIN)/python -m campaigns $(ROWS)

clean:
	rm -rf $(VENV) $(BENCH)

# Each of these files is the mark of a finished installation; a second call finds it and goes on.
$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/epochal: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable .
	touch $@

$(VENV)/test: pyproject.toml constraints.txt examples/requirements.txt | $(VENV)/bin/python
	$(PIP) --editable ".[test]"
	$(PIP) --no-deps --requirement examples/requirements.txt
	touch $@ $(VENV)/epochal

$(BENCH)/bench: pyproject.toml constraints.txt examples/requirements.txt benchmarks/requirements.txt
	$(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/python -m pip --disable-pip-version-check --quiet install --constraint constraints.txt \
		--editable ".[test]" --requirement benchmarks/requirements.txt
	$(BENCH)/bin/python -m pip --disable-pip-version-check --quiet install --no-deps --requirement examples/requirements.txt
	touch $@
