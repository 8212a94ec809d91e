# Two commands: `make demo` shows the system at work, `make test` checks it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help demo test setup clean

help:
	@echo "make demo    set-up, then: encode real images, train, evaluate, ask one question"
	@echo "make test    set-up, then: ruff, mypy and the whole test suite"
	@echo "make setup   a virtual environment in $(VENV) with all that both need"
	@echo "make clean   remove it"

demo: $(INSTALLED)
	$(BIN)/python pipeline.py run recipes/demo.yaml
	$(BIN)/python pipeline.py predict runs/demo --image docs/example.png --ask "what shape is in the image?"
	$(BIN)/python pipeline.py show runs/demo

# three processes: tests that start processes of their own wait, and two would leave cores idle
test: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p epalm
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 3 --dist loadfile

setup: $(INSTALLED)

# constraints.txt records the versions that were tested together; pyproject.toml has lower bounds
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "epalm needs Python 3.11 or newer: make PYTHON=python3.11 …")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	mkdir -p .types && ln -sfn .. .types/epalm
	touch $@

clean:
	rm -rf $(VENV) .types build *.egg-info
