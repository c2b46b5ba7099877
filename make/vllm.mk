# vLLM (CPU build) in an environment of its own: 0.7 GB to download, 3.4 GB installed.
VENV_VLLM ?= .venv-vllm
VLLM_WORK := build/vllm-test
.PHONY: setup-vllm test-vllm

$(VENV_VLLM)/.packages: requirements-vllm.txt
	test -x $(VENV_VLLM)/bin/python || $(PYTHON) -m venv $(VENV_VLLM)
	$(VENV_VLLM)/bin/pip install --quiet -r requirements-vllm.txt
	$(VENV_VLLM)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# pybind11 is left out on purpose: the extension that the main environment built is used as it is.
$(VENV_VLLM)/.ready: $(VENV_VLLM)/.packages $(VENV)/.ready pyproject.toml
	$(VENV_VLLM)/bin/pip install --quiet --no-build-isolation --no-deps -e .
	touch $@

setup-vllm: $(VENV_VLLM)/.ready  ## Virtual environment with vLLM for CPU, in .venv-vllm

test-vllm: $(VENV_VLLM)/.ready  ## The vLLM plugin against transformers, on SmolLM2 with real edits
	$(BIN)/python tests/vllm/prepare.py $(VLLM_WORK)
	COACHHOOK_VLLM_WORK=$(VLLM_WORK) $(VENV_VLLM)/bin/pytest --import-mode=importlib -q --confcutdir=tests/vllm tests/vllm --durations=8
