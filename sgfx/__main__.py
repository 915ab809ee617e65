"""``python -m sgfx`` is the `sgfx` command."""

import sys

from sgfx.cli import main

sys.exit(main())
