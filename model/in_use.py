"""One thread at a time in a frozen LM, while its modules are made to work otherwise.

For a pass we change how its layers attend, hang adapters on them, and replace its ReLUs. A second
thread, as of a web server, waits for the first one's pass, not for its whole answer.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock, RLock
from weakref import WeakKeyDictionary

from torch import nn

_locks: WeakKeyDictionary[nn.Module, RLock] = WeakKeyDictionary()
_looking = Lock()


@contextmanager
def in_use(lm: nn.Module) -> Iterator[None]:
    """Within it, other threads that come here with this LM wait; this one may come again."""
    with _looking:
        lock = _locks.setdefault(lm, RLock())
    with lock:
        yield
