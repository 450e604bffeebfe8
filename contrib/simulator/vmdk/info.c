/* What a disk says about itself: fields, the disk database, and what is allocated. */
#include "internal.h"

#include <ctype.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <unistd.h>

uint64_t vmdk_capacity(const struct vmdk *disk) { return leaf_of(disk)->capacity; }

unsigned vmdk_links(const struct vmdk *disk) { return disk->count; }

/* Of the leaf, or of the first link below that has it: deltas need not repeat it. */
static const char *inherited(const struct vmdk *disk, const char *key) {
    const char *value = NULL;
    for (unsigned i = 0; i < disk->count && value == NULL; i++)
        value = descriptor_value(&disk->links[i].descriptor, key);
    return value;
}

int vmdk_adapter(const struct vmdk *disk) {
    const char *name = inherited(disk, "ddb.adapterType");
    if (name == NULL)
        return VIXDISKLIB_ADAPTER_UNKNOWN;
    if (strcasecmp(name, "ide") == 0)
        return VIXDISKLIB_ADAPTER_IDE;
    if (strcasecmp(name, "buslogic") == 0)
        return VIXDISKLIB_ADAPTER_SCSI_BUSLOGIC;
    if (strcasecmp(name, "lsilogic") == 0)
        return VIXDISKLIB_ADAPTER_SCSI_LSILOGIC;
    return VIXDISKLIB_ADAPTER_UNKNOWN;
}

VixDiskLibGeometry geometry_of(uint64_t capacity, VixDiskLibAdapterType adapter) {
    VixDiskLibGeometry geometry = {0, 255, 63};
    if (adapter == VIXDISKLIB_ADAPTER_IDE)
        geometry.heads = 16;
    else if (capacity < 2097152) { /* 1 GiB */
        geometry.heads = 64;
        geometry.sectors = 32;
    } else if (capacity < 4194304) {
        geometry.heads = 128;
        geometry.sectors = 32;
    }
    uint64_t cylinders = capacity / ((uint64_t)geometry.heads * geometry.sectors);
    if (cylinders == 0)
        cylinders = 1;
    uint64_t most = adapter == VIXDISKLIB_ADAPTER_IDE ? 16383 : UINT32_MAX;
    geometry.cylinders = (uint32_t)smaller(cylinders, most);
    return geometry;
}

static bool number_field(const struct vmdk *disk, const char *key, uint32_t *number) {
    const char *value = inherited(disk, key);
    if (value == NULL || !isdigit((unsigned char)*value))
        return false;
    errno = 0;
    unsigned long parsed = strtoul(value, NULL, 10);
    *number = (uint32_t)parsed;
    return errno == 0 && parsed <= UINT32_MAX;
}

VixDiskLibGeometry vmdk_geometry(const struct vmdk *disk) {
    VixDiskLibGeometry geometry;
    if (number_field(disk, "ddb.geometry.cylinders", &geometry.cylinders) &&
        number_field(disk, "ddb.geometry.heads", &geometry.heads) &&
        number_field(disk, "ddb.geometry.sectors", &geometry.sectors))
        return geometry;
    return geometry_of(vmdk_capacity(disk), (VixDiskLibAdapterType)vmdk_adapter(disk));
}

VixDiskLibDiskType vmdk_type(const struct vmdk *disk) {
    static const struct {
        const char *name;
        VixDiskLibDiskType type;
    } types[] = {
        {"monolithicSparse", VIXDISKLIB_DISK_MONOLITHIC_SPARSE},
        {"monolithicFlat", VIXDISKLIB_DISK_MONOLITHIC_FLAT},
        {"twoGbMaxExtentSparse", VIXDISKLIB_DISK_SPLIT_SPARSE},
        {"twoGbMaxExtentFlat", VIXDISKLIB_DISK_SPLIT_FLAT},
        {"vmfs", VIXDISKLIB_DISK_VMFS_FLAT},
    };
    const struct descriptor *descriptor = &leaf_of(disk)->descriptor;
    const char *name = descriptor_value(descriptor, "createType");
    for (size_t i = 0; i < sizeof types / sizeof *types; i++)
        if (strcasecmp(name, types[i].name) == 0)
            return types[i].type == VIXDISKLIB_DISK_VMFS_FLAT && descriptor_is_thin(descriptor)
                       ? VIXDISKLIB_DISK_VMFS_THIN
                       : types[i].type;
    return VIXDISKLIB_DISK_UNKNOWN;
}

const char *vmdk_parent_hint(const struct vmdk *disk) {
    const struct descriptor *descriptor = &leaf_of(disk)->descriptor;
    return is_root_link(descriptor) ? NULL : descriptor_value(descriptor, "parentFileNameHint");
}

const char *vmdk_link_path(const struct vmdk *disk, unsigned link) {
    return link < disk->count ? link_at(disk, link)->path : NULL;
}

uint64_t vmdk_allocated_bytes(struct vmdk *disk, unsigned number) {
    if (number >= disk->count)
        return 0;
    const struct link *link = link_at(disk, number);
    struct stat status;
    uint64_t blocks = 0;
    if (!link->descriptor.embedded && stat(link->path, &status) == 0)
        blocks = (uint64_t)status.st_blocks;
    for (size_t i = 0; i < link->count; i++) {
        /* Flat extents may share a file. */
        bool counted = link->extents[i].kind == EXTENT_ZERO;
        for (size_t j = 0; j < i && !counted; j++)
            counted = link->extents[j].kind != EXTENT_ZERO &&
                      link->extents[j].file == link->extents[i].file;
        if (!counted && fstat(disk->files[link->extents[i].file].fd, &status) == 0)
            blocks += (uint64_t)status.st_blocks;
    }
    return blocks * 512; /* the unit of st_blocks, whatever a sector is */
}

unsigned vmdk_files(const struct vmdk *disk) { return disk->file_count; }

int vmdk_fd(const struct vmdk *disk, unsigned file) {
    return file < disk->file_count ? disk->files[file].fd : -1;
}

const char *vmdk_file_path(const struct vmdk *disk, unsigned file) {
    return file < disk->file_count ? disk->files[file].path : NULL;
}

bool vmdk_file_is_flat(const struct vmdk *disk, unsigned file) {
    return file < disk->file_count && disk->files[file].flat;
}

/* ---- the disk database ---- */

static bool is_database_key(const char *key) { return key != NULL && strncasecmp(key, "ddb.", 4) == 0; }

/* Names without "ddb." are those of the database, too. */
static int full_key(const char *key, char full[VMDK_WHY]) {
    static const char allowed[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-";
    size_t length = strlen(key);
    if (length == 0 || length + 5 > VMDK_WHY || strspn(key, allowed) != length)
        return VIX_E_INVALID_ARG;
    strcpy(full, is_database_key(key) ? "" : "ddb.");
    strcat(full, key);
    return VIX_OK;
}

const char *vmdk_metadata(const struct vmdk *disk, const char *key) {
    char full[VMDK_WHY];
    return full_key(key, full) == VIX_OK ? descriptor_value(&leaf_of(disk)->descriptor, full) : NULL;
}

const char *vmdk_metadata_key(const struct vmdk *disk, unsigned index) {
    const struct descriptor *descriptor = &leaf_of(disk)->descriptor;
    for (size_t i = 0; i < descriptor->count; i++)
        if (is_database_key(descriptor->lines[i].key) && index-- == 0)
            return descriptor->lines[i].key;
    return NULL;
}

/* Changes the descriptor as it is in the file now: another opener may have changed it, too. */
int leaf_update(struct vmdk *disk, int (*change)(struct descriptor *, const void *), const void *data,
                char why[VMDK_WHY]) {
    struct link *leaf = leaf_of(disk);
    struct descriptor fresh;
    int code = descriptor_read(leaf->path, &fresh, NULL, why);
    if (code != VIX_OK)
        return code;
    code = fresh.extent_count == leaf->descriptor.extent_count
               ? change(&fresh, data)
               : fail(why, VIX_E_FILE_ERROR, "%.160s was replaced by another disk", leaf->path);
    if (code == VIX_OK)
        code = descriptor_write(leaf->path, &fresh, why);
    if (code != VIX_OK) {
        descriptor_free(&fresh);
        return code;
    }
    descriptor_free(&leaf->descriptor);
    leaf->descriptor = fresh;
    return VIX_OK;
}

struct setting {
    const char *key, *value;
};

static int apply_setting(struct descriptor *descriptor, const void *data) {
    const struct setting *setting = data;
    return descriptor_set(descriptor, setting->key, setting->value);
}

int vmdk_set_metadata(struct vmdk *disk, const char *key, const char *value, char why[VMDK_WHY]) {
    char full[VMDK_WHY];
    if (!(disk->flags & VMDK_WRITABLE))
        return fail(why, VIX_E_FILE_READ_ONLY, "the disk is opened read-only");
    if (full_key(key, full) != VIX_OK)
        return fail(why, VIX_E_INVALID_ARG, "%.100s is no name of the disk database", key);
    for (const char *c = value; *c != 0; c++)
        if (*c == '"' || (unsigned char)*c < ' ')
            return fail(why, VIX_E_INVALID_ARG, "the value of %.100s cannot be written", key);
    return leaf_update(disk, apply_setting, &(struct setting){full, value}, why);
}

/* ---- what is allocated ---- */

struct ranges {
    struct vmdk_range *list;
    size_t max, used;
    uint64_t chunk, end;
};

/* Adds sectors [from, to), rounded out; they come in order. */
static int add_range(struct ranges *ranges, uint64_t from, uint64_t to) {
    from = from / ranges->chunk * ranges->chunk;
    to = smaller(divide_up(to, ranges->chunk) * ranges->chunk, ranges->end);
    struct vmdk_range *last = ranges->used > 0 ? &ranges->list[ranges->used - 1] : NULL;
    if (last != NULL && from <= last->start + last->count) {
        if (to > last->start + last->count)
            last->count = to - last->start;
        return VIX_OK;
    }
    if (ranges->used == ranges->max)
        return VIX_E_OUT_OF_MEMORY;
    ranges->list[ranges->used++] = (struct vmdk_range){from, to - from};
    return VIX_OK;
}

/* Adds what a flat file has allocated of the segment, which begins at `sector` of the disk. */
static int add_flat(struct ranges *ranges, int fd, uint64_t sector, const struct vmdk_segment *segment) {
    off_t at = (off_t)segment->offset, end = (off_t)(segment->offset + segment->length);
    while (at < end) {
        off_t data = lseek(fd, at, SEEK_DATA);
        if (data < 0 && errno == ENXIO)
            return VIX_OK;
        /* Where the file system cannot tell, all is data. */
        off_t hole = data < 0 ? end : lseek(fd, data, SEEK_HOLE);
        if (data < 0)
            data = at;
        if (data >= end)
            return VIX_OK;
        if (hole < 0 || hole > end)
            hole = end;
        uint64_t base = segment->offset;
        int code = add_range(ranges, sector + ((uint64_t)data - base) / SECTOR,
                             sector + divide_up((uint64_t)hole - base, SECTOR));
        if (code != VIX_OK)
            return code;
        at = hole;
    }
    return VIX_OK;
}

int vmdk_allocated(struct vmdk *disk, uint64_t start, uint64_t count, uint64_t chunk,
                   struct vmdk_range *list, size_t max, size_t *used) {
    struct vmdk_segment segments[256];
    struct ranges ranges = {list, max, 0, chunk == 0 ? 1 : chunk, start + count};
    *used = 0;
    while (count > 0) {
        size_t found;
        uint64_t covered, sector = start;
        int code = vmdk_resolve(disk, start, count, segments, 256, &found, &covered);
        for (size_t i = 0; code == VIX_OK && i < found; i++) {
            uint64_t length = segments[i].length / SECTOR;
            if (segments[i].file != VMDK_HOLE)
                code = disk->files[segments[i].file].flat
                           ? add_flat(&ranges, disk->files[segments[i].file].fd, sector, &segments[i])
                           : add_range(&ranges, sector, sector + length);
            sector += length;
        }
        if (code != VIX_OK)
            return code;
        start += covered;
        count -= covered;
    }
    *used = ranges.used;
    return VIX_OK;
}
