"""Messages for names that do not exist."""

import difflib
from collections.abc import Iterable


def unknown(kind: str, name: str, allowed: Iterable[str]) -> str:
    """One sentence that says that `name` is unknown, what is near it, and what is allowed."""
    allowed = sorted(allowed)
    near = difflib.get_close_matches(name, allowed, n=3)
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    return f"unknown {kind} {name!r}.{hint} Allowed: {', '.join(allowed) or 'none'}."
