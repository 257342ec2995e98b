"""A process without the rights of root: for it, too, a folder that takes no files takes none."""

from __future__ import annotations

import ctypes
import os

_VERSION_3 = 0x20080522


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Sets(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


def give_up_rights() -> None:
    """Give up every capability of this process; call it before threads are made."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.capset(ctypes.byref(_Header(_VERSION_3, 0)), ctypes.byref((_Sets * 2)())):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
