# make demo   the whole path on generated scenes, offline, on a CPU
# make test   the tests
# make check  lint and types
# make docs   the documentation, strictly, into site/
# make bench  the benchmarks on this machine, into benchmarks/results (DATA: folder of the HLS water tiles and scenes)
# make study  the accuracy study, or what is left of it, into benchmarks/results/study
# Each makes .venv first if it is missing or the project's requirements changed.
PYTHON ?= python3
BIN := .venv/bin
DATA ?= data
DEVICE ?= cpu

.PHONY: demo test check docs bench study

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[peft,onnx,test,docs,notebooks,bench,dev]'
	touch $@

demo: .venv/.installed
	$(BIN)/terratorch-simpler demo --output_dir demo

test: .venv/.installed
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

check: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/.installed
	$(BIN)/python -m mkdocs build --strict

bench: .venv/.installed
	$(BIN)/python -m benchmarks.speed --device $(DEVICE) --profile
	$(BIN)/python -m benchmarks.selection_overhead --device $(DEVICE)
	$(BIN)/python -m benchmarks.cka_packages --device $(DEVICE)
	$(BIN)/python -m benchmarks.share_of_training --device $(DEVICE) --data $(DATA)/hls_water
	$(BIN)/python -m benchmarks.evidence

study: .venv/.installed
	$(BIN)/python -m benchmarks.study $(DATA) -o benchmarks/results/study
	$(BIN)/python -m benchmarks.evidence
