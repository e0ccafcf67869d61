"""What a terminal can show."""

import sys


def replace_unencodable_letters() -> None:
    """Lets standard output have a question mark for each letter that the terminal's encoding lacks.

    Without it one such letter ends a run whose answers it cannot show, or a push whose messages it cannot.
    """
    if hasattr(sys.stdout, "reconfigure"):  # not where it has been replaced, as in a notebook
        sys.stdout.reconfigure(errors="replace")
