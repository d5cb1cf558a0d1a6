# make demo          pruned against intact on generated scenes: select, fit, test, predict, one table; offline, on a CPU
# make test          all tests except those in tests/slow.txt
# make test-all      the tests in tests/slow.txt
# make check         lint and types
# make docs          run the notebooks and build the documentation with mkdocs --strict into site/
# make bench         run the benchmarks into benchmarks/results (DATA: folder of hls_water, ukis_csmask and scenes; DEVICE: cpu or cuda)
# make study         run or resume the accuracy study on DATA into benchmarks/results/study
# make test-newest   the tests with the newest TerraTorch, on Python 3.13 or 3.12 (PYTHON_NEWEST, if it is neither in PATH nor in pyenv)
# make environments  create the environments of make test and make test-newest (with --jobs 2 in parallel)
# make test-minimum  the tests with the oldest versions that pyproject.toml allows, without onnx (on Python 3.11, for which all have wheels)
# make test-plain    the tests without the extras peft and onnx
# make gpu           run the GPU checks in ten minutes: PASS and FAIL lines, and benchmarks/results/gpu.json
#                    (PYTHON_GPU: its Python; SITE: folder of further packages, built from wheels/ if it exists;
#                    GPU_DEVICE: cuda; GPU_ARGS: see python -m benchmarks.gpu --help)
# make gpu-wheels    download wheels/ for a GPU machine that has PyTorch, torchvision and Lightning but no package registry
#                    (GPU_HAS: output of pip list --format=freeze there, to skip installed packages; GPU_PYTHON: 3.12)
# Each target first creates its virtual environment if it is missing or the project's requirements changed. PYTHON is the interpreter
# of .venv and selects the versions: constraints/python3.11.txt or constraints/python3.12+.txt.
PYTHON ?= python3
# A name in PATH may be a pyenv shim without a Python behind it, so each candidate is run.
PYTHON_NEWEST ?= $(shell for version in 3.13 3.12; do \
	for python in "$$(command -v python$$version)" $$(ls -d "$$(pyenv root)"/versions/$$version.*/bin/python$$version | sort -rV); do \
	if "$$python" -c ''; then echo "$$python"; exit; fi; done; done 2>/dev/null)
BIN := .venv/bin
DATA ?= data
DEVICE ?= cpu
TESTS := -m pytest --numprocesses 2 --dist worksteal
EVERYTHING := --editable '.[peft,onnx,test,docs,notebooks,bench,dev]'
PIP := -m pip install --quiet --disable-pip-version-check
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
NEWEST := constraints/python3.12+.txt
CONSTRAINTS := $(if $(filter 3.10 3.11,$(VERSION)),constraints/python3.11.txt,$(NEWEST))

.PHONY: demo test test-all check docs bench study environments test-newest test-minimum test-plain

# The stamp holds the Python version; an environment of another version is recreated.
INSTALLED := .venv/.installed-$(VERSION)
$(INSTALLED): pyproject.toml $(CONSTRAINTS)
	test -x .venv/bin/python$(VERSION) || $(PYTHON) -m venv --clear .venv
	$(BIN)/python $(PIP) --constraint $(CONSTRAINTS) $(EVERYTHING)
	touch $@

demo: $(INSTALLED)
	$(BIN)/terratorch-simpler demo --output_dir demo

test: $(INSTALLED)
	$(BIN)/python $(TESTS)

# Three workers on two cores: these tests wait for subprocesses.
test-all: $(INSTALLED)
	$(BIN)/python $(TESTS) --numprocesses 3 --dist loadfile -m 'slow and not gpu'

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(INSTALLED)
	EXECUTE_NOTEBOOKS=1 OMP_NUM_THREADS=1 $(BIN)/python -m mkdocs build --strict

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.speed --device $(DEVICE) --profile
	$(BIN)/python -m benchmarks.selection_overhead --device $(DEVICE)
	$(BIN)/python -m benchmarks.cka_packages --device $(DEVICE)
	$(BIN)/python -m benchmarks.share_of_training --device $(DEVICE) --data $(DATA)/hls_water
	$(BIN)/python -m benchmarks.evidence

study: $(INSTALLED)
	$(BIN)/python -m benchmarks.study $(DATA) -o benchmarks/results/study
	$(BIN)/python -m benchmarks.evidence

.venv-newest/.installed: pyproject.toml $(NEWEST)
	@"$(PYTHON_NEWEST)" -c 'import sys; sys.exit(not (3, 12) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null || { \
		echo "Found no Python 3.13 or 3.12 that runs ($(or $(PYTHON_NEWEST),none in PATH or pyenv)), expected one for the tests" \
		"with the newest TerraTorch: install it, or give its path as PYTHON_NEWEST=..." >&2; exit 1; }
	"$(PYTHON_NEWEST)" -m venv --clear .venv-newest
	.venv-newest/bin/python $(PIP) --constraint $(NEWEST) $(EVERYTHING)
	touch $@

environments: $(INSTALLED) .venv-newest/.installed

test-newest: .venv-newest/.installed
	.venv-newest/bin/python $(TESTS)

# torchvision is a dependency of TerraTorch only; it is listed so that it matches the oldest torch. No onnx: it needs a newer PyTorch.
.venv-minimum/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-minimum
	.venv-minimum/bin/python $(PIP) uv
	.venv-minimum/bin/uv pip install --quiet --python .venv-minimum --upgrade --resolution lowest-direct \
		--editable '.[peft,test]' 'torchvision>=0.21'
	touch $@

test-minimum: .venv-minimum/.installed
	.venv-minimum/bin/python $(TESTS)

.venv-plain/.installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv --clear .venv-plain
	.venv-plain/bin/python $(PIP) --constraint $(CONSTRAINTS) --editable '.[test]'
	touch $@

test-plain: .venv-plain/.installed
	.venv-plain/bin/python $(TESTS)

PYTHON_GPU ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,python3)
GPU_PYTHON ?= 3.12
GPU_DEVICE ?= cuda
SITE ?= $(if $(wildcard $(BIN)/python),,wheels/site)

.PHONY: gpu gpu-wheels

wheels/site: $(wildcard wheels/*.whl)
	rm -rf $@
	$(PYTHON_GPU) $(PIP) --no-index --no-deps --target $@ $^

gpu: $(if $(wildcard wheels/*.whl),$(filter wheels/site,$(SITE)))
	PYTHONPATH="$(abspath $(SITE))$${PYTHONPATH:+:$$PYTHONPATH}" \
		$(PYTHON_GPU) -m benchmarks.gpu --device $(GPU_DEVICE) $(GPU_ARGS)

gpu-wheels: $(INSTALLED)
	$(BIN)/python -m benchmarks.gpu.wheels wheels --python $(GPU_PYTHON) $(if $(GPU_HAS),--has $(GPU_HAS))
