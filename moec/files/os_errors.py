"""Explanations of system errors on files, with a remedy."""

from __future__ import annotations

import errno

_WORDS = {
    errno.ENOENT: "there is no such file or folder",
    errno.EEXIST: "it exists already",
    errno.EISDIR: "it is a folder, not a file",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.EACCES: "permission denied; change its permissions, or choose another",
    errno.EPERM: "permission denied; change its permissions, or choose another",
    errno.EROFS: "the disk is read-only; choose another",
    errno.ENOSPC: "the disk is full; free some space",
    errno.EDQUOT: "your quota of the disk is used up; free some space",
    errno.EFBIG: "it is larger than is allowed",
    errno.ENAMETOOLONG: "the name is too long",
    errno.ELOOP: "its links form a cycle",
    errno.EMFILE: "too many files are open; raise the limit (ulimit -n)",
    errno.EIO: "the disk failed; look at the system's log",
    errno.EBUSY: "another process uses it",
    errno.ETXTBSY: "another process is executing it",
    errno.ENXIO: "it is a device or a pipe, not a file",
    errno.ENODEV: "it is a device or a pipe, not a file",
}


def reason(error: OSError) -> str:
    """The reason of an OSError, in moec's words if there are any, else in the system's."""
    return _WORDS.get(error.errno or 0) or error.strerror or str(error) or type(error).__name__
