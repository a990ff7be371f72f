"""How many shards are fetched at once: more, as long as more are fetched faster. No I/O."""

__all__ = ["Pace"]

_GAIN = 1.25
"""Times as fast that twice as many fetchers have to be; where connections are the limit it is 2."""
_FETCHES_EACH = 2
"""Fetches per fetcher that a rate is measured over."""


class Pace:
    """Doubles the fetchers until that is of no use, by the rates that are measured meanwhile.

    A bucket gives each connection some 100 MB/s and a node many GB/s, a disk or a network of one's own may be full with
    a few connections.

    Args:
        fewest: fetchers to begin with.
        most: not more than these.
    """

    def __init__(self, fewest: int, most: int) -> None:
        self.num_fetchers = fewest
        self._most = most
        self._is_settled = 2 * fewest > most
        self._rate_of_half = 0.0
        self._begin_s: float | None = None
        self._num_bytes = self._num_fetches = 0

    def rest(self) -> None:
        """Note that a fetcher had nothing to fetch: what is under way does not tell how fast they are."""
        self._begin_s = None

    def note(self, num_bytes: int, now_s: float) -> None:
        """Note that a shard was fetched, and change the number of fetchers if their rate is known.

        Args:
            num_bytes: of the shard.
            now_s: when, by any clock that is steady.
        """
        if self._is_settled:
            return
        if self._begin_s is None:
            # Counted from here on: until now, not all were at work.
            self._begin_s, self._num_bytes, self._num_fetches = now_s, 0, 0
            return
        self._num_bytes += num_bytes
        self._num_fetches += 1
        if self._num_fetches >= _FETCHES_EACH * self.num_fetchers and now_s > self._begin_s:
            self._decide(self._num_bytes / (now_s - self._begin_s))
            self._begin_s = None

    def _decide(self, rate: float) -> None:
        if rate < _GAIN * self._rate_of_half:
            self.num_fetchers //= 2
            self._is_settled = True
        elif 2 * self.num_fetchers > self._most:
            self._is_settled = True
        else:
            self._rate_of_half = rate
            self.num_fetchers *= 2
