"""A context for settings that belong to the whole process, and so to all of its threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext


class ProcessContext:
    """A context that several threads may be in at the same time.

    The first to enter opens it, and the last to leave closes it. If each opened a context of its
    own where models take turns in several threads, one could restore what another has set.
    """

    def __init__(self, make_context: Callable[[], AbstractContextManager[object]]) -> None:
        self._make_context = make_context
        self._context: AbstractContextManager[object] = nullcontext()
        self._lock = threading.Lock()
        self._users = 0

    def __enter__(self) -> None:
        with self._lock:
            if not self._users:
                self._context = self._make_context()
                self._context.__enter__()
            self._users += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                # Without the error: it is that of one thread, and the context belongs to all.
                self._context.__exit__(None, None, None)
