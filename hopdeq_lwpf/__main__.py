"""`python -m hopdeq_lwpf`, the same as the command `hopdeq-lwpf`."""

import sys

from hopdeq_lwpf.cli import main

if __name__ == "__main__":
    sys.exit(main())
