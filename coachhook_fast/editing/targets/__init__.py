"""Target values: what an edited layer should put out at a request's subject."""
