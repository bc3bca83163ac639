# make serve    the demo model, served on this machine          (PORT=8123 make serve, CONFIG=configs/dense.yaml ...)
# make test     everything CI runs: the checks, then all tests
# make check    format, lint, types, import directions
# make format   let ruff rewrite what it can
# make bench-chaos   what clients notice when processes die (45 minutes, on an idle machine)
# make fuzz     hostile bytes against the frames, for a minute          make check-gpu-api   our calls of NCCL against cupy

PYTHON ?= python3
VENV   ?= .venv
CONFIG ?= configs/demo.yaml
BIN    := $(VENV)/bin

.PHONY: serve test check format bench-chaos check-gpu-api fuzz
.SILENT:

serve: $(VENV)/serve.stamp
	exec $(BIN)/tradewind serve $(CONFIG) $(if $(PORT),--port $(PORT))

test: check
	$(BIN)/python -m pytest

check: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/test.stamp
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench-chaos: $(VENV)/bench.stamp
	mkdir -p build
	$(BIN)/python bench/chaos.py --json build/chaos.json --plot build/chaos.png --logs build/chaos-logs

# pip, not a resolver of its own: it finds the CPU build of torch where one was put for it.
$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; ok = (3, 11) <= sys.version_info[:2] <= (3, 13); sys.exit(None if ok else \
	    f"Tradewind needs Python 3.11 to 3.13, but $(PYTHON) is {sys.version.split()[0]}; try PYTHON=python3.12 make")'
	echo "Making a virtual environment in $(VENV)"
	$(PYTHON) -m venv $(VENV)

$(VENV)/serve.stamp: pyproject.toml | $(VENV)/bin/python
	echo "Installing Tradewind and what it needs into $(VENV) (about two minutes, once)"
	$(BIN)/pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/test.stamp: pyproject.toml | $(VENV)/bin/python
	echo "Installing Tradewind and what its tests need into $(VENV) (about two minutes, once)"
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[test]'
	touch $@ $(VENV)/serve.stamp

$(VENV)/bench.stamp: pyproject.toml | $(VENV)/bin/python
	echo "Installing Tradewind and what its benchmarks need into $(VENV) (about two minutes, once)"
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[bench]'
	touch $@ $(VENV)/serve.stamp

check-gpu-api: $(VENV)/test.stamp
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[gpu]'
	$(BIN)/python -m pytest tests/router/test_nccl_api.py

fuzz: $(VENV)/test.stamp
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[fuzz]'
	$(BIN)/python tests/router/links/fuzz_frames.py -max_total_time=60
