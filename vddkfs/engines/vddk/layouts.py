"""The types, structures and constants of libvixDiskLib, as C text for cffi.

The structures grew over the releases, and the library reads and writes by its own idea of them, so
the layout is chosen by the library's release:

===========  =============================  =========================
release      ``VixDiskLibConnectParams``    ``VixDiskLibInfo``
===========  =============================  =========================
6.5          80 bytes, ends after           56 bytes
             ``vimApiVer``
6.7          128 bytes                      56 bytes
7.0 and on   128 bytes                      64 bytes: sector sizes
===========  =============================  =========================

Whatever the layout, connection parameters are given 128 zeroed bytes, and the sector sizes are not
even declared before 7.0: reading them there would be reading past the end.

x86-64 only, like VDDK itself from 6.5 on. ``va_list`` is declared as ``void *``: as a parameter it
is a pointer on this machine, and is handed on to ``vsnprintf`` untouched.
"""

from enum import IntEnum, IntFlag
from typing import Final

Release = tuple[int, ...]
"""A release of VDDK as numbers, such as (8, 0, 2); only as many as are known."""

OLDEST: Final[Release] = (6, 5)
"""Before it the completion callback had other arguments."""

CONNECT_PARAMS_BYTES: Final = 128
"""What is allocated for VixDiskLibConnectParams where the library has no function for it."""

VIX_ASYNC: Final = 25000
"""What ReadAsync and WriteAsync return when they took the request. It is no error."""

MIN_CHUNK: Final = 128
"""Sectors of the smallest chunk that QueryAllocatedBlocks takes."""
MAX_CHUNK: Final = 131072
"""Sectors of the largest chunk that is known to be used with QueryAllocatedBlocks."""
MAX_CHUNKS: Final = 512 * 1024
"""Chunks that one QueryAllocatedBlocks may span."""

MAX_IDENTITY: Final = 50
"""Characters of the identity that PrepareForAccess takes."""


class OpenFlag(IntFlag):
    """Flags of VixDiskLib_Open. Compression is for nbd and nbdssl only."""

    UNBUFFERED = 1
    SINGLE_LINK = 2
    READ_ONLY = 4
    ZLIB = 16
    FASTLZ = 32
    SKIPZ = 64


class CredentialType(IntEnum):
    """``credType`` of the connection parameters."""

    UID = 1
    SESSION_ID = 2
    TICKET_ID = 3
    SSPI = 4
    UNKNOWN = 256


class SpecType(IntEnum):
    """``specType`` of the connection parameters (6.7 and newer)."""

    VMX = 0
    VSTORAGE_OBJECT = 1
    UNKNOWN = 2


ADAPTERS: Final = {1: "ide", 2: "buslogic", 3: "lsilogic"}
"""Names of ``adapterType``, as VMDK descriptors write them; others are unknown (256)."""

_BASICS = """
typedef uint8_t uint8;
typedef uint16_t uint16;
typedef uint32_t uint32;
typedef uint64_t uint64;
typedef uint64 VixError;
typedef uint64 VixDiskLibSectorType;
typedef signed char Bool;
typedef struct VixDiskLibConnectionStruct *VixDiskLibConnection;
typedef struct VixDiskLibHandleStruct *VixDiskLibHandle;
typedef void VixDiskLibGenericLogFunc(const char *format, void *arguments);
typedef Bool (*VixDiskLibProgressFunc)(void *data, int percent);
typedef void (*VixDiskLibCompletionCB)(void *data, VixError result);
int vsnprintf(char *text, size_t size, const char *format, void *arguments);

typedef struct { uint32 cylinders; uint32 heads; uint32 sectors; } VixDiskLibGeometry;
typedef struct { uint64 offset; uint64 length; } VixDiskLibBlock;
typedef struct { uint32 numBlocks; VixDiskLibBlock blocks[]; } VixDiskLibBlockList;
"""

_CONNECT_PARAMS = """
typedef struct {
    char *vmxSpec;
    char *serverName;
    char *thumbPrint;
    long privateUse;
    int credType;
    union {
        struct { char *userName; char *password; } uid;
        struct { char *cookie; char *userName; char *key; } sessionId;
        void *ticketId;
    } creds;
    uint32 port;
    uint32 nfcHostPort;
    char *vimApiVer;
    %s
} VixDiskLibConnectParams;
"""

_CONNECT_PARAMS_TAIL = """
    char reserved[8];
    void *state;
    union {
        struct { char *id; char *datastoreMoRef; char *ssId; } vStorageObjSpec;
    } spec;
    int specType;
"""

_INFO = """
typedef struct {
    VixDiskLibGeometry biosGeo;
    VixDiskLibGeometry physGeo;
    uint64 capacity;
    int adapterType;
    int numLinks;
    char *parentFileNameHint;
    char *uuid;
    %s
} VixDiskLibInfo;
"""

_CREATE_PARAMS = """
typedef struct {
    int diskType;
    int adapterType;
    uint16 hwVersion;
    uint64 capacity;
    %s
} VixDiskLibCreateParams;
"""

_SECTOR_SIZES = "uint32 logicalSectorSize; uint32 physicalSectorSize;"


def has_long_params(release: Release) -> bool:
    """Whether VixDiskLibConnectParams of *release* has its tail (128 bytes)."""
    return release >= (6, 7)


def has_sector_sizes(release: Release) -> bool:
    """Whether VixDiskLibInfo of *release* ends with the sector sizes (64 bytes)."""
    # A library whose file name says no more than its major number is (7,), which is below (7, 0).
    return release >= (7,)


def structures(release: Release) -> str:
    """Return the C text of all types as the library of *release* has them."""
    sizes = _SECTOR_SIZES if has_sector_sizes(release) else ""
    tail = _CONNECT_PARAMS_TAIL if has_long_params(release) else ""
    return _BASICS + _CONNECT_PARAMS % tail + _INFO % sizes + _CREATE_PARAMS % sizes
