"""``python -m strictflow_mp``."""

import os
import sys

from .tools.cli import main

# ``-m`` puts the current directory first. Nothing of ours is there, and no child of ours has to look there.
if not getattr(sys.flags, "safe_path", False):
    try:
        if sys.path[0] in ("", os.getcwd()):
            del sys.path[0]
    except OSError:
        pass  # there is no current directory

sys.exit(main())
