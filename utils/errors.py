"""Errors that are the user's to mend: one line on stderr, exit status 2, no traceback."""

import difflib
import errno
import sys
from collections.abc import Callable, Iterable
from typing import NoReturn


class UserError(Exception):
    """Bad input or surroundings; the message names the flag, file or value and what would be right."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """A tail for an error message: the valid names, the nearest one first if there is one."""
    valid = list(valid)
    close = {v.lower(): v for v in reversed(valid)}
    match = difflib.get_close_matches(name.lower(), close, n=1)
    return (f"; did you mean {close[match[0]]}?" if match else "") + f" (valid: {', '.join(valid)})"


def run_script(main: Callable[[], int | None]) -> NoReturn:
    """Runs a script's `main` and exits with its status; a UserError becomes one line and status 2."""
    try:
        sys.exit(main())
    except UserError as e:
        message = str(e)
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as e:
        if e.filename is None and e.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        message = f"{e.filename or 'writing'}: {e.strerror}"
    print("error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(2)
