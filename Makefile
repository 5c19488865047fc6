# `make help` lists the targets. Needed: make, and Python >= 3.11 with venv; the rest is installed into .venv from hashed locks.
# All paths are relative, so that the checkout may lie in a folder with spaces in its name.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?=
DATA ?=
ARGS ?=
CUDA ?= cuda12
WORKERS ?= 3
TESTS ?= tests
UPGRADE ?=
TORCH := 2.13.0
PEFT := 0.21.2
LM_EVAL := 0.4.13
DATATROVE := 0.10.1
DATASKETCH := 2.0.0
LITELLM := 1.110.2
LANGCHAIN_OPENAI := 1.7.4
SCHEMATHESIS := 4.32.5
GRADIO := 6.31.0
PY := .venv/bin/python

# Settings of the caller's shell that would send packages or imports elsewhere than .venv.
unexport PYTHONPATH PYTHONHOME PIP_TARGET PIP_PREFIX PIP_ROOT
# Without bytecode on disk every process compiles jax and its own modules anew: 2.4 CPU seconds a start.
unexport PYTHONDONTWRITEBYTECODE
export PIP_USER := 0
# Certificates of the system, as pip uses them: a company's proxy signs with its own.
export UV_SYSTEM_CERTS := 1
export UV_NATIVE_TLS := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# An environment is current while its stamp exists: the name is a checksum of the lock, pyproject.toml, the folder
# (editable installs hold its path) and the Python that was asked for. A second call therefore installs nothing.
stamp = .venv/.ready-$(1)-$(shell { cat $(1) pyproject.toml; pwd; echo "$(PYTHON)"; } 2>/dev/null | cksum | tr ' ' -)
CPU_READY := $(call stamp,requirements.lock)
GPU_READY := $(call stamp,requirements-$(CUDA).lock)

# Prints the Python to make .venv with: PYTHON if given, else the first that is new enough and has venv.
define FIND_PYTHON
usable='import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))'
for candidate in $${PYTHON:-python3 python3.13 python3.12 python3.11 python3.14 python}; do
  if "$$candidate" -c "$$usable" >/dev/null 2>&1; then
    exec "$$candidate" -c 'import sys; print(sys.executable)'
  fi
done
echo "No usable Python: given '$${PYTHON:-none; tried python3, python3.11 to 3.14}', wanted Python >= 3.11 with the venv and ensurepip modules." >&2
echo "Install one (on Debian and Ubuntu: apt-get install python3 python3-venv), or name it: make PYTHON=/path/to/python3.12 ..." >&2
exit 1
endef
export FIND_PYTHON PYTHON

# install LOCK STAMP: makes .venv where there is none that fits, then installs the lock with hashes.
# Without dependencies: the lock has them all, some newer than a package asks for (pyproject.toml, tool.uv).
# uv comes from its own hashed lines of the lock (seconds instead of a minute); where it cannot reach an index that pip can, pip installs.
define INSTALL
lock="$$1" stamp="$$2"
version='import sys; print(sys.version_info[:2] >= (3, 11) and sys.version_info[:2])'
if ! have="$$(.venv/bin/python -c "$$version" 2>/dev/null)" || [ "$$have" = False ] || { [ -n "$$PYTHON" ] && [ "$$("$$PYTHON" -c "$$version" 2>/dev/null)" != "$$have" ]; }; then
  python="$$(bash -c "$$FIND_PYTHON")"
  echo "Making .venv with $$python"
  "$$python" -m venv --clear .venv
fi
rm -f .venv/.ready-"$$lock"-*
echo "Installing $$lock into .venv"
awk '/^[^ #]/ { keep = /^uv==/ } keep' "$$lock" > .venv/uv.lock
if .venv/bin/python -m pip install -qq --require-hashes --no-deps -r .venv/uv.lock \
    && .venv/bin/python -m uv pip install --quiet --python .venv/bin/python --require-hashes --no-deps -r "$$lock"; then
  .venv/bin/python -m uv pip install --quiet --python .venv/bin/python --no-deps --no-build-isolation --editable .
else
  echo "uv could not install the lock (message above); installing with pip, which takes about a minute"
  .venv/bin/python -m pip install -qq --require-hashes --no-deps -r "$$lock"
  .venv/bin/python -m pip install -qq --no-deps --no-build-isolation --editable .
fi
touch "$$stamp"
endef
export INSTALL

# Prints what JAX sees; exit 1 with the remedy where that is no GPU.
define CHECK_GPU
import sys
import jax
print("jax", jax.__version__, "sees", ", ".join(f"{d.platform}:{d.id} {d.device_kind}" for d in jax.devices()))
if jax.default_backend() != "gpu":
    sys.exit(
        "JAX sees no GPU. Given: the devices and the driver above; wanted: at least one NVIDIA GPU.\n"
        "Remedy: `nvidia-smi` must list the card (driver >= 525 for CUDA=cuda12, >= 580 for CUDA=cuda13); a container must be\n"
        "started with its GPUs (docker run --gpus all); LD_LIBRARY_PATH and JAX_PLATFORMS must not name another CUDA or the CPU."
    )
endef
export CHECK_GPU

.PHONY: help setup quickstart test test-gpu parity setup-gpu notebook lint format lock

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

$(CPU_READY):
	@bash -euo pipefail -c "$$INSTALL" install requirements.lock "$@"

setup: $(CPU_READY)  ## .venv with everything for a CPU, tests and notebooks included (PYTHON=python3.12 names the interpreter)

quickstart: setup  ## the whole chain on a tiny model in minutes; DATA=my.jsonl runs it on your own file, ARGS="--fresh" anew
	@$(PY) -m experiments.tiny $(if $(DATA),--data "$$DATA") $(ARGS)

test: setup  ## all tests (TESTS=tests/model for a part, WORKERS=2 processes)
	@$(PY) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations 15 $(TESTS)

test-gpu: setup  ## the tests that need an NVIDIA GPU, after `make setup-gpu`
	@JAX_PLATFORMS=cuda,cpu $(PY) -m pytest -m gpu $(TESTS)

PARITY := torch==$(TORCH) peft==$(PEFT) lm_eval==$(LM_EVAL) datatrove==$(DATATROVE) datasketch==$(DATASKETCH) schemathesis==$(SCHEMATHESIS)
# Clients of the server, with what of theirs is needed and not there: they ask for a newer certifi than the locked one.
CLIENTS := litellm==$(LITELLM) langchain-openai==$(LANGCHAIN_OPENAI) langchain-core==1.8.3 langchain-protocol==0.0.20 langsmith==0.15.1 \
  fastuuid==0.14.0 h2==4.4.1 hpack==4.2.0 hyperframe==6.1.0 importlib_metadata==8.9.0 jsonpatch==1.48 orjson==3.13.0 \
  pydantic-settings==2.16.3 python-dotenv==1.2.4 requests-toolbelt==1.0.0 tenacity==9.2.1 tiktoken==0.14.0 uuid_utils==0.19.0 zstandard==0.25.0
# Gradio with what of its is needed and not there: it asks for an older pillow and tomlkit than the locked ones.
PAGE := gradio==$(GRADIO) gradio-client==2.7.2 groovy==0.1.2 hf-gradio==0.4.1 pydub==0.25.1 python-multipart==0.0.34 pytz==2026.6 \
  safehttpx==0.1.7 semantic-version==2.10.0
AUDIO := 'audioop-lts==0.2.2; python_version >= "3.13"'

parity: setup  ## installs torch, peft, lm-eval, datatrove, datasketch, clients and gradio with pip and compares with them live
	@$(PY) -c 'from importlib.metadata import version as v; import sys; \
	  sys.exit(any(v(name).split("+")[0] != wanted for name, wanted in (pin.split("==") for pin in sys.argv[1:])))' \
	  $(PARITY) $(CLIENTS) $(PAGE) 2>/dev/null || { $(PY) -m pip install -qq $(PARITY); $(PY) -m pip install -qq --no-deps $(CLIENTS) $(PAGE) $(AUDIO); }
	@$(PY) -m pytest -m parity $(TESTS)

setup-gpu:  ## adds JAX for NVIDIA GPUs (CUDA=cuda12 or cuda13) and prints devices and driver
	@[ -f "requirements-$(CUDA).lock" ] || { echo "CUDA=$(CUDA) is not known; wanted cuda12 or cuda13: make setup-gpu CUDA=cuda12" >&2; exit 1; }
	@$(MAKE) --no-print-directory $(GPU_READY)
	@nvidia-smi --query-gpu=index,name,memory.total,driver_version --format=csv 2>/dev/null || echo "nvidia-smi does not run: no NVIDIA driver here?"
	@$(PY) -c "$$CHECK_GPU"

$(GPU_READY):
	@bash -euo pipefail -c "$$INSTALL" install "requirements-$(CUDA).lock" "$@"
	@for other in $(filter-out $(CUDA),cuda12 cuda13); do \
	  rm -f .venv/.ready-requirements-$$other.lock-*; \
	  $(PY) -m uv pip uninstall --quiet --python $(PY) jax-$$other-plugin jax-$$other-pjrt; \
	done

notebook: setup  ## JupyterLab on the tour of the chain (beside it: training from inside; fine-tuning a checkpoint; data; decoding; serving)
	@$(PY) -m jupyterlab $(if $(filter 0,$(shell id -u)),--allow-root) experiments/notebooks/00_tour.ipynb

lint: setup  ## ruff: rules and format
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

format: setup  ## lets ruff mend and format the code
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

COMPILE = $(PY) -m uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-emit-find-links \
  --custom-compile-command 'make lock' $(if $(UPGRADE),--upgrade) pyproject.toml --extra experiments --extra test --extra setup

lock: setup  ## writes the locks anew from pyproject.toml, keeping pins (UPGRADE=1 takes the newest)
	@$(COMPILE) -o requirements.lock
	@for cuda in cuda12 cuda13; do $(COMPILE) --extra $$cuda -c requirements.lock -o requirements-$$cuda.lock; done
	@! grep -nE '://|^-|@ file' requirements*.lock || { echo "A lock names a place; wanted names, versions and hashes only." >&2; exit 1; }
