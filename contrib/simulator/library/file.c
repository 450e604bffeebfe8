/* The transport `file`: VMDKs of this machine, without any server. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "library.h"

/* One writer at a time, also of other processes: whoever has bound the socket that bears the disk's
 * name. It goes with its process. The file itself cannot bear the lock: a descriptor that changes is
 * a new file. */
static VixError lock_for_writing(handle_t *handle)
{
    struct sockaddr_un name = {.sun_family = AF_UNIX};
    char *path = realpath(handle->path, NULL);
    uint64_t hash = 0xcbf29ce484222325;
    int length;
    if (!path)
        return errno == ENOENT ? VIX_E_FILE_NOT_FOUND : VIX_E_FILE_ACCESS_ERROR;
    for (const char *at = path; *at; at++)
        hash = (hash ^ (unsigned char)*at) * 0x100000001b3;
    free(path);
    /* An abstract name: the first byte is 0. */
    length = snprintf(name.sun_path + 1, sizeof name.sun_path - 1, "vixsim-writer-%016llx",
                      (unsigned long long)hash);
    handle->disk_lock = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (handle->disk_lock < 0)
        return VIX_E_OUT_OF_MEMORY;
    if (bind(handle->disk_lock, (struct sockaddr *)&name,
             (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + (size_t)length)) < 0)
        return VIX_E_FILE_ALREADY_LOCKED;
    return VIX_OK;
}

static void file_close(handle_t *handle)
{
    vmdk_close(handle->disk);
    handle->disk = NULL;
    if (handle->disk_lock >= 0)
        close(handle->disk_lock);
    handle->disk_lock = -1;
}

VixError file_open(handle_t *handle)
{
    char why[VMDK_WHY] = "";
    bool writable = !(handle->flags & VIXDISKLIB_FLAG_OPEN_READ_ONLY);
    int flags = (writable ? VMDK_WRITABLE : 0) |
                (handle->flags & VIXDISKLIB_FLAG_OPEN_SINGLE_LINK ? VMDK_SINGLE_LINK : 0);
    VixError error = writable ? lock_for_writing(handle) : VIX_OK;
    handle->transport = &transport_file;
    if (!error)
        error = (VixError)vmdk_open(handle->path, flags, &handle->disk, why);
    if (!error)
        error = facts_of_file(&handle->facts, handle->disk);
    if (error) {
        say(SAY_ERROR, "DISKLIB-LINK: failed to open %s: %s", handle->path, why);
        file_close(handle);
        facts_clear(&handle->facts);
    }
    return error;
}

/* Everything is done before this returns, and the callback has run. */
static void file_submit(struct request *request)
{
    struct vmdk *disk = request->handle->disk;
    int error = request->op == WIRE_WRITE
                    ? vmdk_write(disk, request->start, request->count, request->buffer)
                    : vmdk_read(disk, request->start, request->count, request->buffer);
    complete(request, (VixError)error);
}

static VixError file_flush(handle_t *handle)
{
    return (VixError)vmdk_flush(handle->disk);
}

static VixError file_query(handle_t *handle, uint64_t start, uint64_t count, uint64_t chunk,
                           struct vmdk_range **ranges, size_t *used)
{
    size_t room = count / chunk / 2 + 2;
    VixError error;
    *ranges = calloc(room, sizeof **ranges);
    if (!*ranges)
        return VIX_E_OUT_OF_MEMORY;
    error = (VixError)vmdk_allocated(handle->disk, start, count, chunk, *ranges, room, used);
    if (error) {
        free(*ranges);
        *ranges = NULL;
    }
    return error;
}

static VixError file_set_metadata(handle_t *handle, const char *key, const char *value)
{
    char why[VMDK_WHY] = "";
    int error = vmdk_set_metadata(handle->disk, key, value, why);
    if (error)
        say(SAY_ERROR, "DISKLIB-DDB: cannot set %s: %s", key, why);
    return (VixError)error;
}

const struct transport transport_file = {"file", file_submit, file_flush, file_query,
                                         file_set_metadata, file_close};
