# make demo   the whole path on generated scenes, offline, on a CPU
# make test   the tests
# make check  lint and types
# Each makes .venv first if it is missing or the project's requirements changed.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[peft,onnx,test,dev]'
	touch $@

demo: .venv/.installed
	$(BIN)/terratorch-simpler demo --output_dir demo

test: .venv/.installed
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

check: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
