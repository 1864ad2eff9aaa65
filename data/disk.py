"""Writing below data.cache_dir: what the disk may refuse, as messages, and folders that are complete or not there."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import uuid
from collections.abc import Callable
from typing import TypeVar

from data.cache_files import is_complete

Result = TypeVar("Result")

FULL = (errno.ENOSPC, errno.EDQUOT)
NOT_ALLOWED = (errno.EROFS, errno.EACCES, errno.EPERM)
NO_FOLDER = (errno.ENOTDIR, errno.ENOENT, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP)
FOLDER_ERRORS = (*FULL, *NOT_ALLOWED, *NO_FOLDER)
"""What the user can mend with another folder or more room; any other error of the disk is shown whole."""


def writing(cache_dir: str, work: Callable[[], Result]) -> Result:
    """Do `work`; trouble with the disk becomes a message about data.cache_dir."""
    try:
        return work()
    except OSError as err:
        if err.errno in FOLDER_ERRORS:
            raise ValueError(
                f"data.cache_dir={cache_dir}: the token cache cannot be written ({err}); "
                "free space there or set data.cache_dir to another folder that every rank sees"
            ) from err
        raise


def new_build_folder(cache_dir: str) -> str:
    """A folder to build in, after what killed builds of this machine left has been removed."""
    os.makedirs(cache_dir, exist_ok=True)
    _clear_dead_builds(cache_dir)
    folder = os.path.join(cache_dir, f".build-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex}")
    os.mkdir(folder)
    return folder


def _clear_dead_builds(cache_dir: str) -> None:
    """Remove what killed builds of this machine left; others' builds may be alive and stay."""
    for name in os.listdir(cache_dir):
        host, _, pid = name.removeprefix(".build-").rpartition("-")[0].rpartition("-")
        if name.startswith(".build-") and host == socket.gethostname() and pid.isdigit() and not _alive(int(pid)):
            shutil.rmtree(os.path.join(cache_dir, name), ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def put_in_place(work: str, folder: str) -> None:
    """Rename the finished build to its key. If another run was faster, its cache is as good and stays."""
    if os.path.isdir(folder) and not is_complete(folder):
        damaged = f"{work}-damaged"
        os.rename(folder, damaged)
        shutil.rmtree(damaged, ignore_errors=True)
    try:
        os.rename(work, folder)
    except OSError as err:
        if err.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


def not_shared(cache_dir: str) -> ValueError:
    """For a rank that does not see what rank 0 wrote."""
    return ValueError(
        f"data.cache_dir={cache_dir} is not the same folder on every rank: what rank 0 wrote is missing here; "
        "set data.cache_dir to a folder that all machines share"
    )
