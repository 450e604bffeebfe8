/* GetInfo, the disk database, and what is allocated. */
#include <stdlib.h>
#include <stdio.h>
#include <string.h>

#include "library.h"

/* ---- GetInfo ---- */

static VixError fill_info(VixDiskLibInfo *info, const struct disk_facts *facts)
{
    info->biosGeo = facts->geometry;
    info->physGeo = facts->geometry;
    info->capacity = facts->capacity;
    info->adapterType = facts->adapter;
    info->numLinks = (int)facts->links;
#if VIX_RELEASE >= 70
    info->logicalSectorSize = facts->logical_sector;
    info->physicalSectorSize = facts->physical_sector;
#endif
    if ((facts->parent_hint && !(info->parentFileNameHint = strdup(facts->parent_hint))) ||
        (facts->uuid && !(info->uuid = strdup(facts->uuid))))
        return VIX_E_OUT_OF_MEMORY;
    return VIX_OK;
}

VIX_EXPORT void VixDiskLib_FreeInfo(VixDiskLibInfo *info)
{
    if (!info)
        return;
    free(info->parentFileNameHint);
    free(info->uuid);
    guarded_free(info);
}

VIX_EXPORT VixError VixDiskLib_GetInfo(VixDiskLibHandle handle, VixDiskLibInfo **info)
{
    struct call call;
    VixError error = handle_begin(&call, "GetInfo", handle, 0, 0);
    if (!error && !(error = required(&call, info, "info"))) {
        VixDiskLibInfo *filled = guarded_alloc(sizeof *filled, true);
        error = filled ? fill_info(filled, &handle->facts) : VIX_E_OUT_OF_MEMORY;
        if (error)
            VixDiskLib_FreeInfo(filled);
        else
            *info = filled;
    }
    return handle_end(&call, error);
}

/* ---- QueryAllocatedBlocks ---- */

#if VIX_RELEASE >= 67
/* The tail of a disk that is no multiple of the chunk cannot be asked for at all. */
static VixError check_query(const handle_t *handle, uint64_t start, uint64_t count, uint64_t chunk)
{
    uint64_t capacity = handle->facts.capacity;
    if (chunk < VIXDISKLIB_MIN_CHUNK_SIZE || chunk > VIXDISKLIB_MAX_CHUNK_SIZE ||
        (chunk & (chunk - 1)) || start % chunk || count % chunk || count == 0 ||
        count / chunk > VIXDISKLIB_MAX_CHUNK_NUMBER || start > capacity || count > capacity - start)
        return VIX_E_INVALID_ARG;
    return VIX_OK;
}

static VixError make_list(const struct vmdk_range *ranges, size_t used, VixDiskLibBlockList **list)
{
    *list = guarded_alloc(offsetof(VixDiskLibBlockList, blocks) + used * sizeof(VixDiskLibBlock), false);
    if (!*list)
        return VIX_E_OUT_OF_MEMORY;
    (*list)->numBlocks = (uint32_t)used;
    for (size_t i = 0; i < used; i++)
        (&(*list)->blocks[0])[i] = (VixDiskLibBlock){ranges[i].start, ranges[i].count};
    return VIX_OK;
}

VIX_EXPORT VixError VixDiskLib_QueryAllocatedBlocks(VixDiskLibHandle handle,
                                                    VixDiskLibSectorType startSector,
                                                    VixDiskLibSectorType numSectors,
                                                    VixDiskLibSectorType chunkSize,
                                                    VixDiskLibBlockList **blockList)
{
    struct call call;
    struct vmdk_range *ranges = NULL;
    size_t used = 0;
    VixError error = handle_begin(&call, "QueryAllocatedBlocks", handle, startSector, numSectors);
    if (!error && !(error = required(&call, blockList, "blockList")) &&
        !(error = check_query(handle, startSector, numSectors, chunkSize)) &&
        !(error = handle->transport->query(handle, startSector, numSectors, chunkSize, &ranges, &used)))
        error = make_list(ranges, used, blockList);
    free(ranges);
    return handle_end(&call, error);
}

VIX_EXPORT VixError VixDiskLib_FreeBlockList(VixDiskLibBlockList *blockList)
{
    if (blockList)
        guarded_free(blockList);
    return VIX_OK;
}
#endif

/* ---- the disk database ---- */

static struct metadata *find_metadata(const handle_t *handle, const char *key)
{
    for (unsigned i = 0; i < handle->facts.metadata_count; i++)
        if (!strcmp(handle->facts.metadata[i].key, key))
            return &handle->facts.metadata[i];
    return NULL;
}

VIX_EXPORT VixError VixDiskLib_ReadMetadata(VixDiskLibHandle handle, const char *key, char *buffer,
                                            size_t length, size_t *requiredLength)
{
    struct call call;
    VixError error = handle_begin(&call, "ReadMetadata", handle, 0, 0);
    if (!error && !(error = required(&call, key, "key"))) {
        const struct metadata *found = find_metadata(handle, key);
        size_t size = found ? strlen(found->value) + 1 : 0;
        if (requiredLength)
            *requiredLength = size;
        if (!found)
            error = VIX_E_DISK_KEY_NOTFOUND;
        else if (!buffer || length < size)
            error = VIX_E_BUFFER_TOOSMALL;
        else
            memcpy(buffer, found->value, size);
    }
    return handle_end(&call, error);
}

VIX_EXPORT VixError VixDiskLib_GetMetadataKeys(VixDiskLibHandle handle, char *keys, size_t maxLength,
                                               size_t *requiredLength)
{
    struct call call;
    VixError error = handle_begin(&call, "GetMetadataKeys", handle, 0, 0);
    if (!error) {
        size_t size = 1;
        for (unsigned i = 0; i < handle->facts.metadata_count; i++)
            size += strlen(handle->facts.metadata[i].key) + 1;
        if (requiredLength)
            *requiredLength = size;
        if (!keys || maxLength < size) {
            error = VIX_E_BUFFER_TOOSMALL;
        } else {
            for (unsigned i = 0; i < handle->facts.metadata_count; i++)
                keys = stpcpy(keys, handle->facts.metadata[i].key) + 1;
            *keys = 0;
        }
    }
    return handle_end(&call, error);
}

static VixError remember(handle_t *handle, const char *key, const char *value)
{
    struct metadata *found = find_metadata(handle, key), *more;
    char *own_value = strdup(value), *own_key = found ? NULL : strdup(key);
    if (!own_value || (!found && !own_key)) {
        free(own_value);
        free(own_key);
        return VIX_E_OUT_OF_MEMORY;
    }
    if (found) {
        free(found->value);
        found->value = own_value;
        return VIX_OK;
    }
    more = reallocarray(handle->facts.metadata, handle->facts.metadata_count + 1u, sizeof *more);
    if (!more) {
        free(own_value);
        free(own_key);
        return VIX_E_OUT_OF_MEMORY;
    }
    handle->facts.metadata = more;
    more[handle->facts.metadata_count++] = (struct metadata){own_key, own_value};
    return VIX_OK;
}

VIX_EXPORT VixError VixDiskLib_WriteMetadata(VixDiskLibHandle handle, const char *key,
                                             const char *value)
{
    struct call call;
    VixError error = handle_begin(&call, "WriteMetadata", handle, 0, 0);
    if (!error && !(error = required(&call, key, "key")) &&
        !(error = required(&call, value, "value"))) {
        if (handle->flags & VIXDISKLIB_FLAG_OPEN_READ_ONLY)
            error = VIX_E_FILE_READ_ONLY;
        else if (!(error = handle->transport->set_metadata(handle, key, value)))
            error = remember(handle, key, value);
    }
    return handle_end(&call, error);
}
