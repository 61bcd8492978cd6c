"""A second user of the same machine, as which a test looks at what the first one leaves there."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence

import pytest

UID = 65534
"""nobody"""


def as_second_user(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run a command as another user; skips the test where this user may not become one."""
    if os.geteuid() != 0:
        pytest.skip("only root can act as a second user")
    return subprocess.run(command, user=UID, group=UID, extra_groups=[], cwd="/", capture_output=True, text=True, check=False)
