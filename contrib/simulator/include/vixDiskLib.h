/*
 * The public interface of the virtual disk library, as a client sees it.
 *
 * Written for the simulator from what is publicly known of VDDK: names, values and layouts are the
 * interface's, the text is ours. tests/simulator compares every offset and size with the published
 * figures. VIX_RELEASE (65, 67, 70, 80) chooses the release that is imitated; a client that wants
 * all of them leaves it undefined and gets the newest.
 */
#ifndef VIX_DISK_LIB_H
#define VIX_DISK_LIB_H

#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#ifndef VIX_RELEASE
#define VIX_RELEASE 80
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef uint64_t VixError; /* the code in the low 16 bits; the others may hold anything */
typedef uint64_t VixDiskLibSectorType;
typedef char Bool;

#define VIX_ERROR_CODE(error) ((error) & 0xFFFF)
#define VIX_SUCCEEDED(error) ((error) == VIX_OK)
#define VIX_FAILED(error) ((error) != VIX_OK)
#define VIXDISKLIB_SECTOR_SIZE 512

enum {
    VIX_OK = 0,
    VIX_E_FAIL = 1,
    VIX_E_OUT_OF_MEMORY = 2,
    VIX_E_INVALID_ARG = 3,
    VIX_E_FILE_NOT_FOUND = 4,
    VIX_E_OBJECT_IS_BUSY = 5,
    VIX_E_NOT_SUPPORTED = 6,
    VIX_E_FILE_ERROR = 7,
    VIX_E_DISK_FULL = 8,
    VIX_E_INCORRECT_FILE_TYPE = 9,
    VIX_E_CANCELLED = 10,
    VIX_E_FILE_READ_ONLY = 11,
    VIX_E_FILE_ALREADY_EXISTS = 12,
    VIX_E_FILE_ACCESS_ERROR = 13,
    VIX_E_FILE_ALREADY_LOCKED = 15,
    VIX_E_NOT_SUPPORTED_ON_REMOTE_OBJECT = 20,
    VIX_E_FILE_NAME_INVALID = 22,
    VIX_E_BUFFER_TOOSMALL = 24,
    VIX_E_OBJECT_NOT_FOUND = 25,
    VIX_E_HOST_NOT_CONNECTED = 26,
    VIX_E_LICENSE = 32,
    VIX_E_AUTHENTICATION_FAIL = 35,
    VIX_E_HOST_CONNECTION_LOST = 36,
    VIX_E_INVALID_HANDLE = 1000,
    VIX_E_INVALID_AUTHENTICATION_SESSION = 3047,
    VIX_E_VM_NOT_FOUND = 4000,
    VIX_E_SNAPSHOT_NOTFOUND = 13003,
    VIX_E_HOST_SERVER_NOT_FOUND = 14008,
    VIX_E_HOST_NETWORK_CONN_REFUSED = 14009,
    VIX_E_HOST_TCP_SOCKET_ERROR = 14010,
    VIX_E_HOST_TCP_CONN_LOST = 14011,
    VIX_E_HOST_SERVER_SHUTDOWN = 14014,
    VIX_E_HOST_SERVER_NOT_AVAILABLE = 14015,
    VIX_E_DISK_INVAL = 16000,
    VIX_E_DISK_NOINIT = 16001,
    VIX_E_DISK_NOIO = 16002,
    VIX_E_DISK_PARTIALCHAIN = 16003,
    VIX_E_DISK_NEEDSREPAIR = 16006,
    VIX_E_DISK_OUTOFRANGE = 16007,
    VIX_E_DISK_CID_MISMATCH = 16008,
    VIX_E_DISK_CANTSHRINK = 16009,
    VIX_E_DISK_UNSUPPORTEDDISKVERSION = 16011,
    VIX_E_DISK_OPENPARENT = 16012,
    VIX_E_DISK_NOTSUPPORTED = 16013,
    VIX_E_DISK_INVALIDCHAIN = 16030,
    VIX_E_DISK_KEY_NOTFOUND = 16052,
    VIX_E_DISK_SUBSYSTEM_INIT_FAIL = 16053,
    VIX_E_DISK_INVALID_CONNECTION = 16054,
    VIX_E_DISK_INVALIDDISK = 16063,
    VIX_E_DISK_NOLICENSE = 16064,
    VIX_E_DISK_NODEVICE = 16065,
    VIX_E_DISK_CAPACITY_MISMATCH = 16067,
    VIX_E_DISK_PARENT_NOTALLOWED = 16068,
    VIX_E_DISK_ATTACH_ROOTLINK = 16069,
    VIX_E_CANNOT_CONNECT_TO_HOST = 18000,
    VIX_ASYNC = 25000, /* a success: the callback tells the result */
    VIX_E_ASYNC_MIXEDMODE_UNSUPPORTED = 26000,
};

/* ---- flags of VixDiskLib_Open, and limits ---- */

#define VIXDISKLIB_FLAG_OPEN_UNBUFFERED (1 << 0)
#define VIXDISKLIB_FLAG_OPEN_SINGLE_LINK (1 << 1)
#define VIXDISKLIB_FLAG_OPEN_READ_ONLY (1 << 2)
#define VIXDISKLIB_FLAG_OPEN_COMPRESSION_ZLIB (1 << 4)
#define VIXDISKLIB_FLAG_OPEN_COMPRESSION_FASTLZ (1 << 5)
#define VIXDISKLIB_FLAG_OPEN_COMPRESSION_SKIPZ (1 << 6)

#define VIXDISKLIB_MIN_CHUNK_SIZE 128                /* sectors */
#define VIXDISKLIB_MAX_CHUNK_SIZE (128 * 1024)       /* sectors */
#define VIXDISKLIB_MAX_CHUNK_NUMBER (512 * 1024)     /* chunks in one query */

/* ---- types ---- */

typedef enum {
    VIXDISKLIB_CRED_UID = 1,
    VIXDISKLIB_CRED_SESSIONID = 2,
    VIXDISKLIB_CRED_TICKETID = 3,
    VIXDISKLIB_CRED_SSPI = 4,
    VIXDISKLIB_CRED_UNKNOWN = 256,
} VixDiskLibCredType;

typedef enum {
    VIXDISKLIB_SPEC_VMX = 0,
    VIXDISKLIB_SPEC_VSTORAGE_OBJECT = 1,
    VIXDISKLIB_SPEC_UNKNOWN = 2,
} VixDiskLibSpecType;

typedef enum {
    VIXDISKLIB_DISK_MONOLITHIC_SPARSE = 1,
    VIXDISKLIB_DISK_MONOLITHIC_FLAT = 2,
    VIXDISKLIB_DISK_SPLIT_SPARSE = 3,
    VIXDISKLIB_DISK_SPLIT_FLAT = 4,
    VIXDISKLIB_DISK_VMFS_FLAT = 5,
    VIXDISKLIB_DISK_STREAM_OPTIMIZED = 6,
    VIXDISKLIB_DISK_VMFS_THIN = 7,
    VIXDISKLIB_DISK_VMFS_SPARSE = 8,
    VIXDISKLIB_DISK_UNKNOWN = 256,
} VixDiskLibDiskType;

typedef enum {
    VIXDISKLIB_ADAPTER_IDE = 1,
    VIXDISKLIB_ADAPTER_SCSI_BUSLOGIC = 2,
    VIXDISKLIB_ADAPTER_SCSI_LSILOGIC = 3,
    VIXDISKLIB_ADAPTER_UNKNOWN = 256,
} VixDiskLibAdapterType;

typedef union {
    struct {
        char *userName;
        char *password;
    } uid;
    struct {
        char *cookie;
        char *userName;
        char *key;
    } sessionId;
    struct VixDiskLibTicketId *ticketId;
} VixDiskLibCreds;

typedef struct {
    char *vmxSpec;
    char *serverName;
    char *thumbPrint;
    long privateUse;
    VixDiskLibCredType credType;
    VixDiskLibCreds creds;
    uint32_t port;        /* of the VIM service; 0 is 443 */
    uint32_t nfcHostPort; /* of NFC; 0 is 902 */
    char *vimApiVer;
    char reserved[8];
    void *state;
#if VIX_RELEASE >= 67
    union {
        struct {
            char *id;
            char *datastoreMoRef;
            char *ssId;
        } vStorageObjSpec;
    } spec;
    VixDiskLibSpecType specType;
#endif
} VixDiskLibConnectParams;

typedef struct {
    uint32_t cylinders;
    uint32_t heads;
    uint32_t sectors;
} VixDiskLibGeometry;

typedef struct {
    VixDiskLibGeometry biosGeo;
    VixDiskLibGeometry physGeo;
    VixDiskLibSectorType capacity; /* sectors */
    VixDiskLibAdapterType adapterType;
    int numLinks;
    char *parentFileNameHint;
    char *uuid;
#if VIX_RELEASE >= 70
    uint32_t logicalSectorSize;  /* bytes */
    uint32_t physicalSectorSize; /* bytes */
#endif
} VixDiskLibInfo;

typedef struct {
    uint64_t offset; /* sectors */
    uint64_t length; /* sectors */
} VixDiskLibBlock;

typedef struct {
    uint32_t numBlocks;
    VixDiskLibBlock blocks[1]; /* numBlocks of them */
} VixDiskLibBlockList;

typedef struct {
    VixDiskLibDiskType diskType;
    VixDiskLibAdapterType adapterType;
    uint16_t hwVersion;
    VixDiskLibSectorType capacity; /* sectors */
#if VIX_RELEASE >= 70
    uint32_t logicalSectorSize;
    uint32_t physicalSectorSize;
#endif
} VixDiskLibCreateParams;

typedef struct VixDiskLibConnectionStruct *VixDiskLibConnection;
typedef struct VixDiskLibHandleStruct *VixDiskLibHandle;

typedef void(VixDiskLibGenericLogFunc)(const char *fmt, va_list args);
typedef Bool (*VixDiskLibProgressFunc)(void *data, int percent);
typedef void (*VixDiskLibCompletionCB)(void *cbData, VixError result);

/* ---- the library ---- */

VixError VixDiskLib_InitEx(uint32_t majorVersion, uint32_t minorVersion, VixDiskLibGenericLogFunc *log,
                           VixDiskLibGenericLogFunc *warn, VixDiskLibGenericLogFunc *panic,
                           const char *libDir, const char *configFile);
VixError VixDiskLib_Init(uint32_t majorVersion, uint32_t minorVersion, VixDiskLibGenericLogFunc *log,
                         VixDiskLibGenericLogFunc *warn, VixDiskLibGenericLogFunc *panic,
                         const char *libDir);
void VixDiskLib_Exit(void);
const char *VixDiskLib_ListTransportModes(void);
VixError VixDiskLib_Cleanup(const VixDiskLibConnectParams *params, uint32_t *numCleanedUp,
                            uint32_t *numRemaining);
char *VixDiskLib_GetErrorText(VixError error, const char *locale);
void VixDiskLib_FreeErrorText(char *text);

/* ---- connections ---- */

#if VIX_RELEASE >= 67
VixDiskLibConnectParams *VixDiskLib_AllocateConnectParams(void);
#endif
VixError VixDiskLib_GetConnectParams(const VixDiskLibConnection connection,
                                     VixDiskLibConnectParams **params);
void VixDiskLib_FreeConnectParams(VixDiskLibConnectParams *params);
VixError VixDiskLib_Connect(const VixDiskLibConnectParams *params, VixDiskLibConnection *connection);
VixError VixDiskLib_ConnectEx(const VixDiskLibConnectParams *params, Bool readOnly,
                              const char *snapshotRef, const char *transportModes,
                              VixDiskLibConnection *connection);
VixError VixDiskLib_Disconnect(VixDiskLibConnection connection);
VixError VixDiskLib_PrepareForAccess(const VixDiskLibConnectParams *params, const char *identity);
VixError VixDiskLib_EndAccess(const VixDiskLibConnectParams *params, const char *identity);

/* ---- disks ---- */

VixError VixDiskLib_Open(const VixDiskLibConnection connection, const char *path, uint32_t flags,
                         VixDiskLibHandle *handle);
VixError VixDiskLib_Close(VixDiskLibHandle handle);
VixError VixDiskLib_GetInfo(VixDiskLibHandle handle, VixDiskLibInfo **info);
void VixDiskLib_FreeInfo(VixDiskLibInfo *info);
const char *VixDiskLib_GetTransportMode(VixDiskLibHandle handle);
VixError VixDiskLib_Read(VixDiskLibHandle handle, VixDiskLibSectorType startSector,
                         VixDiskLibSectorType numSectors, uint8_t *buffer);
VixError VixDiskLib_Write(VixDiskLibHandle handle, VixDiskLibSectorType startSector,
                          VixDiskLibSectorType numSectors, const uint8_t *buffer);
VixError VixDiskLib_ReadAsync(VixDiskLibHandle handle, VixDiskLibSectorType startSector,
                              VixDiskLibSectorType numSectors, uint8_t *buffer,
                              VixDiskLibCompletionCB callback, void *cbData);
VixError VixDiskLib_WriteAsync(VixDiskLibHandle handle, VixDiskLibSectorType startSector,
                               VixDiskLibSectorType numSectors, const uint8_t *buffer,
                               VixDiskLibCompletionCB callback, void *cbData);
VixError VixDiskLib_Wait(VixDiskLibHandle handle);
VixError VixDiskLib_Flush(VixDiskLibHandle handle);
#if VIX_RELEASE >= 67
VixError VixDiskLib_QueryAllocatedBlocks(VixDiskLibHandle handle, VixDiskLibSectorType startSector,
                                         VixDiskLibSectorType numSectors,
                                         VixDiskLibSectorType chunkSize,
                                         VixDiskLibBlockList **blockList);
VixError VixDiskLib_FreeBlockList(VixDiskLibBlockList *blockList);
#endif
VixError VixDiskLib_ReadMetadata(VixDiskLibHandle handle, const char *key, char *buffer, size_t length,
                                 size_t *requiredLength);
VixError VixDiskLib_GetMetadataKeys(VixDiskLibHandle handle, char *keys, size_t maxLength,
                                    size_t *requiredLength);
VixError VixDiskLib_WriteMetadata(VixDiskLibHandle handle, const char *key, const char *value);

/* ---- disks as files ---- */

VixError VixDiskLib_Create(const VixDiskLibConnection connection, const char *path,
                           const VixDiskLibCreateParams *params, VixDiskLibProgressFunc progress,
                           void *data);
VixError VixDiskLib_CreateChild(VixDiskLibHandle handle, const char *childPath,
                                VixDiskLibDiskType diskType, VixDiskLibProgressFunc progress,
                                void *data);
VixError VixDiskLib_Unlink(VixDiskLibConnection connection, const char *path);
VixError VixDiskLib_Grow(VixDiskLibConnection connection, const char *path,
                         VixDiskLibSectorType capacity, Bool updateGeometry,
                         VixDiskLibProgressFunc progress, void *data);
VixError VixDiskLib_Shrink(VixDiskLibHandle handle, VixDiskLibProgressFunc progress, void *data);
VixError VixDiskLib_Defragment(VixDiskLibHandle handle, VixDiskLibProgressFunc progress, void *data);
VixError VixDiskLib_Rename(const char *sourcePath, const char *targetPath);
VixError VixDiskLib_Clone(const VixDiskLibConnection targetConnection, const char *targetPath,
                          const VixDiskLibConnection sourceConnection, const char *sourcePath,
                          const VixDiskLibCreateParams *params, VixDiskLibProgressFunc progress,
                          void *data, Bool overWrite);
VixError VixDiskLib_Attach(VixDiskLibHandle parent, VixDiskLibHandle child);
VixError VixDiskLib_IsAttachPossible(VixDiskLibHandle parent, VixDiskLibHandle child);
VixError VixDiskLib_SpaceNeededForClone(VixDiskLibHandle handle, VixDiskLibDiskType diskType,
                                        uint64_t *spaceNeeded);
VixError VixDiskLib_CheckRepair(const VixDiskLibConnection connection, const char *path, Bool repair);

#ifdef __cplusplus
}
#endif

#endif
