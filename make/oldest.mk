# In a clone: the extension is built for one version of torch, beside the package.
OLDEST := build/oldest
.PHONY: test-oldest

test-oldest:  ## The last commit's tests with the oldest versions that pyproject.toml allows (torch 2.9.0: 4 GB with its CUDA)
	rm -rf $(OLDEST)
	git clone --quiet . $(OLDEST)
	COACHHOOK_DATA="$${COACHHOOK_DATA:-$(CURDIR)/../shared/data}" $(MAKE) -C $(OLDEST) test TORCH=torch==2.9.0 TRITON=triton==3.5.0 REQUIREMENTS=requirements-oldest.txt
