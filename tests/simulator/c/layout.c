/* Prints where the fields of the interface's structures lie, and its constants. */
#include <stdio.h>

#include "vixDiskLib.h"

#define SIZE(type) printf("%s %zu\n", #type, sizeof(type))
#define FIELD(type, field) printf("%s.%s %zu\n", #type, #field, offsetof(type, field))
#define VALUE(name) printf("%s %lld\n", #name, (long long)(name))

static void connect_params(void)
{
    SIZE(VixDiskLibConnectParams);
    FIELD(VixDiskLibConnectParams, vmxSpec);
    FIELD(VixDiskLibConnectParams, serverName);
    FIELD(VixDiskLibConnectParams, thumbPrint);
    FIELD(VixDiskLibConnectParams, privateUse);
    FIELD(VixDiskLibConnectParams, credType);
    FIELD(VixDiskLibConnectParams, creds);
    FIELD(VixDiskLibConnectParams, creds.uid.userName);
    FIELD(VixDiskLibConnectParams, creds.uid.password);
    FIELD(VixDiskLibConnectParams, creds.sessionId.cookie);
    FIELD(VixDiskLibConnectParams, creds.sessionId.userName);
    FIELD(VixDiskLibConnectParams, creds.sessionId.key);
    FIELD(VixDiskLibConnectParams, creds.ticketId);
    FIELD(VixDiskLibConnectParams, port);
    FIELD(VixDiskLibConnectParams, nfcHostPort);
    FIELD(VixDiskLibConnectParams, vimApiVer);
    FIELD(VixDiskLibConnectParams, reserved);
    FIELD(VixDiskLibConnectParams, state);
#if VIX_RELEASE >= 67
    FIELD(VixDiskLibConnectParams, spec.vStorageObjSpec.id);
    FIELD(VixDiskLibConnectParams, spec.vStorageObjSpec.datastoreMoRef);
    FIELD(VixDiskLibConnectParams, spec.vStorageObjSpec.ssId);
    FIELD(VixDiskLibConnectParams, specType);
#endif
}

static void others(void)
{
    SIZE(VixDiskLibInfo);
    FIELD(VixDiskLibInfo, biosGeo);
    FIELD(VixDiskLibInfo, biosGeo.heads);
    FIELD(VixDiskLibInfo, biosGeo.sectors);
    FIELD(VixDiskLibInfo, physGeo);
    FIELD(VixDiskLibInfo, capacity);
    FIELD(VixDiskLibInfo, adapterType);
    FIELD(VixDiskLibInfo, numLinks);
    FIELD(VixDiskLibInfo, parentFileNameHint);
    FIELD(VixDiskLibInfo, uuid);
#if VIX_RELEASE >= 70
    FIELD(VixDiskLibInfo, logicalSectorSize);
    FIELD(VixDiskLibInfo, physicalSectorSize);
#endif
    FIELD(VixDiskLibBlockList, numBlocks);
    FIELD(VixDiskLibBlockList, blocks);
    SIZE(VixDiskLibBlock);
    FIELD(VixDiskLibBlock, offset);
    FIELD(VixDiskLibBlock, length);
    SIZE(VixDiskLibCreateParams);
    FIELD(VixDiskLibCreateParams, diskType);
    FIELD(VixDiskLibCreateParams, adapterType);
    FIELD(VixDiskLibCreateParams, hwVersion);
    FIELD(VixDiskLibCreateParams, capacity);
#if VIX_RELEASE >= 70
    FIELD(VixDiskLibCreateParams, logicalSectorSize);
    FIELD(VixDiskLibCreateParams, physicalSectorSize);
#endif
    SIZE(Bool);
    SIZE(VixError);
    SIZE(VixDiskLibSectorType);
    SIZE(VixDiskLibDiskType);
}

static void flags_and_limits(void)
{
    VALUE(VIXDISKLIB_SECTOR_SIZE);
    VALUE(VIXDISKLIB_FLAG_OPEN_UNBUFFERED);
    VALUE(VIXDISKLIB_FLAG_OPEN_SINGLE_LINK);
    VALUE(VIXDISKLIB_FLAG_OPEN_READ_ONLY);
    VALUE(VIXDISKLIB_FLAG_OPEN_COMPRESSION_ZLIB);
    VALUE(VIXDISKLIB_FLAG_OPEN_COMPRESSION_FASTLZ);
    VALUE(VIXDISKLIB_FLAG_OPEN_COMPRESSION_SKIPZ);
    VALUE(VIXDISKLIB_MIN_CHUNK_SIZE);
    VALUE(VIXDISKLIB_MAX_CHUNK_NUMBER);
    VALUE(VIXDISKLIB_CRED_UID);
    VALUE(VIXDISKLIB_CRED_SESSIONID);
    VALUE(VIXDISKLIB_CRED_TICKETID);
    VALUE(VIXDISKLIB_CRED_SSPI);
    VALUE(VIXDISKLIB_CRED_UNKNOWN);
    VALUE(VIXDISKLIB_SPEC_VMX);
    VALUE(VIXDISKLIB_SPEC_VSTORAGE_OBJECT);
    VALUE(VIXDISKLIB_SPEC_UNKNOWN);
    VALUE(VIXDISKLIB_DISK_MONOLITHIC_SPARSE);
    VALUE(VIXDISKLIB_DISK_MONOLITHIC_FLAT);
    VALUE(VIXDISKLIB_DISK_SPLIT_SPARSE);
    VALUE(VIXDISKLIB_DISK_SPLIT_FLAT);
    VALUE(VIXDISKLIB_DISK_VMFS_FLAT);
    VALUE(VIXDISKLIB_DISK_STREAM_OPTIMIZED);
    VALUE(VIXDISKLIB_DISK_VMFS_THIN);
    VALUE(VIXDISKLIB_DISK_VMFS_SPARSE);
    VALUE(VIXDISKLIB_DISK_UNKNOWN);
    VALUE(VIXDISKLIB_ADAPTER_IDE);
    VALUE(VIXDISKLIB_ADAPTER_SCSI_BUSLOGIC);
    VALUE(VIXDISKLIB_ADAPTER_SCSI_LSILOGIC);
    VALUE(VIXDISKLIB_ADAPTER_UNKNOWN);
}

static void codes(void)
{
    VALUE(VIX_E_FAIL);
    VALUE(VIX_E_OUT_OF_MEMORY);
    VALUE(VIX_E_INVALID_ARG);
    VALUE(VIX_E_FILE_NOT_FOUND);
    VALUE(VIX_E_NOT_SUPPORTED);
    VALUE(VIX_E_FILE_ERROR);
    VALUE(VIX_E_DISK_FULL);
    VALUE(VIX_E_CANCELLED);
    VALUE(VIX_E_FILE_READ_ONLY);
    VALUE(VIX_E_FILE_ALREADY_EXISTS);
    VALUE(VIX_E_FILE_ACCESS_ERROR);
    VALUE(VIX_E_FILE_ALREADY_LOCKED);
    VALUE(VIX_E_NOT_SUPPORTED_ON_REMOTE_OBJECT);
    VALUE(VIX_E_FILE_NAME_INVALID);
    VALUE(VIX_E_BUFFER_TOOSMALL);
    VALUE(VIX_E_OBJECT_NOT_FOUND);
    VALUE(VIX_E_HOST_NOT_CONNECTED);
    VALUE(VIX_E_LICENSE);
    VALUE(VIX_E_AUTHENTICATION_FAIL);
    VALUE(VIX_E_HOST_CONNECTION_LOST);
    VALUE(VIX_E_INVALID_HANDLE);
    VALUE(VIX_E_INVALID_AUTHENTICATION_SESSION);
    VALUE(VIX_E_VM_NOT_FOUND);
    VALUE(VIX_E_SNAPSHOT_NOTFOUND);
    VALUE(VIX_E_HOST_SERVER_NOT_FOUND);
    VALUE(VIX_E_HOST_NETWORK_CONN_REFUSED);
    VALUE(VIX_E_HOST_TCP_SOCKET_ERROR);
    VALUE(VIX_E_HOST_TCP_CONN_LOST);
    VALUE(VIX_E_HOST_SERVER_SHUTDOWN);
    VALUE(VIX_E_HOST_SERVER_NOT_AVAILABLE);
    VALUE(VIX_E_DISK_INVAL);
    VALUE(VIX_E_DISK_NOINIT);
    VALUE(VIX_E_DISK_NOIO);
    VALUE(VIX_E_DISK_PARTIALCHAIN);
    VALUE(VIX_E_DISK_NEEDSREPAIR);
    VALUE(VIX_E_DISK_OUTOFRANGE);
    VALUE(VIX_E_DISK_CID_MISMATCH);
    VALUE(VIX_E_DISK_CANTSHRINK);
    VALUE(VIX_E_DISK_UNSUPPORTEDDISKVERSION);
    VALUE(VIX_E_DISK_OPENPARENT);
    VALUE(VIX_E_DISK_NOTSUPPORTED);
    VALUE(VIX_E_DISK_INVALIDCHAIN);
    VALUE(VIX_E_DISK_KEY_NOTFOUND);
    VALUE(VIX_E_DISK_SUBSYSTEM_INIT_FAIL);
    VALUE(VIX_E_DISK_INVALID_CONNECTION);
    VALUE(VIX_E_DISK_INVALIDDISK);
    VALUE(VIX_E_DISK_NOLICENSE);
    VALUE(VIX_E_DISK_NODEVICE);
    VALUE(VIX_E_DISK_CAPACITY_MISMATCH);
    VALUE(VIX_E_DISK_PARENT_NOTALLOWED);
    VALUE(VIX_E_DISK_ATTACH_ROOTLINK);
    VALUE(VIX_E_CANNOT_CONNECT_TO_HOST);
    VALUE(VIX_ASYNC);
    VALUE(VIX_E_ASYNC_MIXEDMODE_UNSUPPORTED);
}

int main(void)
{
    connect_params();
    others();
    flags_and_limits();
    codes();
    return 0;
}
