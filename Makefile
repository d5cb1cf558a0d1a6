# make demo          the whole path on generated scenes, offline, on a CPU
# make test          the tests
# make check         lint and types
# make docs          the documentation, strictly, into site/
# make bench         the benchmarks, into benchmarks/results (DATA: folder of hls_water, ukis_csmask and scenes; DEVICE: cpu or cuda)
# make study         the accuracy study on DATA, or what is left of it, into benchmarks/results/study
# make test-minimum  the tests with the oldest versions that pyproject.toml allows, without onnx (on Python 3.11, for which all have wheels)
# make test-plain    the tests without the extras peft and onnx
# make gpu           what only a GPU can tell, in ten minutes: PASS and FAIL lines, and benchmarks/results/gpu.json
#                    (PYTHON_GPU: its Python; SITE: folder of further packages, made of wheels/ if that is there;
#                    GPU_DEVICE: cuda; GPU_ARGS: see python -m benchmarks.gpu --help)
# make gpu-wheels    wheels/: what a GPU machine with PyTorch, torchvision and Lightning but without a registry lacks
#                    (GPU_HAS: file with what pip list --format=freeze prints there, to leave out more; GPU_PYTHON: 3.12)
# Each makes its virtual environment first if it is missing or the project's requirements changed.
PYTHON ?= python3
BIN := .venv/bin
DATA ?= data
DEVICE ?= cpu

.PHONY: demo test check docs bench study test-minimum test-plain

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

PYTHON_GPU ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,python3)
GPU_PYTHON ?= 3.12
GPU_DEVICE ?= cuda
SITE ?= $(if $(wildcard $(BIN)/python),,wheels/site)

.PHONY: gpu gpu-wheels

wheels/site: $(wildcard wheels/*.whl)
	rm -rf $@
	$(PYTHON_GPU) -m pip install --quiet --disable-pip-version-check --no-index --no-deps --target $@ $^

gpu: $(if $(wildcard wheels/*.whl),$(filter wheels/site,$(SITE)))
	PYTHONPATH="$(abspath $(SITE))$${PYTHONPATH:+:$$PYTHONPATH}" \
		$(PYTHON_GPU) -m benchmarks.gpu --device $(GPU_DEVICE) $(GPU_ARGS)

gpu-wheels: .venv/.installed
	$(BIN)/python -m benchmarks.gpu.wheels wheels --python $(GPU_PYTHON) $(if $(GPU_HAS),--has $(GPU_HAS))
