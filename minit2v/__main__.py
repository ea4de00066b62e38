"""`python -m minit2v` is `minit2v`."""

import sys

from minit2v.cli import main

sys.exit(main())
