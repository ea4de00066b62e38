"""`python -m minit2v` runs the command `minit2v`."""

import sys

from minit2v.cli import main

sys.exit(main())
