"""Checkpoints, written atomically, each with a digest of its content."""

from __future__ import annotations

import hashlib
import io
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressed_ad.errors import CheckpointError, NumericalError, one_line
from compressed_ad.files import write_atomically
from compressed_ad.models.ad import check_finite


def digest(value: Any) -> str:
    """SHA-256 of nested dictionaries, lists, numbers, strings and tensors, by content."""
    h = hashlib.sha256()

    def feed(item: Any) -> None:
        if isinstance(item, Tensor):
            h.update(f"{item.dtype}{tuple(item.shape)}".encode())
            h.update(item.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(item, Mapping):
            for key in item:
                h.update(repr(key).encode())
                feed(item[key])
        elif isinstance(item, (list, tuple)):
            h.update(f"[{len(item)}".encode())
            for part in item:
                feed(part)
        else:
            h.update(repr(item).encode())

    feed(value)
    return h.hexdigest()


def save(path: Path, content: Mapping[str, Any]) -> None:
    """Save tensors and plain data atomically, with their digest."""
    buffer = io.BytesIO()
    torch.save({**content, "digest": digest(content)}, buffer)
    write_atomically(path, buffer.getvalue(), error=CheckpointError)


def load(path: Path) -> dict[str, Any]:
    """Load a file of ``save`` to the CPU. Nothing in it is executed.

    Raises ``CheckpointError`` naming file and cause if it is missing, damaged or foreign, and
    ``NumericalError`` if one of its tensors holds NaN or infinity.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a foreign file gets one error below
            content = torch.load(path, map_location="cpu", weights_only=True)
        ours = isinstance(content, dict) and "digest" in content
        sound = ours and content.pop("digest") == digest(content)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such checkpoint") from None
    except Exception as error:  # a changed byte can make torch and pickle raise anything
        cause = one_line(error, 120)
        raise CheckpointError(f"{path}: damaged, or not a checkpoint ({cause})") from None
    if not ours:
        raise CheckpointError(f"{path}: not a checkpoint of this library")
    if not sound:
        raise CheckpointError(f"{path}: damaged (its content does not match its digest)")
    check_finite(f"{path}: ", content)
    return content  # type: ignore[no-any-return]


class CheckpointDirectory:
    """Numbered training checkpoints of one run, of which the newest ``keep`` are kept."""

    def __init__(self, path: Path, keep: int) -> None:
        self.path, self.keep = path, keep

    def steps(self) -> list[int]:
        """Steps with a checkpoint, in ascending order."""
        found = (re.fullmatch(r"step-(\d+)\.pt", file.name) for file in self.path.glob("step-*"))
        return sorted(int(match[1]) for match in found if match)

    def file(self, step: int) -> Path:
        return self.path / f"step-{step:08d}.pt"

    def save(self, step: int, content: Mapping[str, Any]) -> None:
        """Save a checkpoint, and only then delete the oldest ones."""
        save(self.file(step), content)
        for old in self.steps()[: -self.keep]:
            self.file(old).unlink(missing_ok=True)

    def latest(self) -> tuple[dict[str, Any] | None, list[str]]:
        """The newest sound checkpoint, or None; and a message for each newer one that is damaged."""
        damaged: list[str] = []
        for step in reversed(self.steps()):
            try:
                return load(self.file(step)), damaged
            except (CheckpointError, NumericalError) as error:
                damaged.append(f"{error}; skipped")
        return None, damaged
