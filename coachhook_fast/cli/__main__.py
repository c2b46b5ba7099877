"""`python -m coachhook_fast.cli`, for environments whose scripts are not on the path."""

from __future__ import annotations

import sys

from coachhook_fast.cli import main

sys.exit(main())
