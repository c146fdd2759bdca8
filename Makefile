# Every target makes .venv first if it is missing or older than setup.py.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The oldest releases that setup.py allows, side by side with the newest ones of .venv.
OLDEST := .venv-oldest
OLDEST_STAMP := $(OLDEST)/.installed
CODE := modeling_dclip tests benchmarks examples hub_cards setup.py train.py eval.py

.PHONY: demo space test test-conformance test-oldest coverage quality style

demo: $(STAMP)
	ACCELERATE_USE_CPU=true $(BIN)/python train.py
space: $(STAMP)
	$(BIN)/python hub_cards/space/app.py
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not conformance"
test-conformance: $(STAMP)
	$(BIN)/python -m pytest -m conformance
test-oldest: $(OLDEST_STAMP)
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n 2 -m "not conformance"
coverage: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not conformance" --cov --cov-report=term --cov-report=html
quality: $(STAMP)
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy
style: $(STAMP)
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

$(STAMP): setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install -e ".[all]"
	touch $@

# Neither the list nor a version is written twice: uv reads setup.py and takes the lowest release of each requirement.
$(OLDEST_STAMP): setup.py
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --upgrade pip uv
	$(OLDEST)/bin/uv pip install --python $(OLDEST)/bin/python --upgrade --resolution lowest-direct -e ".[all]"
	touch $@
