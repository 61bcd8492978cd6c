"""What pools know of their shards, in storage, so that it outlives them all and can be read from anywhere.

    LEDGER/SHARD.json                   done: the worker's facts, and who did it when; written after the output, if absent
    LEDGER-pool/what.json               what the shards are made into: a pool that makes something else is refused
    LEDGER-pool/claims/SHARD.N.json     a pool is at it; the highest N counts, and N + 1 overrules a claim whose holder is gone
    LEDGER-pool/holders/ID.BEAT.json    a pool that lives (``holders.py``)
    LEDGER-pool/poison/SHARD.json       set aside, with the error

All rests on ``write(if_absent=True)`` alone. Claims save work, they guard nothing: two actors on one shard, whatever led to that,
write the same bytes, and one of them writes the entry.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from oar_scale.errors import UserError
from oar_scale.storage import Missing, join, open_storage
from oar_scale.storage.background import in_order

Facts = dict[str, Any]
"""What a worker says about a finished shard: small, JSON, the same whoever did the work."""

_READERS = 16
_SUFFIX = ".json"


@dataclass(frozen=True)
class Entry:
    """A finished shard."""

    facts: Facts
    work: Facts = field(default_factory=dict)
    """Who did it: ``actor``, ``host``, ``holder``, ``seconds``, ``attempt``, ``finished`` (seconds since 1970)."""


@dataclass(frozen=True)
class Claim:
    """Who is at a shard."""

    shard: str
    number: int
    holder: str
    since: float
    """Seconds since 1970, by the holder's clock."""


class Ledger:
    """The ledger at a folder URI, and what lies beside it. Holds no connection: it can be pickled."""

    def __init__(self, uri: str) -> None:
        self.uri, self.beside = uri.rstrip("/"), f"{uri.rstrip('/')}-pool"

    # -- what is done ---------------------------------------------------------------------------------------------------

    def done(self) -> set[str]:
        """Names of the finished shards."""
        return set(names_in(self.uri))

    def entry(self, shard: str) -> Entry | None:
        found = read_record(self._entry(shard))
        return None if found is None else Entry(found["facts"], found.get("work", {}))

    def entries(self, shards: Iterable[str]) -> dict[str, Entry]:
        """The entries of those of the shards that are done, in the order given."""
        names = self.done()
        wanted = [shard for shard in shards if shard in names]
        found = zip(wanted, in_order(self.entry, wanted, _READERS), strict=True)
        return {shard: entry for shard, entry in found if entry is not None}

    def enter(self, shard: str, entry: Entry) -> bool:
        """Write the entry of a shard whose output is written; False if there is one already."""
        return write_record(self._entry(shard), {"shard": shard, "facts": entry.facts, "work": entry.work}, if_absent=True)

    def forget(self, shard: str) -> None:
        """The shard is to be done again."""
        open_storage(self.uri).delete(self._entry(shard))

    def _entry(self, shard: str) -> str:
        return join(self.uri, shard + _SUFFIX)

    # -- what it is all for ---------------------------------------------------------------------------------------------

    def bind(self, what: Mapping[str, str]) -> None:
        """Say what the shards are made into.

        Raises:
            UserError: an earlier pool, or another one right now, makes them into something else.
        """
        uri = join(self.beside, "what.json")
        there = what if write_record(uri, dict(what), if_absent=True) else read_record(uri)
        for name in sorted(what if there is None else what.keys() | there.keys()):
            if there is not None and there.get(name) != what.get(name):
                raise UserError(
                    f"{self.uri.rsplit('/', 1)[0]}: the shards here are made with {name} {there.get(name)}, now it is {what.get(name)}.\n"
                    "Results of the two must not mix: remove this folder, or write into another."
                )

    # -- who is at what -------------------------------------------------------------------------------------------------

    def claim(self, shard: str, number: int, holder: str) -> Claim:
        """Try to become the holder of claim ``number``; returns whose it is."""
        mine = Claim(shard, number, holder, round(time.time(), 3))
        while not write_record(self._claim(shard, number), {"holder": holder, "since": mine.since}, if_absent=True):
            there = self._read_claim((shard, number))
            if there is not None:
                return there  # perhaps an earlier one of the same holder
        return mine

    def claims(self) -> dict[str, Claim]:
        """The claim that counts for each shard that somebody is at."""
        highest: dict[str, int] = {}
        for name in names_in(join(self.beside, "claims")):
            shard, _, number = name.rpartition(".")
            highest[shard] = max(int(number), highest.get(shard, 0))
        found = in_order(self._read_claim, list(highest.items()), _READERS)
        return {claim.shard: claim for claim in found if claim is not None}

    def release(self, claim: Claim) -> None:
        """Remove a claim, and those that it overruled."""
        for number in range(claim.number, -1, -1):
            uri = self._claim(claim.shard, number)
            open_storage(uri).delete(uri)

    def _claim(self, shard: str, number: int) -> str:
        return join(self.beside, "claims", f"{shard}.{number}{_SUFFIX}")

    def _read_claim(self, at: tuple[str, int]) -> Claim | None:
        found = read_record(self._claim(*at))
        return None if found is None else Claim(*at, found["holder"], found["since"])

    # -- what could not be done -----------------------------------------------------------------------------------------

    def set_aside(self, shard: str, error: str, holder: str) -> None:
        write_record(self._poison(shard), {"error": error, "holder": holder})

    def readmit(self, shard: str) -> None:
        open_storage(self.uri).delete(self._poison(shard))

    def poison(self) -> dict[str, Facts]:
        """``error`` and ``holder`` of each shard that was set aside; it may have been done since."""
        names = list(names_in(join(self.beside, "poison")))
        found = zip(names, in_order(lambda shard: read_record(self._poison(shard)), names, _READERS), strict=True)
        return {shard: record for shard, record in found if record is not None}

    def _poison(self, shard: str) -> str:
        return join(self.beside, "poison", shard + _SUFFIX)


def names_in(folder: str) -> Iterable[str]:
    uris = open_storage(folder).list(folder)
    return (uri.removeprefix(f"{folder}/").removesuffix(_SUFFIX) for uri in uris if uri.endswith(_SUFFIX))


def read_record(uri: str) -> Facts | None:
    try:
        found: Facts = json.loads(open_storage(uri).read(uri))
    except Missing:
        return None
    return found


def write_record(uri: str, record: Mapping[str, Any], *, if_absent: bool = False) -> bool:
    return open_storage(uri).write(uri, json.dumps(record, sort_keys=True).encode(), if_absent=if_absent)
