"""`python -m firstwords`, and the command."""

import sys
from typing import NoReturn


def entry() -> NoReturn:
    """Run the program and leave with its exit code; one that is stopped while it is being read leaves in silence."""
    try:
        from firstwords.app.cli import entry as run

        run()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    entry()
