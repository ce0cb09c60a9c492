# Every verb sets up what it needs. The same verbs run in CI (.ci/run).
PYTHON  ?= python3
VENV    ?= .venv
MODEL   ?= checkpoints/mini
BUNDLE  ?= build/$(notdir $(MODEL:/=))
PRECISIONS ?= fp32 fp16 bf16 int8
BACKENDS ?= onnxruntime tensorrt-rtx
TARGETS ?= sm80 sm89 sm120
PROFILE ?= latency
ENGINE  ?= auto
WORKERS ?= 4
SECONDS_GPU ?= 1500
GRPC    ?= 127.0.0.1:50051
HTTP    ?= 127.0.0.1:8080
BIN     := $(VENV)/bin
STAMP   := $(VENV)/.f2rt-installed
OPTIMUM := .venv-optimum
OPTIMUM_STAMP := $(OPTIMUM)/.f2rt-installed
OPENVINO := .venv-openvino
OPENVINO_STAMP := $(OPENVINO)/.f2rt-installed
CLIENTS := .venv-clients
CLIENTS_STAMP := $(CLIENTS)/.f2rt-installed
PROTOS  := $(shell find proto -name '*.proto' 2>/dev/null)
SPACE   := $(subst ,, )
COMMA   := ,

.DEFAULT_GOAL := help
.PHONY: help setup proto proto-check lint type test engine parity serve clients bench bench-peers serve-peers gpu-check optimum-check clean

help:  ## show the verbs
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  variables: MODEL=$(MODEL) BUNDLE=$(BUNDLE) PRECISIONS=\"$(PRECISIONS)\" BACKENDS=\"$(BACKENDS)\" TARGETS=\"$(TARGETS)\" ENGINE=$(ENGINE) GRPC=$(GRPC) HTTP=$(HTTP) PYTHON=$(PYTHON)"

setup: $(STAMP)  ## create the environment (.venv) when it is missing or out of date

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else "f2rt needs Python 3.11 to 3.13, and $(PYTHON) is %d.%d. Choose one: make PYTHON=python3.12 ..." % v)'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

proto: setup  ## regenerate runtime/_pb from proto/
	$(BIN)/python -m grpc_tools.protoc -Iruntime/_pb=proto --python_out=. --pyi_out=. --grpc_python_out=. $(PROTOS)

proto-check: setup  ## fail when runtime/_pb differs from what proto/ generates
	@out=$$(mktemp -d) && trap 'rm -rf "$$out"' EXIT && \
	$(BIN)/python -m grpc_tools.protoc -Iruntime/_pb=proto --python_out=$$out --pyi_out=$$out --grpc_python_out=$$out $(PROTOS) && \
	for f in $$(cd $$out && find . -type f); do cmp -s "$$out/$$f" "$$f" || { echo "$$f differs from proto/: run 'make proto' and commit the result"; exit 1; }; done && \
	echo "runtime/_pb matches proto/"

lint: setup proto-check  ## style, import rules, generated stubs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: setup  ## mypy --strict
	$(BIN)/mypy

test: setup $(CLIENTS_STAMP)  ## the whole test suite
	$(BIN)/python -m pytest -p tests.pinning --numprocesses auto --maxprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder --max-worker-restart 0 -o faulthandler_exit_on_timeout=true

# The precisions and backends that are compiled; ONNX Runtime needs no build, on CUDA only a record.
KNOWN_PRECISIONS := fp32 fp16 bf16 int8
KNOWN_BACKENDS := onnxruntime onnxruntime-cuda tensorrt tensorrt-rtx
COMPILED := $(filter fp16 bf16 int8,$(PRECISIONS))
COMPILERS := $(if $(COMPILED),$(filter tensorrt tensorrt-rtx,$(BACKENDS)))
RECORDED := $(filter fp32 fp16 int8,$(PRECISIONS))
RECORDERS := $(if $(RECORDED),$(filter onnxruntime-cuda,$(BACKENDS)))
comma_list = $(subst $(SPACE),$(COMMA),$(strip $(1)))

# A name that nothing filters for would go missing without a word.
require_known = $(if $(filter-out $(2),$($(1))),$(error $(1) names $(filter-out $(2),$($(1))), which f2rt does not have; it has $(2), given with spaces between them))
ifneq (,$(filter engine,$(MAKECMDGOALS)))
$(call require_known,PRECISIONS,$(KNOWN_PRECISIONS))
$(call require_known,BACKENDS,$(KNOWN_BACKENDS))
endif

engine: setup  ## MODEL -> BUNDLE: export, compile, prove every engine against PyTorch
	$(BIN)/f2rt export $(MODEL) --out $(BUNDLE) --precision $(call comma_list,$(PRECISIONS))
	@set -e; for backend in $(COMPILERS); do \
	  case $$backend in tensorrt) targets= ;; *) targets="--target $(call comma_list,$(TARGETS))" ;; esac; \
	  $(BIN)/f2rt build $(BUNDLE) --backend $$backend --precision $(call comma_list,$(COMPILED)) \
	    $$targets --profile $(PROFILE); \
	done
	@set -e; for backend in $(RECORDERS); do \
	  $(BIN)/f2rt build $(BUNDLE) --backend $$backend --precision $(call comma_list,$(RECORDED)); \
	done
	$(BIN)/f2rt parity $(BUNDLE)

parity: setup  ## compare the bundle's engines with PyTorch; writes BUNDLE/parity/report.json
	$(BIN)/f2rt parity $(BUNDLE)

serve: setup  ## serve BUNDLE over gRPC and HTTP
	$(BIN)/f2rt serve $(BUNDLE) --engine $(ENGINE) --grpc $(GRPC) --http $(HTTP)

# promtool is no Python package: from Debian's, where apt is; elsewhere install it, or its test is skipped by name.
define PROMTOOL
if command -v promtool >/dev/null || [ -x $(CLIENTS)/bin/promtool ]; then :; \
elif (cd $(CLIENTS) && apt-get -qq download prometheus && \
      dpkg-deb --fsys-tarfile prometheus_*.deb | tar -xO ./usr/bin/promtool > bin/promtool.part && \
      chmod +x bin/promtool.part && mv bin/promtool.part bin/promtool) >/dev/null 2>&1; then :; \
else echo "promtool could not be installed: the test that uses it will be skipped"; fi; \
rm -f $(CLIENTS)/prometheus_*.deb $(CLIENTS)/bin/promtool.part
endef

clients: $(CLIENTS_STAMP)  ## the environment of the stock clients that tests use (.venv-clients)

$(CLIENTS_STAMP): tests/clients.txt tests/clients/chromium.sh
	@test -x $(CLIENTS)/bin/python || $(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install --quiet --disable-pip-version-check -r tests/clients.txt
	@$(PROMTOOL)
	@sh tests/clients/chromium.sh $(CLIENTS)
	@touch $@

bench: setup  ## the measurements in bench/ (minutes)
	$(BIN)/python -m bench

gpu-check: setup  ## everything that needs an NVIDIA GPU: engines, parity, latency beside torch; SECONDS_GPU bounds it
	$(BIN)/python -m bench.gpu_check --seconds $(SECONDS_GPU)

$(OPTIMUM_STAMP): pyproject.toml
	@test -x $(OPTIMUM)/bin/python || $(PYTHON) -m venv $(OPTIMUM)
	$(OPTIMUM)/bin/python -m pip install --quiet --disable-pip-version-check $(shell grep '^torch==' constraints.txt)
	$(OPTIMUM)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[optimum]'
	@touch $@

optimum-check: setup $(OPTIMUM_STAMP)  ## export MODEL with Optimum (in .venv-optimum), take it in, prove it
	$(BIN)/python -m bench optimum --model $(MODEL) --results build/optimum

bench-peers: $(OPENVINO_STAMP)  ## the environments of bench/'s peers whose pins clash with ours (.venv-openvino)

serve-peers: $(foreach peer,fastapi infinity vllm,.venv-$(peer)/.f2rt-installed)  ## the environments of the servers that bench compares with

# vLLM's CPU build brings its own torch, and packages that may not fit it; the others take the one that is pinned here.
.venv-%/.f2rt-installed: bench/peers-%.txt constraints.txt
	@test -x .venv-$*/bin/python || $(PYTHON) -m venv .venv-$*
	$(if $(filter vllm,$*),,.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check $(shell grep '^torch==' constraints.txt))
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check -r bench/peers-$*.txt
	$(if $(filter vllm,$*),.venv-$*/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec)
	@touch $@

# torchvision comes along, is not needed, and may be one that does not fit this torch.
$(OPENVINO_STAMP): bench/peers-openvino.txt constraints.txt
	@test -x $(OPENVINO)/bin/python || $(PYTHON) -m venv $(OPENVINO)
	$(OPENVINO)/bin/python -m pip install --quiet --disable-pip-version-check $(shell grep '^torch==' constraints.txt)
	$(OPENVINO)/bin/python -m pip install --quiet --disable-pip-version-check $(shell grep '^torch==' constraints.txt) -r bench/peers-openvino.txt
	$(OPENVINO)/bin/python -m pip uninstall --quiet --disable-pip-version-check --yes torchvision
	@touch $@

clean:  ## remove build products (keeps .venv)
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
