/* GetErrorText. The codes are the interface's, the words are ours. */
#include <stdlib.h>
#include <stdio.h>
#include <string.h>

#include "library.h"

static const struct {
    unsigned code;
    const char *text;
} texts[] = {
    {VIX_OK, "The operation was successful"},
    {VIX_E_FAIL, "Unknown error"},
    {VIX_E_OUT_OF_MEMORY, "Memory allocation failed. Out of memory"},
    {VIX_E_INVALID_ARG, "One of the parameters was invalid"},
    {VIX_E_FILE_NOT_FOUND, "A file was not found"},
    {VIX_E_OBJECT_IS_BUSY, "This function cannot be performed because the handle is executing another"},
    {VIX_E_NOT_SUPPORTED, "The operation is not supported"},
    {VIX_E_FILE_ERROR, "A file access error occurred on the host or guest operating system"},
    {VIX_E_DISK_FULL, "An error occurred while writing a file; the disk is full"},
    {VIX_E_FILE_READ_ONLY, "The virtual disk was opened for reading only"},
    {VIX_E_FILE_ALREADY_EXISTS, "A file with that name already exists"},
    {VIX_E_FILE_ACCESS_ERROR, "You do not have access rights to this file"},
    {VIX_E_FILE_ALREADY_LOCKED, "The file is already in use"},
    {VIX_E_NOT_SUPPORTED_ON_REMOTE_OBJECT, "The command is not supported for remote objects"},
    {VIX_E_BUFFER_TOOSMALL, "The buffer is too small"},
    {VIX_E_LICENSE, "The virtual machine cannot be used without a licence"},
    {VIX_E_AUTHENTICATION_FAIL, "The user name or the password is not right"},
    {VIX_E_HOST_CONNECTION_LOST, "The connection to the host was lost"},
    {VIX_E_INVALID_AUTHENTICATION_SESSION, "The authentication session is not valid"},
    {VIX_E_VM_NOT_FOUND, "The virtual machine cannot be found"},
    {VIX_E_SNAPSHOT_NOTFOUND, "The snapshot cannot be found"},
    {VIX_E_HOST_SERVER_NOT_FOUND, "The server name cannot be resolved"},
    {VIX_E_HOST_NETWORK_CONN_REFUSED, "The server refused the connection"},
    {VIX_E_HOST_TCP_SOCKET_ERROR, "There was an error in communication"},
    {VIX_E_HOST_TCP_CONN_LOST, "The connection was lost"},
    {VIX_E_HOST_SERVER_SHUTDOWN, "The server is shutting down or entering maintenance"},
    {VIX_E_HOST_SERVER_NOT_AVAILABLE, "The server is not available"},
    {VIX_E_DISK_NOINIT, "The library is not initialised"},
    {VIX_E_DISK_NOIO, "There was no I/O access to the disk"},
    {VIX_E_DISK_PARTIALCHAIN, "The disk chain is not complete"},
    {VIX_E_DISK_NEEDSREPAIR, "The disk needs repair"},
    {VIX_E_DISK_OUTOFRANGE, "The request lies outside of the disk"},
    {VIX_E_DISK_CID_MISMATCH, "The content ID of the parent does not match"},
    {VIX_E_DISK_UNSUPPORTEDDISKVERSION, "The version of the disk is not supported"},
    {VIX_E_DISK_NOTSUPPORTED, "The disk does not support this operation"},
    {VIX_E_DISK_KEY_NOTFOUND, "The key is not in the disk database"},
    {VIX_E_DISK_SUBSYSTEM_INIT_FAIL, "The library could not be initialised"},
    {VIX_E_DISK_INVALIDDISK, "The disk is not valid"},
    {VIX_E_DISK_NOLICENSE, "There is no licence for this transport"},
    {VIX_E_DISK_NODEVICE, "The device of the disk was not found"},
    {VIX_E_CANNOT_CONNECT_TO_HOST, "Cannot connect to the host"},
    {VIX_ASYNC, "The operation goes on asynchronously"},
    {VIX_E_ASYNC_MIXEDMODE_UNSUPPORTED, "Synchronous and asynchronous I/O cannot be mixed"},
};

VIX_EXPORT char *VixDiskLib_GetErrorText(VixError error, const char *locale)
{
    unsigned code = (unsigned)VIX_ERROR_CODE(error);
    char text[64];
    (void)locale; /* one language is spoken here */
    for (unsigned i = 0; i < sizeof texts / sizeof *texts; i++)
        if (texts[i].code == code)
            return strdup(texts[i].text);
    snprintf(text, sizeof text, "Unknown error %u (0x%x)", code, code);
    return strdup(text);
}

VIX_EXPORT void VixDiskLib_FreeErrorText(char *text)
{
    free(text);
}
