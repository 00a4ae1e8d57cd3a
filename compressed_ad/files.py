"""Writing files so that at every moment they are absent, the old content or the whole new content."""

from __future__ import annotations

import os
from pathlib import Path

from compressed_ad.errors import RunError


def write_atomically(path: Path, *content: bytes, error: type[RunError] = RunError) -> None:
    """Replace ``path`` by ``content`` in one step that survives a crash; ``error`` if it cannot be done."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("wb") as file:
            for part in content:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError as cause:
        aside.unlink(missing_ok=True)
        reason = cause.strerror or str(cause)
        raise error(f"{path}: cannot be written ({reason}); what was there is untouched") from cause
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
