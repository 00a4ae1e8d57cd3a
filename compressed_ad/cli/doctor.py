"""``cad doctor``: checks this installation."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from compressed_ad.cli.call import Call, Command
from compressed_ad.cli.display import print_lines
from compressed_ad.errors import RunError
from compressed_ad.runs.directory import extras, hardware, revision, versions


def run(call: Call) -> None:
    machine, problems = hardware(), list[str]()
    print_lines("versions  " + ", ".join(f"{name} {version}" for name, version in versions().items()))
    print_lines(f"revision  {revision() or 'not a git checkout'}")
    print_lines(f"machine   {machine['processor']}, {machine['cores']} core(s), {machine['memory_gib']} GiB")
    print_lines(f"device    {_device(problems)}")
    for name, installed in extras().items():
        print_lines(
            f"extra     {name}: {'installed' if installed else f'not installed (compressed-ad[{name}])'}"
        )
    print_lines(f"kernels   {_kernels()}")
    for folder in (Path(), Path("datasets"), Path("runs"), Path(tempfile.gettempdir())):
        print_lines(f"folder    {folder.resolve()}: {_writable(folder, problems)}")
    if problems:
        raise RunError("\n".join(problems))
    print_lines("all well")


DOCTOR = Command(run, common=())


def _device(problems: list[str]) -> str:
    try:
        import torch
    except ImportError as error:
        problems.append(f"torch cannot be imported ({error})")
        return "unknown"
    if not torch.cuda.is_available():
        return "cpu (no CUDA device)"
    names = [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())]
    return f"cuda: {', '.join(names)}"


def _kernels() -> str:
    source = Path(__file__).parents[1] / "learners" / "ppo" / "kernels.py"
    folder = Path(os.environ.get("NUMBA_CACHE_DIR", source.parent / "__pycache__"))
    found = [file for file in folder.rglob("kernels*.nbi") if file.stat().st_mtime > source.stat().st_mtime]
    if found:
        return f"compiled, cached in {folder}"
    return "not compiled yet; the first collection takes about a minute longer"


def _writable(folder: Path, problems: list[str]) -> str:
    folder = folder.resolve()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            return "writable" if existing == folder else "can be made"
    except OSError as error:
        problems.append(f"{existing}: cannot be written to ({error.strerror})")
        return "NOT writable"
