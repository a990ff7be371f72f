"""Channel between two threads: a bounded queue that can be closed and that carries an error to the consumer."""

import threading
from collections import deque
from typing import Generic, TypeVar

__all__ = ["Channel", "ChannelClosed"]

T = TypeVar("T")


class ChannelClosed(Exception):  # noqa: N818 - a signal between threads, like StopIteration
    """The other side has closed the channel."""


class Channel(Generic[T]):
    """A queue of at most `capacity` items; `put` and `get` wait, and wake up at once when it is closed."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._items: deque[T] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._error: BaseException | None = None

    @property
    def closed(self) -> bool:
        """Whether the consumer is gone."""
        return self._closed

    def put(self, item: T) -> None:
        """Hand over an item. Raises ChannelClosed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._items) < self._capacity)
            if self._closed:
                raise ChannelClosed
            self._items.append(item)
            self._changed.notify_all()

    def get(self) -> T:
        """Take the oldest item. Raises the producer's error once all items before it are taken, or ChannelClosed."""
        with self._changed:
            self._changed.wait_for(lambda: self._items or self._closed or self._error is not None)
            if self._items and not self._closed:
                item = self._items.popleft()
                self._changed.notify_all()
                return item
            if self._error is not None:
                raise self._error
            raise ChannelClosed

    def fail(self, error: BaseException) -> None:
        """Let the consumer raise this error after the items that are already there."""
        with self._changed:
            self._error = error
            self._changed.notify_all()

    def close(self) -> None:
        """Drop all items and release everyone who waits."""
        with self._changed:
            self._closed = True
            self._items.clear()
            self._changed.notify_all()
