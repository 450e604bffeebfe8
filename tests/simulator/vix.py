"""The library's interface through ctypes, from the published description (not from the header).

Nothing here knows that the library is a simulator. Uses the standard library only: it is loaded by
every client process (``client.py``).
"""

import ctypes
from ctypes import (
    POINTER,
    c_char,
    c_char_p,
    c_int,
    c_long,
    c_size_t,
    c_uint8,
    c_uint16,
    c_uint32,
    c_uint64,
    c_void_p,
)
from typing import Any, ClassVar

SECTOR = 512
OK = 0
VIX_ASYNC = 25000
UNBUFFERED, SINGLE_LINK, READ_ONLY = 1, 2, 4
ZLIB, FASTLZ, SKIPZ = 16, 32, 64
UID, SESSIONID = 1, 2

FAIL, INVALID_ARG, FILE_NOT_FOUND, NOT_SUPPORTED = 1, 3, 4, 6
FILE_ERROR, DISK_FULL, FILE_READ_ONLY, FILE_ALREADY_EXISTS = 7, 8, 11, 12
FILE_ACCESS_ERROR, FILE_ALREADY_LOCKED, NOT_SUPPORTED_ON_REMOTE_OBJECT = 13, 15, 20
BUFFER_TOOSMALL, LICENSE, AUTHENTICATION_FAIL, HOST_CONNECTION_LOST = 24, 32, 35, 36
INVALID_HANDLE, INVALID_AUTHENTICATION_SESSION, VM_NOT_FOUND = 1000, 3047, 4000
SERVER_NOT_FOUND, NETWORK_CONN_REFUSED = 14008, 14009
TCP_SOCKET_ERROR, TCP_CONN_LOST = 14010, 14011
HOST_SERVER_SHUTDOWN, HOST_SERVER_NOT_AVAILABLE = 14014, 14015
DISK_NOINIT, DISK_PARTIALCHAIN, DISK_NEEDSREPAIR = 16001, 16003, 16006
DISK_OUTOFRANGE, DISK_CANTSHRINK, DISK_OPENPARENT = 16007, 16009, 16012
DISK_INVALIDCHAIN, DISK_KEY_NOTFOUND, DISK_CAPACITY_MISMATCH = 16030, 16052, 16067
DISK_NOLICENSE = 16064
MONOLITHIC_SPARSE, MONOLITHIC_FLAT, VMFS_FLAT, VMFS_THIN = 1, 2, 5, 7
IDE, BUSLOGIC, LSILOGIC = 1, 2, 3
MIN_CHUNK = 128

Bool = c_char
Handle = c_void_p
Sector = c_uint64
LogFunc = ctypes.CFUNCTYPE(None, c_char_p, c_void_p)
ProgressFunc = ctypes.CFUNCTYPE(c_char, c_void_p, c_int)
CompletionCB = ctypes.CFUNCTYPE(None, c_void_p, c_uint64)


class _Uid(ctypes.Structure):
    _fields_ = (("userName", c_char_p), ("password", c_char_p))


class _SessionId(ctypes.Structure):
    _fields_ = (("cookie", c_char_p), ("userName", c_char_p), ("key", c_char_p))


class _Creds(ctypes.Union):
    _fields_ = (("uid", _Uid), ("sessionId", _SessionId), ("ticketId", c_void_p))


class ConnectParams(ctypes.Structure):
    """As since 6.7; before, it ends behind ``state``."""

    _fields_ = (
        ("vmxSpec", c_char_p),
        ("serverName", c_char_p),
        ("thumbPrint", c_char_p),
        ("privateUse", c_long),
        ("credType", c_int),
        ("creds", _Creds),
        ("port", c_uint32),
        ("nfcHostPort", c_uint32),
        ("vimApiVer", c_char_p),
        ("reserved", c_char * 8),
        ("state", c_void_p),
        ("spec", c_void_p * 3),
        ("specType", c_int),
    )


class Info(ctypes.Structure):
    """As since 7.0; before, it ends at offset 56."""

    _fields_ = (
        ("biosGeo", c_uint32 * 3),
        ("physGeo", c_uint32 * 3),
        ("capacity", c_uint64),
        ("adapterType", c_int),
        ("numLinks", c_int),
        ("parentFileNameHint", c_char_p),
        ("uuid", c_char_p),
        ("logicalSectorSize", c_uint32),
        ("physicalSectorSize", c_uint32),
    )


class CreateParams(ctypes.Structure):
    """As since 7.0; before, it ends behind ``capacity``."""

    _fields_ = (
        ("diskType", c_int),
        ("adapterType", c_int),
        ("hwVersion", c_uint16),
        ("capacity", c_uint64),
        ("logicalSectorSize", c_uint32),
        ("physicalSectorSize", c_uint32),
    )


class Block(ctypes.Structure):
    _fields_ = (("offset", c_uint64), ("length", c_uint64))


class BlockList(ctypes.Structure):
    _fields_ = (("numBlocks", c_uint32), ("blocks", Block * 0))


assert ctypes.sizeof(ConnectParams) == 128
assert ConnectParams.specType.offset == 120
assert ctypes.sizeof(Info) == 64
assert ctypes.sizeof(CreateParams) == 32
assert BlockList.blocks.offset == 8

_BUFFER = POINTER(c_uint8)
_CONNECT = POINTER(ConnectParams)
_U32 = POINTER(c_uint32)
_SIZE = POINTER(c_size_t)
_LOGS = (LogFunc, LogFunc, LogFunc)
_PROGRESS = (ProgressFunc, c_void_p)

PROTOTYPES: dict[str, tuple[Any, ...]] = {
    "InitEx": (c_uint32, c_uint32, *_LOGS, c_char_p, c_char_p),
    "Init": (c_uint32, c_uint32, *_LOGS, c_char_p),
    "Exit": (),
    "ListTransportModes": (),
    "Cleanup": (_CONNECT, _U32, _U32),
    "Connect": (_CONNECT, POINTER(Handle)),
    "ConnectEx": (_CONNECT, c_char, c_char_p, c_char_p, POINTER(Handle)),
    "Disconnect": (Handle,),
    "PrepareForAccess": (_CONNECT, c_char_p),
    "EndAccess": (_CONNECT, c_char_p),
    "Open": (Handle, c_char_p, c_uint32, POINTER(Handle)),
    "Close": (Handle,),
    "GetInfo": (Handle, POINTER(POINTER(Info))),
    "FreeInfo": (POINTER(Info),),
    "GetTransportMode": (Handle,),
    "Read": (Handle, Sector, Sector, _BUFFER),
    "Write": (Handle, Sector, Sector, _BUFFER),
    "ReadAsync": (Handle, Sector, Sector, _BUFFER, CompletionCB, c_void_p),
    "WriteAsync": (Handle, Sector, Sector, _BUFFER, CompletionCB, c_void_p),
    "Wait": (Handle,),
    "Flush": (Handle,),
    "QueryAllocatedBlocks": (Handle, Sector, Sector, Sector, POINTER(POINTER(BlockList))),
    "FreeBlockList": (POINTER(BlockList),),
    "AllocateConnectParams": (),
    "GetConnectParams": (Handle, POINTER(_CONNECT)),
    "FreeConnectParams": (_CONNECT,),
    "ReadMetadata": (Handle, c_char_p, c_void_p, c_size_t, _SIZE),
    "GetMetadataKeys": (Handle, c_void_p, c_size_t, _SIZE),
    "WriteMetadata": (Handle, c_char_p, c_char_p),
    "Create": (Handle, c_char_p, POINTER(CreateParams), *_PROGRESS),
    "CreateChild": (Handle, c_char_p, c_int, *_PROGRESS),
    "Unlink": (Handle, c_char_p),
    "Grow": (Handle, c_char_p, Sector, c_char, *_PROGRESS),
    "Shrink": (Handle, *_PROGRESS),
    "Defragment": (Handle, *_PROGRESS),
    "Rename": (c_char_p, c_char_p),
    "Clone": (
        *(Handle, c_char_p, Handle, c_char_p, POINTER(CreateParams)),
        *(*_PROGRESS, c_char),
    ),
    "Attach": (Handle, Handle),
    "IsAttachPossible": (Handle, Handle),
    "SpaceNeededForClone": (Handle, c_int, POINTER(c_uint64)),
    "CheckRepair": (Handle, c_char_p, c_char),
    "GetErrorText": (c_uint64, c_char_p),
    "FreeErrorText": (c_void_p,),
}
_RESULTS: dict[str, Any] = {
    "Exit": None,
    "FreeInfo": None,
    "FreeConnectParams": None,
    "FreeErrorText": None,
    "ListTransportModes": c_char_p,
    "GetTransportMode": c_char_p,
    "GetErrorText": c_void_p,
    "AllocateConnectParams": _CONNECT,
}
SINCE_67 = frozenset({"QueryAllocatedBlocks", "FreeBlockList", "AllocateConnectParams"})


class Library:
    """The functions of one libvixDiskLib, as attributes without the prefix."""

    siblings: ClassVar = ("libgvmomi.so", "libdiskLibPlugin.so")

    def __init__(self, libdir: str) -> None:
        for sibling in self.siblings:  # InitEx asks for them by their bare names
            ctypes.CDLL(f"{libdir}/lib64/{sibling}", mode=ctypes.RTLD_GLOBAL)
        self.dll = ctypes.CDLL(f"{libdir}/lib64/libvixDiskLib.so")
        for name, arguments in PROTOTYPES.items():
            function = getattr(self.dll, f"VixDiskLib_{name}", None)
            if function is None:
                assert name in SINCE_67, name
                continue
            function.argtypes = arguments
            function.restype = _RESULTS.get(name, c_uint64)
            setattr(self, name, function)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"this release has no {name}")
