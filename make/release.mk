# What is asked before a version is tagged: by hand, for nothing here uploads anything.
.PHONY: release-check versions fixtures

release-check:  ## Version, changelog, saved edit sets, clean tree; then sdist and wheel
	$(PYTHON) make/check_release.py
	$(MAKE) wheel

versions:  ## The table of docs/compatibility.md from docs/compatibility/*.json
	$(PYTHON) make/versions.py

fixtures: $(VENV)/.ready  ## Edit sets saved by this version, for the tests of later ones (tests/fixtures/edit_sets/VERSION)
	$(BIN)/python tests/fixtures/save_edit_sets.py
