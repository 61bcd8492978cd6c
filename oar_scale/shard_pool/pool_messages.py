"""What a pool says about itself to people: a line for each event that is no part of every pool."""

from __future__ import annotations

from oar_scale.observe.formatting import duration
from oar_scale.shard_pool.ledger import Record


def event_message(kind: str, fields: Record) -> str:
    """The console's line about an event of a pool (``pool_types.OnEvent``); empty for events that are part of every one."""
    match kind:
        case "retry":
            return f"{fields['shard']}: attempt {fields['attempt']} on another actor; {fields['error']}"
        case "poison":
            return f"{fields['shard']}: set aside; {fields['error']}"
        case "late":
            return f"{fields['shard']}: takes far longer than the others, another actor does it as well"
        case "taken_over":
            return f"{fields['shard']}: taken over from {fields['holder']}, which is gone"
        case "helping":
            return f"another pool works on these shards (host {fields['host']}, pid {fields['pid']}): this one helps it"
        case "waiting":
            return f"no actor could start in {duration(fields['seconds'])}: no capacity in the cluster, or a model that takes long to load"
        case "not_hiring":
            return f"a worker could not be made: no more are tried for {duration(fields['seconds'])}; {fields['error']}"
        case "sick_host":
            return f"{fields['host']} is left out: shards fail there one after the other, and not elsewhere; {fields['error']}"
        case "lost_output":
            return f"{fields['shard']}: done again, {fields['error']}"
        case "storage":
            return f"the storage cannot be looked through: {fields['error']}"
        case "draining":
            return f"{fields['reason']}: {fields['running']} shards that are being done have {duration(fields['grace_s'])} to end"
        case "drained":
            return f"{fields['finished']} of them ended, {fields['handed_back']} are handed back"
        case _:
            return ""
