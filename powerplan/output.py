"""Writing files: whole or not at all, and over an existing file only where the user asks for it.

Commands check their outputs with `check_targets` before any work, and write them with `write_whole` when it is done.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import combinations
from pathlib import Path

from powerplan.errors import InputError, MachineError, PowerplanError

_USERS_FAULT = frozenset(
    {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL}
)
"""What another path cures. Anything else, such as a full disk, is the machine's."""


def check_targets(
    targets: Mapping[str, str | None], force: bool, inputs: Mapping[str, str | Path | None] | None = None
) -> None:
    """Raise an error where a command will not be able to write its files.

    Args:
        targets: The path that each option gives, such as {"--write": "out.yaml"}; None where it is not given.
        force: Whether files that exist are overwritten.
        inputs: The files that the command reads, by the option or argument that names them.

    Raises:
        InputError: A target cannot be a file, exists and `force` is not set, is one of `inputs`, is where standard
            output or standard error goes, or is given twice.
        MachineError: A file cannot be made for another reason, such as a full disk.
    """
    given = [(where, path) for where, path in targets.items() if path is not None]
    for where, path in given:
        _check_name(path, where)
        for name, read in (inputs or {}).items():
            if read is not None and _is_same(path, read):
                raise InputError(f"{path} is the file that {name} reads; give another", where)
        check_target(path, force, where)
    for (first, path), (second, other) in combinations(given, 2):
        if _is_same(path, other):
            raise InputError(f"{other} is the file of {first} too; give two files", second)


def check_target(path: str, force: bool, where: str) -> None:
    """Raise InputError where `path` cannot be written, and MachineError where the machine is why: see check_targets.

    A pipe or a character device, such as /dev/stdout or a process substitution, needs no `force`.
    """
    if not _is_file(path, force, where):
        return
    try:
        folder = Path(os.path.realpath(path)).parent
        # Only the attempt tells: permissions, a read-only or a full disk, a path that is a little too long.
        with _temporary(folder) as probe:
            probe.touch(exist_ok=False)
    except OSError as error:
        raise _refusal(error, path, where) from None


def write_whole(path: str, content: bytes, force: bool, where: str) -> None:
    """Write a file through a temporary one in the same folder, so that no reader ever finds half of it.

    The content is on the disk when this returns. A symbolic link stays, and the file that it leads to is written. Into
    a pipe or a character device `content` is written as it is.

    Raises:
        InputError: `path` cannot be written, or exists by now and `force` is not set.
        MachineError: Writing fails, such as on a full disk. Nothing is left behind, and an old file stays as it was.
    """
    is_file = _is_file(path, force, where)
    try:
        if is_file:
            _write_file(Path(os.path.realpath(path)), content, force)
        else:
            _write_stream(path, content)
    except FileExistsError:
        raise InputError(f"{path} exists; --force overwrites it", where) from None
    except OSError as error:
        raise MachineError(f"{where}: {path} cannot be written: {_reason(error)}") from None


def _check_name(path: str, where: str) -> None:
    if not path.strip():
        raise InputError("is empty; give a file", where)
    last = path.replace(os.altsep or os.sep, os.sep).rpartition(os.sep)[2]  # Path drops the slash of "folder/".
    if last in ("", ".", "..") or stat.S_ISDIR(_mode(path, where)):
        raise InputError(f"{path} is a folder; give a file", where)


def _is_file(path: str, force: bool, where: str) -> bool:
    """Return whether `path` is, or will be, a regular file; False for a stream. Raises InputError for anything else."""
    _check_name(path, where)
    mode = _mode(path, where)
    if not mode and _mode(path, where, follow_symlinks=False):
        raise InputError(f"{path} is a link to a file that does not exist; give another", where)
    if not mode:
        parent = Path(path).parent
        if parent.is_dir():
            return True
        what = f"{parent} is not a folder" if parent.exists() else f"there is no folder {parent}"
        raise InputError(f"{path}: {what}", where)
    is_stream = stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)
    if not is_stream and not stat.S_ISREG(mode):
        raise InputError(f"{path} is not a file that can be written", where)
    if not is_stream:
        for descriptor, name in ((1, "standard output"), (2, "standard error")):
            if _is_descriptor(path, descriptor):
                raise InputError(f"{path} is where {name} goes; give another file", where)
        if not force:
            raise InputError(f"{path} exists; --force overwrites it", where)
    if not mode & 0o222 or not os.access(path, os.W_OK):
        raise InputError(f"{path} is read-only", where)
    return not is_stream


def _mode(path: str, where: str, follow_symlinks: bool = True) -> int:
    """Return the mode of what is at `path`; 0 where there is nothing. Raises InputError where nobody could look."""
    try:
        return Path(path).stat(follow_symlinks=follow_symlinks).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return 0
    except OSError as error:
        raise _refusal(error, path, where) from None
    except ValueError as error:  # A NUL character, or one that the file system's encoding lacks.
        reason = "it holds a NUL character" if "\0" in path else error
        raise InputError(f"{path} cannot be written: {reason}", where) from None


def _is_same(path: str, other: str | Path) -> bool:
    """Whether two paths lead to one file, by any spelling, link or hard link. Devices, as /dev/null, may be shared."""
    try:
        return Path(path).samefile(other) and not stat.S_ISCHR(Path(path).stat().st_mode)
    except (OSError, ValueError):
        pass
    try:
        return os.path.realpath(path) == os.path.realpath(other)
    except (OSError, ValueError):
        return False


def _is_descriptor(path: str, descriptor: int) -> bool:
    try:
        return os.path.samestat(Path(path).stat(), os.fstat(descriptor))
    except OSError:
        return False


def _refusal(error: OSError, path: str, where: str) -> PowerplanError:
    """Return the error for the user about a file that nothing has been written to yet."""
    if error.errno in _USERS_FAULT:
        return InputError(f"{path} cannot be written: {_reason(error)}", where)
    return MachineError(f"{where}: {path} cannot be written: {_reason(error)}")


def _reason(error: OSError) -> str:
    return error.strerror or str(error) or type(error).__name__


@contextmanager
def _temporary(folder: Path) -> Iterator[Path]:
    """Yield the path of a file that does not exist yet, and remove what is there in the end, whatever happens.

    The name is chosen before anything is made, so that an interrupt finds no moment at which a file has no owner.
    """
    path = folder / f".powerplan-{os.urandom(8).hex()}"
    try:
        yield path
    finally:
        with suppress(OSError):
            path.unlink()


def _write_file(target: Path, content: bytes, force: bool) -> None:
    with _temporary(target.parent) as path:
        with path.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # Else a crash after the rename could leave an empty file of this name.
        if force:
            path.replace(target)
        else:
            _take_name(path, target)
    _sync_folder(target.parent)


def _take_name(path: Path, target: Path) -> None:
    """Give the file at `path` the name `target`. Raises FileExistsError where another file has it by now."""
    try:
        os.link(path, target)
    except FileExistsError:
        raise
    except OSError:  # FAT, exFAT and some network filesystems have no hard links.
        with target.open("xb"):
            pass
        try:
            path.replace(target)
        except BaseException:
            target.unlink()
            raise


def _sync_folder(folder: Path) -> None:
    """Bring the name of a new file to the disk too, where the system can: Windows opens no folder."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _write_stream(path: str, content: bytes) -> None:
    def open_at_once(name: str, flags: int) -> int:
        # A named pipe that nobody reads fails here, and does not wait for ever.
        return os.open(name, os.O_WRONLY | at_once | getattr(os, "O_BINARY", 0))

    at_once = getattr(os, "O_NONBLOCK", 0)
    with open(path, "wb", buffering=0, opener=open_at_once) as stream:
        if at_once:
            os.set_blocking(stream.fileno(), True)
        left = memoryview(content)
        while left:
            left = left[stream.write(left) :]
