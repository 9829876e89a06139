"""``python -m strictflow_mp``."""

import sys

from .cli import main

sys.exit(main())
