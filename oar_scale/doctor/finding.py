"""One line of the doctor's report, and how an error becomes one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from oar_scale.errors import UserError, error_line
from oar_scale.redaction import redact

INSTALL = "pip install -c constraints.txt -e . in the source folder"


@dataclass(frozen=True)
class Finding:
    """The result of one check; ``text`` holds the remedy where one is needed."""

    status: Literal["ok", "warn", "FAIL"]
    item: str
    text: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", redact(self.text))  # it may quote a server's answer, or a URL

    def __str__(self) -> str:
        return f"{self.status:4} {self.item}: {self.text}"


def guarded(item: str, check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """The findings of a check; an error that it raises becomes a finding with status FAIL."""
    try:
        yield from check()
    except UserError as error:
        yield Finding("FAIL", item, " ".join(str(error).split()))
    except ImportError as error:
        yield Finding("FAIL", item, f"not checked, for an import failed ({error}); {INSTALL}")
    except Exception as error:  # whatever is broken is what this command is there to report
        yield Finding("FAIL", item, error_line(error))
