"""A delta, its metric and its threshold, an edit set, its manifest and its files. Nothing here knows a model."""
