# make demo          the whole path on generated scenes, offline, on a CPU
# make test          the tests
# make check         lint and types
# make test-minimum  the tests with the oldest versions that pyproject.toml allows, without the extra onnx (on Python 3.11, for which all have wheels)
# make test-plain    the tests without the extras peft and onnx
# Each makes its virtual environment first if it is missing or the project's requirements changed.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check test-minimum test-plain

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

# torchvision is TerraTorch's dependency, not ours: named here so that it is as old as torch. No onnx: it needs a newer PyTorch.
.venv-minimum/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-minimum
	.venv-minimum/bin/python -m pip install --quiet --disable-pip-version-check uv
	.venv-minimum/bin/uv pip install --quiet --python .venv-minimum --upgrade --resolution lowest-direct \
		--editable '.[peft,test]' 'torchvision>=0.21'
	touch $@

test-minimum: .venv-minimum/.installed
	.venv-minimum/bin/python -m pytest --numprocesses 2 --dist loadfile

.venv-plain/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-plain
	.venv-plain/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	touch $@

test-plain: .venv-plain/.installed
	.venv-plain/bin/python -m pytest --numprocesses 2 --dist loadfile
