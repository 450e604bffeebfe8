/* Disks as files: create, clone, grow and the like. All of it is for disks of this machine; for those
 * of a server the server's own interface is to be used, as with the real library. */
#include <stdlib.h>
#include <stdio.h>
#include <string.h>

#include "library.h"

struct progress {
    VixDiskLibProgressFunc call;
    void *data;
};

static void report(void *data, int percent)
{
    const struct progress *progress = data;
    if (progress->call)
        progress->call(progress->data, percent);
}

static VixError told(const char *name, const char *path, int error, const char *why)
{
    if (error)
        say(SAY_ERROR, "VixDiskLib_%s: %s: %s (error %d)", name, path, why, error);
    return (VixError)error;
}

static VixError local_only(const struct call *call,
                           const struct VixDiskLibConnectionStruct *connection)
{
    VixError error = required(call, connection, "the connection");
    if (error)
        return error;
    return connection->local ? VIX_OK : VIX_E_NOT_SUPPORTED_ON_REMOTE_OBJECT;
}

static struct vmdk_create wishes(const VixDiskLibCreateParams *params)
{
    return (struct vmdk_create){params->diskType, params->adapterType, params->hwVersion,
                                params->capacity};
}

VIX_EXPORT VixError VixDiskLib_Create(const VixDiskLibConnection connection, const char *path,
                                      const VixDiskLibCreateParams *params,
                                      VixDiskLibProgressFunc progress, void *data)
{
    struct call call;
    char why[VMDK_WHY] = "";
    struct progress reporter = {progress, data};
    struct subject subject = {.path = path};
    VixError error = call_begin(&call, "Create", &subject);
    if (!error && !(error = local_only(&call, connection)) &&
        !(error = required(&call, path, "the path")) && !(error = required(&call, params, "params"))) {
        struct vmdk_create create = wishes(params);
        error = told("Create", path, vmdk_create(path, &create, report, &reporter, why), why);
    }
    return call_end(&call, error);
}

VIX_EXPORT VixError VixDiskLib_CreateChild(VixDiskLibHandle handle, const char *childPath,
                                           VixDiskLibDiskType diskType, VixDiskLibProgressFunc progress,
                                           void *data)
{
    struct call call;
    char why[VMDK_WHY] = "";
    struct progress reporter = {progress, data};
    VixError error = handle_begin(&call, "CreateChild", handle, 0, 0);
    if (!error && !(error = local_only(&call, handle->connection)) &&
        !(error = required(&call, childPath, "the path")))
        error = told("CreateChild", childPath,
                     vmdk_create_child(handle->disk, childPath, diskType, report, &reporter, why), why);
    return handle_end(&call, error);
}

VIX_EXPORT VixError VixDiskLib_Unlink(VixDiskLibConnection connection, const char *path)
{
    struct call call;
    char why[VMDK_WHY] = "";
    struct subject subject = {.path = path};
    VixError error = call_begin(&call, "Unlink", &subject);
    if (!error && !(error = local_only(&call, connection)) &&
        !(error = required(&call, path, "the path")))
        error = told("Unlink", path, vmdk_unlink(path, why), why);
    return call_end(&call, error);
}

VIX_EXPORT VixError VixDiskLib_Grow(VixDiskLibConnection connection, const char *path,
                                    VixDiskLibSectorType capacity, Bool updateGeometry,
                                    VixDiskLibProgressFunc progress, void *data)
{
    struct call call;
    char why[VMDK_WHY] = "";
    struct progress reporter = {progress, data};
    struct subject subject = {.path = path};
    VixError error = call_begin(&call, "Grow", &subject);
    if (!error && !(error = local_only(&call, connection)) &&
        !(error = required(&call, path, "the path")))
        error = told("Grow", path,
                     vmdk_grow(path, capacity, updateGeometry != 0, report, &reporter, why), why);
    return call_end(&call, error);
}

typedef int (*disk_work)(struct vmdk *disk, vmdk_progress progress, void *data, char why[VMDK_WHY]);

static VixError work_on_disk(const char *name, handle_t *handle, disk_work work,
                             VixDiskLibProgressFunc progress, void *data)
{
    struct call call;
    char why[VMDK_WHY] = "";
    struct progress reporter = {progress, data};
    VixError error = handle_begin(&call, name, handle, 0, 0);
    if (!error && !(error = local_only(&call, handle->connection))) {
        if (handle->flags & VIXDISKLIB_FLAG_OPEN_READ_ONLY)
            error = VIX_E_FILE_READ_ONLY;
        else
            error = told(name, handle->path, work(handle->disk, report, &reporter, why), why);
    }
    return handle_end(&call, error);
}

VIX_EXPORT VixError VixDiskLib_Shrink(VixDiskLibHandle handle, VixDiskLibProgressFunc progress,
                                      void *data)
{
    return work_on_disk("Shrink", handle, vmdk_shrink, progress, data);
}

VIX_EXPORT VixError VixDiskLib_Defragment(VixDiskLibHandle handle, VixDiskLibProgressFunc progress,
                                          void *data)
{
    return work_on_disk("Defragment", handle, vmdk_defragment, progress, data);
}

VIX_EXPORT VixError VixDiskLib_Rename(const char *sourcePath, const char *targetPath)
{
    struct call call;
    char why[VMDK_WHY] = "";
    struct subject subject = {.path = sourcePath};
    VixError error = call_begin(&call, "Rename", &subject);
    if (!error && !(error = required(&call, sourcePath, "the source path")) &&
        !(error = required(&call, targetPath, "the target path")))
        error = told("Rename", sourcePath, vmdk_rename(sourcePath, targetPath, why), why);
    return call_end(&call, error);
}

VIX_EXPORT VixError VixDiskLib_CheckRepair(const VixDiskLibConnection connection, const char *path,
                                           Bool repair)
{
    struct call call;
    char why[VMDK_WHY] = "";
    struct subject subject = {.path = path};
    VixError error = call_begin(&call, "CheckRepair", &subject);
    if (!error && !(error = local_only(&call, connection)) &&
        !(error = required(&call, path, "the path")))
        error = told("CheckRepair", path, vmdk_check(path, repair != 0, why), why);
    return call_end(&call, error);
}

VIX_EXPORT VixError VixDiskLib_SpaceNeededForClone(VixDiskLibHandle handle, VixDiskLibDiskType diskType,
                                                   uint64_t *spaceNeeded)
{
    struct call call;
    VixError error = handle_begin(&call, "SpaceNeededForClone", handle, 0, 0);
    if (!error && !(error = required(&call, spaceNeeded, "spaceNeeded")))
        *spaceNeeded = handle->disk ? vmdk_space_needed(handle->disk, diskType)
                                    : handle->facts.capacity * SECTOR;
    return handle_end(&call, error);
}

/* ---- attaching one chain to another ---- */

typedef VixError (*pair_work)(handle_t *parent, handle_t *child, char why[VMDK_WHY]);

static VixError work_on_pair(const char *name, handle_t *parent, handle_t *child, pair_work work)
{
    struct call call, child_call;
    char why[VMDK_WHY] = "";
    VixError error = handle_begin(&call, name, parent, 0, 0);
    VixError child_error = VIX_OK;
    if (!error && parent != child) {
        child_error = handle_begin(&child_call, name, child, 0, 0);
        if (!child_error && !(child_error = local_only(&call, parent->connection)) &&
            !(child_error = local_only(&call, child->connection)))
            child_error = told(name, child->path, (int)work(parent, child, why), why);
        handle_end(&child_call, child_error);
    } else if (!error) {
        error = VIX_E_INVALID_ARG;
    }
    return handle_end(&call, error ? error : child_error);
}

static VixError attach_possible(handle_t *parent, handle_t *child, char why[VMDK_WHY])
{
    return (VixError)vmdk_attach_possible(parent->disk, child->disk, why);
}

static VixError attach(handle_t *parent, handle_t *child, char why[VMDK_WHY])
{
    VixError error = (VixError)vmdk_attach(parent->disk, child->disk, why);
    if (!error) {
        facts_clear(&child->facts);
        error = facts_of_file(&child->facts, child->disk);
    }
    return error;
}

VIX_EXPORT VixError VixDiskLib_IsAttachPossible(VixDiskLibHandle parent, VixDiskLibHandle child)
{
    return work_on_pair("IsAttachPossible", parent, child, attach_possible);
}

VIX_EXPORT VixError VixDiskLib_Attach(VixDiskLibHandle parent, VixDiskLibHandle child)
{
    return work_on_pair("Attach", parent, child, attach);
}
