/* Clone: a disk, of this machine or of a server, as a new disk of this machine. */
#include <stdlib.h>
#include <stdio.h>
#include <string.h>

#include "library.h"

#define PIECE 2048u /* sectors copied at once */

struct copying {
    handle_t *source;
    struct vmdk *target;
    VixDiskLibProgressFunc progress;
    void *data;
};

static bool is_zero(const uint8_t *bytes, size_t size)
{
    return bytes[0] == 0 && !memcmp(bytes, bytes + 1, size - 1);
}

static VixError copy_all(const struct copying *copying)
{
    uint64_t capacity = copying->source->facts.capacity;
    uint8_t *buffer = malloc(PIECE * SECTOR);
    VixError error = buffer ? VIX_OK : VIX_E_OUT_OF_MEMORY;
    for (uint64_t at = 0; at < capacity && !error; at += PIECE) {
        uint64_t count = capacity - at < PIECE ? capacity - at : PIECE;
        /* The source handle is the library's own: no fault is meant for it. */
        error = transfer_and_wait(NULL, copying->source, WIRE_READ, at, count, buffer);
        if (!error && !is_zero(buffer, count * SECTOR))
            error = (VixError)vmdk_write(copying->target, at, count, buffer);
        if (copying->progress)
            copying->progress(copying->data, (int)((at + count) * 100 / capacity));
    }
    free(buffer);
    return error ? error : (VixError)vmdk_flush(copying->target);
}

static VixError clone_disk(struct VixDiskLibConnectionStruct *source_connection, const char *source_path,
                      const char *target_path, const VixDiskLibCreateParams *params, bool overwrite,
                      struct copying *copying)
{
    char why[VMDK_WHY] = "";
    struct vmdk_create create = {params->diskType, params->adapterType, params->hwVersion, 0};
    VixError error = open_disk(source_connection, source_path, VIXDISKLIB_FLAG_OPEN_READ_ONLY,
                               &copying->source);
    if (error)
        return error;
    create.capacity = copying->source->facts.capacity;
    if (overwrite)
        vmdk_unlink(target_path, why);
    error = (VixError)vmdk_create(target_path, &create, NULL, NULL, why);
    if (!error) {
        error = (VixError)vmdk_open(target_path, VMDK_WRITABLE, &copying->target, why);
        error = error ? error : copy_all(copying);
        vmdk_close(copying->target);
        if (error)
            vmdk_unlink(target_path, why);
    }
    wait_until_idle(copying->source);
    close_disk(copying->source);
    if (error)
        say(SAY_ERROR, "VixDiskLib_Clone: %s: error %d: %s", target_path, (int)error, why);
    return error;
}

VIX_EXPORT VixError VixDiskLib_Clone(const VixDiskLibConnection targetConnection, const char *targetPath,
                                     const VixDiskLibConnection sourceConnection, const char *sourcePath,
                                     const VixDiskLibCreateParams *params,
                                     VixDiskLibProgressFunc progress, void *data, Bool overWrite)
{
    struct call call;
    struct copying copying = {.progress = progress, .data = data};
    struct subject subject = {.path = sourcePath};
    VixError error = call_begin(&call, "Clone", &subject);
    if (!error && !(error = session_thread_only(&call)) &&
        !(error = required(&call, targetConnection, "the target connection")) &&
        !(error = required(&call, sourceConnection, "the source connection")) &&
        !(error = required(&call, targetPath, "the target path")) &&
        !(error = required(&call, sourcePath, "the source path")) &&
        !(error = required(&call, params, "params")))
        error = targetConnection->local ? clone_disk(sourceConnection, sourcePath, targetPath,
                                                     params, overWrite != 0, &copying)
                                        : VIX_E_NOT_SUPPORTED_ON_REMOTE_OBJECT;
    return call_end(&call, error);
}
