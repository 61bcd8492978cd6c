"""Two actors have made the same shard, and their last bits differ (another GPU, other threads): whose bytes stay?

    LEDGER-pool/drafts/SHARD.CRC.json   1. each writes the entry that belongs to its own bytes, under their checksum
    OUTPUT                              2. the bytes are written if there are none: those of the first one stay
    LEDGER/SHARD.json                   3. the draft of the bytes that are there becomes the entry, whoever enters it

So bytes and entry belong together, also where the first one dies between the two. Bytes that no draft describes, or that were made from
something else (an earlier run's, damaged ones), are replaced, provided that nobody else has replaced them meanwhile.
"""

from __future__ import annotations

from crc32c import crc32c

from oar_scale.shard_pool.ledger import Ledger, LedgerEntry, ShardOutput, ShardWork
from oar_scale.storage import Missing, open_storage


def publish(ledger: Ledger, shard: str, output: ShardOutput, work: ShardWork) -> LedgerEntry:
    """Write the output of a shard and enter the shard into the ledger; return its entry, which is another actor's if that was first."""
    entry, mine = ledger.entry(shard), crc32c(output.data)
    if entry is None:
        ledger.write_draft(shard, mine, LedgerEntry(output.result, work))
        entry = _first_entry(ledger, shard, output, LedgerEntry(output.result, work))
    ledger.remove_draft(shard, mine)
    return entry


def _first_entry(ledger: Ledger, shard: str, output: ShardOutput, mine: LedgerEntry) -> LedgerEntry:
    """The entry of whoever was first, entered; the output is what it says."""
    storage, uri = open_storage(output.uri), output.uri
    while not storage.write(uri, output.data, if_absent=True):
        try:
            version, crc = storage.version(uri), crc32c(storage.read(uri))
        except Missing:
            continue
        draft = ledger.draft(shard, crc)
        if draft is None and (entry := ledger.entry(shard)) is not None:
            return entry  # a draft is removed once it has become the entry
        if draft is not None and output.made_from.items() <= draft.result.items():
            entered = _enter(ledger, shard, draft)
            ledger.remove_draft(shard, crc)
            return entered
        if storage.write(uri, output.data, if_version=version):
            break
    return _enter(ledger, shard, mine)


def _enter(ledger: Ledger, shard: str, entry: LedgerEntry) -> LedgerEntry:
    return entry if ledger.enter(shard, entry) else ledger.entry(shard) or entry
