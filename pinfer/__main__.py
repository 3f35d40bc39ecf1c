"""`pinfer` and `python -m pinfer`. Imports the command line late, so that Ctrl-C ends well even while torch loads."""

import sys
from typing import NoReturn


def main() -> NoReturn:
    """Run the process's command line and exit with its code."""
    try:
        from pinfer.cli.main import run
    except KeyboardInterrupt:
        print("pinfer: interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
