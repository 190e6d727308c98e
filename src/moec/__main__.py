"""`moec` and `python -m moec`: the command line, guarded from its first import on."""

import sys
from typing import NoReturn


def main() -> NoReturn:
    """Run the command line; a Ctrl-C that comes while Python still imports it is no traceback either."""
    try:
        from moec.cli.main import main as run
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)  # cli/status.py has it as INTERRUPTED; importing that may be what was interrupted
    run()


if __name__ == "__main__":
    main()
