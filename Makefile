# `make demo` and `make test` are all a fresh machine with Python 3.11 needs: each sets up .venv by itself.
PYTHON ?= python3.11
VENV ?= .venv
TORCH ?= 2.13.0
BIN = $(VENV)/bin
# Accelerate gives a process one CPU thread unless told otherwise.
THREADS ?= $(shell getconf _NPROCESSORS_ONLN)

.PHONY: demo test lint docs clean

LAUNCH = $(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
	--num_cpu_threads_per_process $(THREADS)

demo: $(VENV)/.demo
	$(LAUNCH) examples/train_unconditional_stf.py @examples/configs/digits_demo.txt \
		--output_dir digits-stf --overwrite_output_dir
	$(LAUNCH) examples/train_consistency_stf.py @examples/configs/digits_one_step.txt \
		--pretrained_model_name_or_path digits-stf --output_dir digits-one-step --overwrite_output_dir

test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadgroup

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.docs
	$(BIN)/sphinx-build -q -W --keep-going docs docs/_build

# Without an NVIDIA GPU the CPU build, wherever it is found; PyPI's own is the CPU build on macOS and CUDA's on Linux.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	if command -v nvidia-smi >/dev/null; then $(BIN)/pip install torch==$(TORCH); \
	else $(BIN)/pip install torch==$(TORCH)+cpu \
	|| $(BIN)/pip install torch==$(TORCH)+cpu --index-url https://download.pytorch.org/whl/cpu \
	|| $(BIN)/pip install torch==$(TORCH); fi
	touch $@

$(VENV)/.demo: $(VENV)/.torch setup.cfg
	$(BIN)/pip install -e ".[digits,trackers]"
	touch $@

$(VENV)/.test: $(VENV)/.torch setup.cfg
	$(BIN)/pip install -e ".[test]"
	touch $@

$(VENV)/.dev: $(VENV)/.torch setup.cfg
	$(BIN)/pip install -e ".[dev]"
	touch $@

$(VENV)/.docs: $(VENV)/.torch setup.cfg
	$(BIN)/pip install -e ".[docs]"
	touch $@

clean:
	rm -rf $(VENV) digits-stf digits-one-step docs/_build
