"""What pools know of their shards, in storage, so that it outlives them all and can be read from anywhere.

    LEDGER/SHARD.json                   done: the worker's result, and who did it when; written after the output, if absent
    LEDGER-pool/drafts/SHARD.CRC.json   what the entry will be if the output is the one with this checksum (``publication.py``)
    LEDGER-pool/what.json               what the shards are made into: a pool with another config is refused
    LEDGER-pool/claims/SHARD.N.json     a pool does it; the highest N counts, and N + 1 overrules a claim whose lease has expired
    LEDGER-pool/holders/ID.BEAT.json    the lease of a pool (``leases.py``)
    LEDGER-pool/poison/SHARD.json       given up, with the error

All rests on conditional writes alone. Claims save work, they guard nothing: of two actors on one shard, whatever led to that, the first
one's output stays, and the entry is the one that belongs to it.

A record that cannot be read (cut, or empty: a disk that was full, a server that lost power) counts as none: its shard is not done, or the
claim is nobody's. Only where nobody can know without it what to do, in ``what.json``, it is an error.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypedDict

from oar_scale.errors import UserError
from oar_scale.json_object import JsonObject
from oar_scale.storage import DamagedJson, Missing, join, open_storage, read_json
from oar_scale.storage.background import in_order

ShardResult = JsonObject
"""What is recorded about a finished shard: small, JSON; it belongs to the bytes of the output."""
Record = JsonObject
"""A JSON object, as it is stored or as an event carries it."""


class ShardWork(TypedDict, total=False):
    """Which actor did a shard, and how; entries of older versions lack some of it."""

    actor: str
    """Host and process, ``HOST:PID``."""
    host: str
    holder: str
    """The lease holder whose actor it was."""
    attempt: int
    seconds: float
    finished: float
    """Seconds since 1970."""


@dataclass(frozen=True)
class ShardOutput:
    """What a worker has made of a shard; the pool writes it."""

    uri: str
    """Its place."""
    data: bytes
    made_from: ShardResult
    """The part of the result that every actor has for this shard: what it was made from, and with which model and settings."""
    facts: ShardResult = field(default_factory=dict)
    """The part of the result that describes these bytes."""

    @property
    def result(self) -> ShardResult:
        """The result, as the entry in the ledger has it."""
        return {**self.made_from, **self.facts}


_READERS = 16
_SUFFIX = ".json"


@dataclass(frozen=True)
class LedgerEntry:
    """A finished shard."""

    result: ShardResult
    work: ShardWork = field(default_factory=ShardWork)


@dataclass(frozen=True)
class Claim:
    """A pool's claim on a shard."""

    shard: str
    number: int
    holder: str
    """The holder of the pool's lease."""
    since: float
    """Seconds since 1970, by the holder's clock."""


class Ledger:
    """The ledger at a folder URI, and the folder ``LEDGER-pool`` beside it. Holds no connection: it can be pickled."""

    def __init__(self, uri: str) -> None:
        self.uri, self.pool_folder = uri.rstrip("/"), f"{uri.rstrip('/')}-pool"

    # -- finished shards ------------------------------------------------------------------------------------------------

    def done(self) -> set[str]:
        """Return the names of the shards that have an entry."""
        return set(names_in(self.uri))

    def entry(self, shard: str) -> LedgerEntry | None:
        """Return the entry of a shard, or None if it is not finished or its entry is damaged."""
        return _entry_of(readable_record(self._entry_uri(shard), "facts"))

    def entries(self, shards: Iterable[str]) -> dict[str, LedgerEntry]:
        """Return the entries of those of the shards that are done, in the order given; without the :meth:`damaged` ones."""
        names = self.done()
        wanted = [shard for shard in shards if shard in names]
        entries = zip(wanted, in_order(self.entry, wanted, _READERS), strict=True)
        return {shard: entry for shard, entry in entries if entry is not None}

    def damaged(self, shards: Iterable[str], entries: Container[str]) -> dict[str, str]:
        """Return those of the shards whose entry is there and cannot be read, and why; ``entries`` are those that could be read."""
        names, problems = self.done(), dict[str, str]()
        for shard in shards:
            if shard in names and shard not in entries:
                try:
                    read_record(self._entry_uri(shard), "facts")
                except DamagedJson as error:
                    problems[shard] = f"its ledger entry is damaged ({error.why})"
        return problems

    def enter(self, shard: str, entry: LedgerEntry) -> bool:
        """Write the entry of a shard whose output is written; return False if there is one already."""
        uri, record = self._entry_uri(shard), _entry_record(shard, entry)
        while not write_record(uri, record, if_absent=True):
            try:
                if read_record(uri, "facts") is not None:
                    return False
            except DamagedJson:  # whoever else replaces it enters the same output
                self.forget(shard)
        return True

    def forget(self, shard: str) -> None:
        """Remove the entry of a shard: it will be done again, and its output replaced."""
        open_storage(self.uri).delete(self._entry_uri(shard))

    def _entry_uri(self, shard: str) -> str:
        return join(self.uri, shard + _SUFFIX)

    # -- outputs that are being written ---------------------------------------------------------------------------------

    def write_draft(self, shard: str, crc32c: int, entry: LedgerEntry) -> None:
        """Note what the entry of a shard will be if its output is the one with this checksum. The first draft for it stays."""
        write_record(self._draft_uri(shard, crc32c), _entry_record(shard, entry), if_absent=True)

    def draft(self, shard: str, crc32c: int) -> LedgerEntry | None:
        """Return what :meth:`write_draft` noted; None where nobody did."""
        return _entry_of(readable_record(self._draft_uri(shard, crc32c), "facts"))

    def remove_draft(self, shard: str, crc32c: int) -> None:
        """Remove a draft; nothing happens where there is none."""
        open_storage(self.uri).delete(self._draft_uri(shard, crc32c))

    def remove_drafts(self, shards: Container[str]) -> None:
        """Remove all drafts for these shards, which are done."""
        for name in names_in(join(self.pool_folder, "drafts")):
            shard, _, crc = name.rpartition(".")
            if shard in shards and re.fullmatch("[0-9a-f]{8}", crc):
                self.remove_draft(shard, int(crc, 16))

    def _draft_uri(self, shard: str, crc32c: int) -> str:
        return join(self.pool_folder, "drafts", f"{shard}.{crc32c:08x}{_SUFFIX}")

    # -- what the shards are made into ----------------------------------------------------------------------------------

    def bind(self, config: Mapping[str, str]) -> None:
        """Note what the shards are made into, or compare it with what an earlier pool noted.

        Raises:
            UserError: an earlier pool, or another one right now, makes them into something else.
        """
        uri = join(self.pool_folder, "what.json")
        stored = config if write_record(uri, dict(config), if_absent=True) else read_record(uri)
        for name in sorted(config if stored is None else config.keys() | stored.keys()):
            if stored is not None and stored.get(name) != config.get(name):
                folder = self.uri.rsplit("/", 1)[0]
                raise UserError(
                    f"{folder}: the shards here are made with {name} {stored.get(name)}, now it is {config.get(name)}.\n"
                    "Results of the two must not mix: remove this folder, or write into another."
                )

    # -- claims ---------------------------------------------------------------------------------------------------------

    def claim(self, shard: str, number: int, holder: str) -> Claim:
        """Try to get claim ``number`` of a shard for a lease holder; return the claim of that number, of whichever holder."""
        mine = Claim(shard, number, holder, round(time.time(), 3))
        while not write_record(self._claim_uri(shard, number), {"holder": holder, "since": mine.since}, if_absent=True):
            existing = self._read_claim((shard, number))
            if existing is not None:
                return existing  # perhaps an earlier one of the same holder
        return mine

    def claims(self) -> dict[str, Claim]:
        """Return, for each shard that is claimed, the claim that counts."""
        highest: dict[str, int] = {}
        for name in names_in(join(self.pool_folder, "claims")):
            shard, _, number = name.rpartition(".")
            if re.fullmatch("[0-9]{1,9}", number):
                highest[shard] = max(int(number), highest.get(shard, 0))
        claims = in_order(self._read_claim, list(highest.items()), _READERS)
        return {claim.shard: claim for claim in claims if claim is not None}

    def release(self, claim: Claim) -> None:
        """Remove a claim, and those that it overruled."""
        for number in range(claim.number, -1, -1):
            uri = self._claim_uri(claim.shard, number)
            open_storage(uri).delete(uri)

    def _claim_uri(self, shard: str, number: int) -> str:
        return join(self.pool_folder, "claims", f"{shard}.{number}{_SUFFIX}")

    def _read_claim(self, shard_and_number: tuple[str, int]) -> Claim | None:
        try:
            record = read_record(self._claim_uri(*shard_and_number), "holder", "since")
        except DamagedJson:
            return Claim(*shard_and_number, holder="", since=time.time())  # nobody's: it expires as a lease does
        return None if record is None else Claim(*shard_and_number, record["holder"], record["since"])

    # -- poison ---------------------------------------------------------------------------------------------------------

    def mark_poison(self, shard: str, error: str, holder: str, hosts: Iterable[str] = ()) -> None:
        """Note that a lease holder has given up a shard, and why; ``hosts``: where it failed with what a user can fix."""
        write_record(self._poison_uri(shard), {"error": error, "holder": holder, "hosts": sorted(hosts)})

    def clear_poison(self, shard: str) -> None:
        """Remove the note that a shard was given up; nothing happens where there is none."""
        open_storage(self.uri).delete(self._poison_uri(shard))

    def poison(self) -> dict[str, Record]:
        """Return ``error``, ``holder`` and ``hosts`` of each shard that was given up; it may have been done since."""
        names = list(names_in(join(self.pool_folder, "poison")))
        records = in_order(lambda shard: readable_record(self._poison_uri(shard), "error", "holder"), names, _READERS)
        return {shard: record for shard, record in zip(names, records, strict=True) if record is not None}

    def _poison_uri(self, shard: str) -> str:
        return join(self.pool_folder, "poison", shard + _SUFFIX)


def names_in(folder: str) -> Iterable[str]:
    """Return the names of the JSON records in a folder, without ``.json``; those in subfolders have a path."""
    uris = open_storage(folder).list(folder)
    return (uri.removeprefix(f"{folder}/").removesuffix(_SUFFIX) for uri in uris if uri.endswith(_SUFFIX))


def read_record(uri: str, *fields: str) -> Record | None:
    """Return the JSON object at ``uri``, or None if there is none.

    Raises:
        DamagedJson: what is there is no JSON object with these fields.
    """
    try:
        record = read_json(uri)
    except Missing:
        return None
    if missing := [field for field in fields if field not in record]:
        raise DamagedJson(uri, f"without {missing[0]}")
    return record


def readable_record(uri: str, *fields: str) -> Record | None:
    """:func:`read_record`, but None where the record is damaged."""
    try:
        return read_record(uri, *fields)
    except DamagedJson:
        return None


def _entry_of(record: Record | None) -> LedgerEntry | None:
    return None if record is None else LedgerEntry(record["facts"], record.get("work", {}))


def _entry_record(shard: str, entry: LedgerEntry) -> Record:
    return {"shard": shard, "facts": entry.result, "work": entry.work}


def write_record(uri: str, record: Mapping[str, object], *, if_absent: bool = False) -> bool:
    """Write a JSON object in one step; return False if ``if_absent`` and there is one."""
    return open_storage(uri).write(uri, json.dumps(record, sort_keys=True).encode(), if_absent=if_absent)
