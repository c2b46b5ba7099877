# The site needs neither torch nor the package: mkdocstrings reads the sources. Its environment is small and its own.
DOCS := build/docs-venv
.PHONY: docs

$(DOCS)/.ready: requirements-docs.txt
	test -x $(DOCS)/bin/python || $(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/pip install --quiet -r requirements-docs.txt
	touch $@

docs: $(DOCS)/.ready  ## The documentation as a site, links checked, in build/site
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict --quiet
