"""Writing files: whole or not at all, and over an existing file only where the user asks for it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from powerplan.errors import InputError, MachineError


def check_target(path: str, force: bool, where: str) -> None:
    """Raise InputError where `path` cannot be written: its folder is missing, or it exists and `force` is not set."""
    target = Path(path)
    if not path.strip():
        raise InputError("is empty; give a file", where)
    if target.is_dir():
        raise InputError(f"{path} is a folder; give a file", where)
    if target.exists() and not force:
        raise InputError(f"{path} exists; --force overwrites it", where)
    if not target.parent.is_dir():
        raise InputError(f"{path}: there is no folder {target.parent}", where)


def write_whole(path: str, content: bytes, force: bool, where: str) -> None:
    """Write a file through a temporary one in the same folder, so that no reader ever finds half of it."""
    check_target(path, force, where)
    target = Path(path)
    try:
        descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name[:80]}.")
    except OSError as error:
        raise MachineError(f"{where}: {path} cannot be written: {error.strerror}") from None
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        mask = os.umask(0)
        os.umask(mask)
        Path(name).chmod(0o666 & ~mask)
        if force:
            Path(name).replace(target)
        else:
            os.link(name, target)
            Path(name).unlink()
    except FileExistsError:
        Path(name).unlink()
        raise InputError(f"{path} exists; --force overwrites it", where) from None
    except OSError as error:
        Path(name).unlink(missing_ok=True)
        raise MachineError(f"{where}: {path} cannot be written: {error.strerror}") from None
    except KeyboardInterrupt:
        Path(name).unlink(missing_ok=True)
        raise
