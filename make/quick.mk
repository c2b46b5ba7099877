# The quick tier: what is not marked `slow` (pyproject.toml). The aim is two minutes on two idle cores.
.PHONY: test-quick test-quick-oldest

test-quick: $(VENV)/.ready  ## Quick tests: those that are not marked slow
	$(PYTEST) -n 2 --dist worksteal -q -m "not slow" tests --ignore=tests/vllm --durations=10

test-quick-oldest:  ## Quick tests with the oldest versions, in this checkout (for CI; make test-oldest runs all in a clone)
	$(MAKE) test-quick TORCH=torch==2.9.0 TRITON=triton==3.5.0 REQUIREMENTS=requirements-oldest.txt
