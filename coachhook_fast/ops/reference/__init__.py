"""The plain torch definition of every operator: oracle of the tests, fallback, benchmark baseline."""

from __future__ import annotations
