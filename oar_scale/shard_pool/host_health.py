"""Where shards fail: is it the shard, or the host?

Expired credentials, a full disk or bad memory make every shard of a host fail at once, and fast: it would get through the whole list before
the others have done a tenth of it. So a shard is given up only after it has failed on two hosts, and a host where shards fail one after the
other, while another one finishes some, is left out.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

SICK = 3
"""Shards in a row."""


class HostHealth:
    """What each host has failed and finished."""

    def __init__(self) -> None:
        self.sick: set[str] = set()
        """Hosts that are left out, while there are others."""
        self._failed: dict[str, set[str]] = {}
        self._errors: dict[str, dict[str, str]] = {}
        """For each shard the hosts on which it failed with what a user can fix, and the error."""
        self._in_a_row: dict[str, int] = {}
        self._working: set[str] = set()

    def avoided(self, shard: str, hosts: set[str]) -> set[str]:
        """The hosts that are not to get a shard: those on which it failed, or where there is no other one, with what a user can fix."""
        failed = self._failed.get(shard, set())
        return failed if hosts - failed else self.failed_on(shard)

    def settled(self, shard: str, hosts: set[str], expected: bool) -> str:
        """The error of a shard that is at fault itself, and not a host: a user can fix it, and it came on two hosts, or on all there are.

        Args:
            expected: whether actors may come on other hosts.
        """
        errors = self._errors.get(shard, {})
        on_all = bool(hosts) and hosts <= errors.keys() and not expected
        return list(errors.values())[-1] if len(errors) > 1 or on_all else ""

    @property
    def suspected(self) -> Collection[str]:
        """The shards that have failed with what a user can fix; they may be done by now."""
        return self._errors.keys()

    def failed_on(self, shard: str) -> set[str]:
        """The hosts on which a shard failed with what a user can fix."""
        return set(self._errors.get(shard, ()))

    def record_elsewhere(self, shard: str, hosts: Iterable[str], error: str) -> None:
        """Another pool has given up a shard after an error that a user can fix, on these hosts of its own."""
        for host in hosts:
            self._failed.setdefault(shard, set()).add(host)
            self._errors.setdefault(shard, {})[host] = error

    def record_done(self, host: str) -> None:
        """A host has finished a shard."""
        self._in_a_row[host] = 0
        self._working.add(host)

    def record_failure(self, shard: str, host: str, user_error: str) -> bool:
        """A shard has failed on a host, with what a user can fix or (empty) otherwise. Returns whether the host is to be left out now."""
        self._failed.setdefault(shard, set()).add(host)
        if user_error:
            self._errors.setdefault(shard, {})[host] = user_error
        self._in_a_row[host] = self._in_a_row.get(host, 0) + 1
        if host in self.sick or self._in_a_row[host] < SICK or not self._working - {host} - self.sick:
            return False
        self.sick.add(host)
        return True

    def fails_all(self, host: str) -> bool:
        """Whether several shards have failed on a host with what a user can fix, and none was done there."""
        return host not in self._working and sum(host in errors for errors in self._errors.values()) >= SICK

    def admits(self, host: str, others: Iterable[str]) -> bool:
        """Whether a new actor on this host is taken. A sick host is, where no other one is left: it may have recovered."""
        if host in self.sick and not set(others) - self.sick:
            self.sick.clear()
        return host not in self.sick
