"""Work that is done again and again beside a controller, in a thread of its own."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def repeated(work: Callable[[], object], every_s: float, *, name: str) -> Iterator[None]:
    """Do ``work`` every so many seconds while the context lasts; it must raise nothing.

    Args:
        work: What is done; at the end of the context it is over.
        every_s: Seconds from the end of one to the beginning of the next.
        name: Of the thread.
    """
    over = threading.Event()

    def keep() -> None:
        while not over.wait(every_s):
            work()

    thread = threading.Thread(target=keep, name=f"phalanx-{name}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
