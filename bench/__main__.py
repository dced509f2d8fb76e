"""`python -m bench`, and `python -m bench compare`."""

import sys

from bench import cli, comparison

if sys.argv[1:2] == ["compare"]:
    sys.exit(comparison.main(sys.argv[2:]))
sys.exit(cli.main())
