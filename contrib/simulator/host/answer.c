/* The answer to WIRE_OPEN: what there is to know of a disk, and its descriptors or its map. */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "../include/vixDiskLib.h"
#include "memory.h"
#include "opening.h"

const char *answer_device(const struct session *session, unsigned file)
{
    if (session->attachment != NULL && file < session->attachment->device_count)
        return session->attachment->devices[file];
    if (file < session->device_count)
        return device_path(session->devices[file]);
    return vmdk_file_path(session->disk, file);
}

static void put_facts(struct wire_body *body, const struct session *session)
{
    const struct vmdk *disk = session->disk;
    VixDiskLibGeometry geometry = vmdk_geometry(disk);
    const char *key;
    uint64_t keys = 0;
    wire_put_u64(body, vmdk_capacity(disk));
    wire_put_u64(body, (uint64_t)vmdk_adapter(disk));
    wire_put_u64(body, vmdk_links(disk));
    wire_put_u64(body, geometry.cylinders);
    wire_put_u64(body, geometry.heads);
    wire_put_u64(body, geometry.sectors);
    wire_put_str(body, vmdk_metadata(disk, "ddb.uuid"));
    wire_put_str(body, vmdk_parent_hint(disk));
    wire_put_u64(body, VIXDISKLIB_SECTOR_SIZE);
    wire_put_u64(body, VIXDISKLIB_SECTOR_SIZE);
    wire_put_str(body, session->host->name);
    wire_put_u64(body, session->local);
    wire_put_u64(body, vmdk_parent_hint(disk) != NULL);
    while (vmdk_metadata_key(disk, (unsigned)keys) != NULL)
        keys++;
    wire_put_u64(body, keys);
    for (unsigned i = 0; i < keys && (key = vmdk_metadata_key(disk, i)) != NULL; i++) {
        wire_put_str(body, key);
        wire_put_str(body, vmdk_metadata(disk, key));
    }
    wire_put_u64(body, vmdk_files(disk));
    for (unsigned i = 0; i < vmdk_files(disk); i++) {
        wire_put_str(body, answer_device(session, i));
        wire_put_u64(body, vmdk_file_is_flat(disk, i));
    }
}

/* New descriptors, for reading only: the host's own may write. Fewer than there are files with
 * errno. */
static unsigned open_again(const struct vmdk *disk, int *fds)
{
    char path[64];
    for (unsigned i = 0; i < vmdk_files(disk); i++) {
        snprintf(path, sizeof path, "/proc/self/fd/%d", vmdk_fd(disk, i));
        fds[i] = open(path, O_RDONLY | O_CLOEXEC);
        if (fds[i] < 0)
            return i;
    }
    return vmdk_files(disk);
}

static int put_files(struct session *session, struct wire_body *body, int **fds, unsigned *count)
{
    uint64_t segments = 0;
    *fds = memory_zeroed(vmdk_files(session->disk) + 1, sizeof **fds);
    *count = 0;
    if (session_is_device(session)) {
        int error = map_disk(session, *fds, &segments);
        if (error != VIX_OK)
            return error;
        *count = 1;
    } else {
        *count = open_again(session->disk, *fds);
        if (*count < vmdk_files(session->disk))
            return VIX_E_FILE_ERROR;
    }
    wire_put_u64(body, segments);
    return body->failed ? VIX_E_OUT_OF_MEMORY : VIX_OK;
}

void answer_open(struct request *request)
{
    struct session *session = request->session;
    struct wire_body body = {0};
    int *fds;
    unsigned count;
    put_facts(&body, session);
    int error = put_files(session, &body, &fds, &count);
    if (error == VIX_OK) {
        peer_reply_with(&session->peer, &request->head, &body, fds, count);
        request_end(request);
    } else {
        for (unsigned i = 0; i < count; i++)
            close(fds[i]);
        request_refuse(request, (uint32_t)error, "the disk cannot be handed over");
        session_release(session, END_REFUSED);
    }
    free(fds);
    wire_body_free(&body);
}
