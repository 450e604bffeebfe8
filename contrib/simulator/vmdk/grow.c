/* Making a base larger. */
#include "internal.h"

#include <errno.h>
#include <fcntl.h>
#include <endian.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <unistd.h>

/* A directory and its new tables at the end of the file; the old tables stay where they are. */
static int extend_directory(int fd, const struct sparse_header *old, const struct sparse_header *new,
                            uint64_t from, uint64_t to) {
    uint64_t had = sparse_table_count(old), tables = sparse_table_count(new);
    uint64_t step = sparse_table_bytes(new) / SECTOR;
    uint64_t first = to + divide_up(tables * 4, SECTOR);
    if (first + (tables - had) * step > UINT32_MAX)
        return VIX_E_DISK_FULL;
    uint32_t *entries = calloc(tables, sizeof *entries);
    if (entries == NULL)
        return VIX_E_OUT_OF_MEMORY;
    int code = read_at(fd, entries, had * sizeof *entries, from * SECTOR);
    for (uint64_t i = had; i < tables; i++)
        entries[i] = htole32((uint32_t)(first + (i - had) * step));
    if (code == VIX_OK)
        code = write_at(fd, entries, tables * sizeof *entries, to * SECTOR);
    /* The new tables are zeros, and inside the file. */
    if (code == VIX_OK)
        code = write_at(fd, "", 1, (first + (tables - had) * step) * SECTOR - 1);
    free(entries);
    return code;
}

static int grow_sparse(int fd, const char *path, uint64_t sectors, char why[VMDK_WHY]) {
    struct sparse *sparse;
    int code = sparse_open(fd, path, &sparse, why);
    if (code != VIX_OK)
        return code;
    const struct sparse_header *old = &sparse->header;
    struct sparse_header new = *old;
    new.capacity = sectors > old->capacity ? sectors : old->capacity;
    if (sparse_table_count(&new) > sparse->tables) {
        code = sparse_append_position(sparse, fd, &new.directory);
        if (code == VIX_OK)
            code = extend_directory(fd, old, &new, old->directory, new.directory);
        if (code == VIX_OK && (old->flags & SPARSE_REDUNDANT)) {
            code = sparse_append_position(sparse, fd, &new.redundant);
            if (code == VIX_OK)
                code = extend_directory(fd, old, &new, old->redundant, new.redundant);
        }
    }
    /* The header leads to all of it at once. */
    if (code == VIX_OK)
        code = sparse_header_write(fd, &new);
    sparse_free(sparse);
    return code;
}

static int grow_flat(int fd, const struct stat *status, const struct descriptor_extent *extent,
                     uint64_t sectors, bool preallocate) {
    uint64_t end = (extent->offset + extent->sectors) * SECTOR;
    uint64_t new_end = (extent->offset + sectors) * SECTOR;
    if ((uint64_t)status->st_size != end)
        return VIX_E_NOT_SUPPORTED; /* what follows in the file is not this extent's */
    int number = preallocate ? posix_fallocate(fd, (off_t)end, (off_t)(new_end - end)) : 0;
    if (number == 0 && ftruncate(fd, (off_t)new_end) != 0)
        number = errno;
    return number == 0 ? VIX_OK : code_of_errno(number);
}

static int grow_extent(const char *path, struct descriptor *descriptor, size_t index, uint64_t sectors,
                       char why[VMDK_WHY]) {
    struct descriptor_extent extent = descriptor->extents[index];
    if (extent.name != NULL) {
        char *file = descriptor->embedded ? strdup(path) : path_beside(path, extent.name);
        struct stat status;
        int fd;
        if (file == NULL)
            return VIX_E_OUT_OF_MEMORY;
        int code = open_regular(file, O_RDWR, &fd, &status, why);
        if (code == VIX_OK) {
            code = strcasecmp(extent.kind, "SPARSE") == 0
                       ? grow_sparse(fd, file, sectors, why)
                       : grow_flat(fd, &status, &extent, sectors, !descriptor_is_thin(descriptor));
            close(fd);
            if (code != VIX_OK)
                fail(why, code, "cannot grow %.200s", file);
        }
        free(file);
        if (code != VIX_OK)
            return code;
    }
    extent.sectors = sectors;
    return descriptor_set_extent(descriptor, index, &extent);
}

static int append_extent(const char *path, struct descriptor *descriptor, const struct form *form,
                         uint64_t sectors, char why[VMDK_WHY]) {
    struct descriptor_extent extent = {.writable = true, .sectors = sectors};
    snprintf(extent.kind, sizeof extent.kind, "%s", form->kind);
    extent.name = extent_name(path, form, (unsigned)descriptor->extent_count + 1);
    char *file = extent.name == NULL ? NULL : path_beside(path, extent.name);
    int code = file == NULL ? VIX_E_OUT_OF_MEMORY : create_extent_file(file, form, sectors, why);
    if (code == VIX_OK)
        code = descriptor_set_extent(descriptor, descriptor->extent_count, &extent);
    free(file);
    free(extent.name);
    return code;
}

static int set_geometry(struct descriptor *descriptor, VixDiskLibGeometry geometry) {
    const struct {
        const char *key;
        uint32_t value;
    } fields[] = {{"ddb.geometry.cylinders", geometry.cylinders},
                  {"ddb.geometry.heads", geometry.heads},
                  {"ddb.geometry.sectors", geometry.sectors}};
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++) {
        char text[16];
        snprintf(text, sizeof text, "%u", fields[i].value);
        int code = descriptor_set(descriptor, fields[i].key, text);
        if (code != VIX_OK)
            return code;
    }
    return VIX_OK;
}

struct growth {
    uint64_t from, to; /* sectors of the disk */
    const struct form *form;
    vmdk_progress progress;
    void *data;
};

/* The last extent as far as it may become, then new ones. */
static int grow_extents(const char *path, struct descriptor *descriptor, const struct growth *growth,
                        char why[VMDK_WHY]) {
    size_t last = descriptor->extent_count - 1;
    uint64_t left = growth->to - growth->from, sectors = descriptor->extents[last].sectors;
    bool split = growth->form != NULL && growth->form->split;
    uint64_t more = !split ? left : sectors >= SPLIT_SECTORS ? 0 : smaller(left, SPLIT_SECTORS - sectors);
    int code = more == 0 ? VIX_OK : grow_extent(path, descriptor, last, sectors + more, why);
    for (left -= more; code == VIX_OK && left > 0; left -= more) {
        show_progress(growth->progress, growth->data, growth->to - growth->from - left,
                      growth->to - growth->from);
        more = smaller(left, SPLIT_SECTORS);
        code = append_extent(path, descriptor, growth->form, more, why);
    }
    return code;
}

static int grow_disk(struct vmdk *disk, const struct growth *growth, bool geometry, char why[VMDK_WHY]) {
    const char *path = leaf_of(disk)->path;
    struct descriptor descriptor;
    int code = descriptor_read(path, &descriptor, NULL, why);
    if (code != VIX_OK)
        return code;
    code = grow_extents(path, &descriptor, growth, why);
    if (code == VIX_OK && geometry)
        code = set_geometry(&descriptor,
                            geometry_of(growth->to, (VixDiskLibAdapterType)vmdk_adapter(disk)));
    if (code == VIX_OK)
        code = descriptor_write(path, &descriptor, why);
    descriptor_free(&descriptor);
    return code;
}

int vmdk_grow(const char *path, uint64_t capacity, bool geometry, vmdk_progress progress, void *data,
              char why[VMDK_WHY]) {
    struct vmdk *disk;
    int code = vmdk_open(path, VMDK_SINGLE_LINK | VMDK_WRITABLE, &disk, why);
    if (code != VIX_OK)
        return code;
    struct growth growth = {vmdk_capacity(disk), capacity, form_of(vmdk_type(disk)), progress, data};
    if (!is_root_link(&leaf_of(disk)->descriptor))
        code = fail(why, VIX_E_DISK_PARENT_NOTALLOWED, "%.200s has a parent", path);
    else if (capacity <= growth.from)
        code = fail(why, VIX_E_DISK_CAPACITY_MISMATCH, "%.160s has %llu sectors already", path,
                    (unsigned long long)growth.from);
    else if (capacity > MAX_CAPACITY)
        code = fail(why, VIX_E_INVALID_ARG, "a capacity of %llu sectors", (unsigned long long)capacity);
    else {
        show_progress(progress, data, 0, 1);
        code = grow_disk(disk, &growth, geometry, why);
        if (code == VIX_OK)
            show_progress(progress, data, 1, 1);
    }
    vmdk_close(disk);
    return code;
}
