# Each target sets up .venv itself when it is missing or out of date. On a machine without a GPU, PyTorch's CPU build
# is smaller: `make test TORCH_ARGS="--index-url <the CPU index that pytorch.org names>"`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH_ARGS ?=
DEMO_OUTPUT ?= output/demo
STAMP := $(VENV)/.installed

# Threads that wait for each other sleep instead of spinning. Spinning was about a fifth faster on an idle machine,
# and at times several times slower on one where something else ran, as on a laptop (docs/kernels.md).
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: help setup demo test test-fast bench growth breakages compile-check gpu-check lint format clean

help:
	@echo "make demo       train a small Mask R-CNN on generated images, evaluate it, draw pictures (CPU, < 10 minutes)"
	@echo "make test       all tests, linter and type checker"
	@echo "make bench      pytest-benchmark comparisons of the kernels, a table and a chart in output/bench"
	@echo "make growth     time and memory of four operators over four decades of input, drawn"
	@echo "make breakages  break the kernels line by line: the tests must notice (C++ ones compile: minutes)"
	@echo "make compile-check  every Triton kernel in every type for sm_80, sm_90, sm_100, gfx942: no spills"
	@echo "make gpu-check  everything that needs a GPU"
	@echo "make lint | format | clean"

setup: $(STAMP)

$(STAMP): pyproject.toml setup.py constraints.txt $(wildcard kernels/csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $$(grep '^torch==' constraints.txt) $(TORCH_ARGS)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev,fast]"
	@touch $@

demo: $(STAMP)
	$(BIN)/python -m fastrcnn.data.shapes --output $(DEMO_OUTPUT)/shapes --num-train 600 --num-val 100 --image-size 192 --overwrite
	$(BIN)/python -m fastrcnn.train --config-file configs/demo_shapes.yaml --overwrite OUTPUT_DIR $(DEMO_OUTPUT)/run \
	    DATASETS.TRAIN "('$(DEMO_OUTPUT)/shapes/annotations/instances_train.json@$(DEMO_OUTPUT)/shapes/images',)" \
	    DATASETS.TEST "('$(DEMO_OUTPUT)/shapes/annotations/instances_val.json@$(DEMO_OUTPUT)/shapes/images',)"
	@echo "Pictures: $(DEMO_OUTPUT)/run/inference"

test: lint
	$(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist loadfile

test-fast: $(STAMP)
	$(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist loadfile -m "not slow"

bench: $(STAMP)
	mkdir -p output/bench
	$(BIN)/python -m pytest benchmarks -q --benchmark-columns=min,median,rounds --benchmark-group-by=group \
	    --benchmark-sort=min --benchmark-json=output/bench/bench.json
	$(BIN)/python -m benchmarks.report output/bench/bench.json --output output/bench

growth: $(STAMP)
	$(BIN)/python -m benchmarks.growth --output output/growth

breakages: $(STAMP)
	$(BIN)/python -m tests.kernels.breakages.run

compile-check: $(STAMP)
	FASTRCNN_COMPILE_ALL=1 $(BIN)/python -m pytest -q tests/kernels/test_compile_for_gpu.py

gpu-check: $(STAMP)
	$(BIN)/python -m benchmarks.gpu_check

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist *.egg-info kernels/*.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks output
	rm -f kernels/fastrcnn_kernels/_C*.so
	find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +
