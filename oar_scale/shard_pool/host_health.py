"""Where shards fail: is it the shard, or the host?

Expired credentials, a full disk or bad memory make every shard of a host fail at once, and fast: it would get through the whole list before
the others have done a tenth of it. So a shard is given up only after it has failed on two hosts, and a host where shards fail one after the
other, while another one finishes some, is left out.
"""

from __future__ import annotations

from collections.abc import Iterable

SICK = 3
"""Shards in a row."""


class HostHealth:
    """What each host has failed and finished."""

    def __init__(self) -> None:
        self.sick: set[str] = set()
        """Hosts that are left out, while there are others."""
        self._failed: dict[str, set[str]] = {}
        self._in_a_row: dict[str, int] = {}
        self._working: set[str] = set()

    def failed_on(self, shard: str) -> set[str]:
        """The hosts on which a shard failed."""
        return self._failed.get(shard, set())

    def record_done(self, host: str) -> None:
        """A host has finished a shard."""
        self._in_a_row[host] = 0
        self._working.add(host)

    def record_failure(self, shard: str, host: str) -> bool:
        """A shard has failed on a host. Returns whether the host is to be left out from now on."""
        self._failed.setdefault(shard, set()).add(host)
        self._in_a_row[host] = self._in_a_row.get(host, 0) + 1
        if host in self.sick or self._in_a_row[host] < SICK or not self._working - {host} - self.sick:
            return False
        self.sick.add(host)
        return True

    def is_settled(self, shard: str, hosts: Iterable[str]) -> bool:
        """Whether a failure that a user can fix is the shard's own: seen on two hosts, or on all that there are."""
        failed = self.failed_on(shard)
        return len(failed) > 1 or set(hosts) <= failed

    def admits(self, host: str, others: Iterable[str]) -> bool:
        """Whether a new actor on this host is taken. A sick host is, where no other one is left: it may have recovered."""
        if host in self.sick and not set(others) - self.sick:
            self.sick.clear()
        return host not in self.sick
