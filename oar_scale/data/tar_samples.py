"""The samples of a tar: neighbouring members that share a KEY, WebDataset's rule, without what other programs leave in a folder.

a.b/7.jpg  a.b/7.txt  a.b/7.json   ->   ("a.b/7", {"jpg": ..., "txt": ..., "json": ...})
a.b/._7.jpg                        ->   passed over (:mod:`oar_scale.data.data_files`)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import compress

from oar_scale.data.data_files import which_are_data
from oar_scale.data.tars import LIMITS, Run, TarLimits, runs

TWICE = "comes twice in its shard: a name used twice, or members not next to each other (unpack it, and pack it with tar --sort=name)"
"""The fault of a sample whose key comes again later in its shard; follows "sample KEY"."""


class Parts(dict[str, memoryview]):
    """The members of a sample by extension."""

    doubled = ""
    """An extension of which the sample has more than one member, so that nobody can say which is meant; the first is here."""


OnPassed = Callable[[str], None]
"""Called with the name of each member that is passed over."""


def data_runs(data: memoryview, where: str, limits: TarLimits = LIMITS, on_passed: OnPassed | None = None) -> Iterator[Run]:
    """The members that are data, as columns (names, offsets, sizes), some thousand at a time. Raises as ``tars.members``."""
    for names, offsets, sizes in runs(data, where, limits):
        kept = which_are_data(names)
        if kept is None:
            yield names, offsets, sizes
            continue
        for name, keep in zip(names, kept, strict=True):
            if on_passed and not keep:
                on_passed(name)
        yield list(compress(names, kept)), list(compress(offsets, kept)), list(compress(sizes, kept))


def samples(data: memoryview, where: str, limits: TarLimits = LIMITS, on_passed: OnPassed | None = None) -> Iterator[tuple[str, Parts]]:
    """The samples of a tar: neighbouring members that share a KEY, as ``(KEY, {extension: content})``.

    KEY is the name up to the first dot of its last part, the extension is what follows, in lower case: ``a.b/7.Codes.npy``
    is ``codes.npy`` of ``a.b/7``. Names without either (``README``) belong to no sample, nor does what lies under
    ``__meta__``, nor what is no data. A key that comes again later is a second sample, as in WebDataset.

    Raises:
        UserError: as :func:`oar_scale.data.tars.members`.
    """
    key, sample = "", Parts()
    for run in data_runs(data, where, limits, on_passed):
        for name, offset, size in zip(*run, strict=True):
            of, extension = key_and_extension(name)
            if not of:
                if on_passed:
                    on_passed(name)
                continue
            if of != key:
                if sample:
                    yield key, sample
                key, sample = of, Parts()
            if extension in sample:
                sample.doubled = extension
            else:
                sample[extension] = data[offset : offset + size]
    if sample:
        yield key, sample


def key_and_extension(name: str) -> tuple[str, str]:
    """WebDataset's rule for a member's name; two empty strings for a member of no sample."""
    start = name.rfind("/") + 1
    cut = name.find(".", start)
    if cut <= start or (name.startswith("__") and re.match(r"__[^/]*__($|/)", name)):
        return "", ""
    return name[:cut], name[cut + 1 :].lower()
