/* Opening a chain: the leaf, its extents, and what its parent hints lead to. */
#include "internal.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <unistd.h>

bool is_root_link(const struct descriptor *descriptor) { return descriptor->parent_cid == NO_PARENT; }

/* The number of the file, opened now unless an extent before had it already. */
static int add_file(struct vmdk *disk, uint32_t first, char *path, int flags, bool flat, uint32_t *number,
                    struct stat *status, char why[VMDK_WHY]) {
    for (uint32_t i = first; i < disk->file_count; i++)
        if (strcmp(disk->files[i].path, path) == 0) {
            if (flat != disk->files[i].flat || !flat)
                return fail(why, VIX_E_DISK_INVALIDDISK, "%.160s is in use by two extents", path);
            *number = i;
            return fstat(disk->files[i].fd, status) == 0 ? VIX_OK : fail_errno(why, "cannot stat", path);
        }
    struct data_file *files = realloc(disk->files, (disk->file_count + 1) * sizeof *files);
    if (files == NULL)
        return VIX_E_OUT_OF_MEMORY;
    disk->files = files;
    struct data_file file = {.path = strdup(path), .flat = flat};
    if (file.path == NULL)
        return VIX_E_OUT_OF_MEMORY;
    int code = open_regular(path, flags, &file.fd, status, why);
    if (code != VIX_OK) {
        free(file.path);
        return code;
    }
    *number = disk->file_count;
    disk->files[disk->file_count++] = file;
    return VIX_OK;
}

static int open_data(struct vmdk *disk, const char *path, struct extent *extent, char why[VMDK_WHY]) {
    int fd = disk->files[extent->file].fd;
    int code = sparse_open(fd, path, &extent->sparse, why);
    if (code != VIX_OK)
        return code;
    const struct sparse_header *header = &extent->sparse->header;
    if (header->capacity < extent->sectors)
        return fail(why, VIX_E_DISK_INVALIDDISK, "%.160s holds %llu sectors, the descriptor says %llu", path,
                    (unsigned long long)header->capacity, (unsigned long long)extent->sectors);
    if (extent->writable && header->version > 2)
        return fail(why, VIX_E_DISK_UNSUPPORTEDDISKVERSION,
                    "%.160s is a sparse extent of version %u, which may only be read", path,
                    header->version);
    return VIX_OK;
}

static int kind_of_extent(const struct descriptor_extent *line, enum extent_kind *kind) {
    static const struct {
        const char *name;
        enum extent_kind kind;
    } kinds[] = {
        {"FLAT", EXTENT_FLAT},
        {"VMFS", EXTENT_FLAT},
        {"SPARSE", EXTENT_SPARSE},
        {"ZERO", EXTENT_ZERO},
    };
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++)
        if (strcasecmp(line->kind, kinds[i].name) == 0) {
            *kind = kinds[i].kind;
            return VIX_OK;
        }
    return VIX_E_DISK_NOTSUPPORTED;
}

static int open_extent(struct vmdk *disk, struct link *link, uint32_t first_file,
                       const struct descriptor_extent *line, struct extent *extent, char why[VMDK_WHY]) {
    int code = kind_of_extent(line, &extent->kind);
    if (code != VIX_OK)
        return fail(why, code, "%.160s has a %s extent, which is not served", link->path, line->kind);
    bool is_leaf = link == leaf_of(disk);
    extent->sectors = line->sectors;
    extent->start = link->capacity;
    extent->writable = is_leaf && (disk->flags & VMDK_WRITABLE) && line->writable;
    if (extent->kind == EXTENT_ZERO)
        return VIX_OK;
    if (line->name == NULL)
        return fail(why, VIX_E_DISK_INVALIDDISK, "%.160s: an extent without a file", link->path);
    /* A monolithic file is its own extent, under whatever name it has now. */
    char *path = link->descriptor.embedded ? strdup(link->path) : path_beside(link->path, line->name);
    if (path == NULL)
        return VIX_E_OUT_OF_MEMORY;
    struct stat status;
    bool flat = extent->kind == EXTENT_FLAT;
    code = add_file(disk, first_file, path, extent->writable ? O_RDWR : O_RDONLY, flat, &extent->file,
                    &status, why);
    if (code == VIX_OK && flat) {
        extent->offset = line->offset * SECTOR;
        if (extent->offset + line->sectors * SECTOR > (uint64_t)status.st_size)
            code = fail(why, VIX_E_DISK_INVALIDDISK, "%.160s is truncated: %lld bytes", path,
                        (long long)status.st_size);
    } else if (code == VIX_OK)
        code = open_data(disk, path, extent, why);
    free(path);
    return code;
}

static int open_extents(struct vmdk *disk, struct link *link, char why[VMDK_WHY]) {
    const struct descriptor *descriptor = &link->descriptor;
    const char *type = descriptor_value(descriptor, "createType");
    if (strcasecmp(type, "streamOptimized") == 0)
        return fail(why, VIX_E_DISK_NOTSUPPORTED, "%.160s is compressed (streamOptimized)", link->path);
    if (descriptor->embedded &&
        (descriptor->extent_count != 1 || strcasecmp(descriptor->extents[0].kind, "SPARSE") != 0))
        return fail(why, VIX_E_DISK_INVALIDDISK, "%.160s: the embedded descriptor has other extents",
                    link->path);
    link->extents = calloc(descriptor->extent_count, sizeof *link->extents);
    if (link->extents == NULL)
        return VIX_E_OUT_OF_MEMORY;
    uint32_t first_file = disk->file_count;
    for (size_t i = 0; i < descriptor->extent_count; i++) {
        struct extent *extent = &link->extents[link->count++];
        int code = open_extent(disk, link, first_file, &descriptor->extents[i], extent, why);
        if (code != VIX_OK)
            return code;
        link->capacity += extent->sectors;
        if (extent->sectors == 0) { /* it holds nothing: only its file stays open */
            sparse_free(extent->sparse);
            *extent = (struct extent){0};
            link->count--;
        }
        if (link->capacity > MAX_CAPACITY)
            return fail(why, VIX_E_DISK_INVALIDDISK, "%.160s: the extents are too large", link->path);
    }
    return VIX_OK;
}

/* Opens one more link below those there are. `path` becomes the link's. */
static int open_link(struct vmdk *disk, char *path, char why[VMDK_WHY]) {
    struct link *link = &disk->links[disk->count];
    struct stat status;
    *link = (struct link){.path = path};
    int code = descriptor_read(path, &link->descriptor, &status, why);
    if (code != VIX_OK) {
        free(path);
        return code;
    }
    link->device = status.st_dev;
    link->inode = status.st_ino;
    disk->count++;
    for (unsigned i = 0; i + 1 < disk->count; i++)
        if (disk->links[i].device == link->device && disk->links[i].inode == link->inode)
            return fail(why, VIX_E_DISK_INVALIDCHAIN, "%.160s is its own parent", path);
    return open_extents(disk, link, why);
}

static void free_link(struct link *link) {
    for (size_t i = 0; i < link->descriptor.extent_count && link->extents != NULL; i++)
        sparse_free(link->extents[i].sparse);
    free(link->extents);
    descriptor_free(&link->descriptor);
    free(link->path);
}

static int open_next_parents(struct vmdk *disk, char why[VMDK_WHY]) {
    for (;;) {
        const struct link *child = &disk->links[disk->count - 1];
        if (is_root_link(&child->descriptor))
            return VIX_OK;
        const char *hint = descriptor_value(&child->descriptor, "parentFileNameHint");
        if (hint == NULL || *hint == 0)
            return fail(why, VIX_E_DISK_PARTIALCHAIN, "%.160s does not name its parent", child->path);
        if (disk->count == MAX_LINKS)
            return fail(why, VIX_E_DISK_INVALIDCHAIN, "more than %u links", MAX_LINKS);
        uint32_t wanted = child->descriptor.parent_cid;
        char *path = path_beside(child->path, hint);
        if (path == NULL)
            return VIX_E_OUT_OF_MEMORY;
        int code = open_link(disk, path, why);
        if (code == VIX_E_FILE_NOT_FOUND)
            code = VIX_E_DISK_PARTIALCHAIN;
        if (code != VIX_OK)
            return code;
        const struct link *parent = &disk->links[disk->count - 1];
        if (parent->descriptor.cid != wanted)
            return fail(why, VIX_E_DISK_CID_MISMATCH, "%.160s has CID %08x, its child expects %08x",
                        parent->path, parent->descriptor.cid, wanted);
    }
}

int open_parents(struct vmdk *disk, char why[VMDK_WHY]) {
    unsigned before = disk->count;
    int code = open_next_parents(disk, why);
    /* A part of the parents would read as if it were all. */
    while (code != VIX_OK && disk->count > before)
        free_link(&disk->links[--disk->count]);
    return code;
}

int vmdk_open(const char *path, int flags, struct vmdk **opened, char why[VMDK_WHY]) {
    *opened = NULL;
    struct vmdk *disk = calloc(1, sizeof *disk);
    char *own = strdup(path);
    if (disk == NULL || own == NULL ||
        (disk->links = calloc(MAX_LINKS, sizeof *disk->links)) == NULL) {
        free(own);
        free(disk);
        return fail(why, VIX_E_OUT_OF_MEMORY, "out of memory");
    }
    disk->flags = flags;
    if (why != NULL)
        *why = 0;
    int code = open_link(disk, own, why);
    if (code == VIX_OK && !(flags & VMDK_SINGLE_LINK))
        code = open_parents(disk, why);
    if (code != VIX_OK) {
        if (why != NULL && *why == 0)
            fail(why, code, "cannot open %.200s", path);
        vmdk_close(disk);
        return code;
    }
    *opened = disk;
    return VIX_OK;
}

void vmdk_close(struct vmdk *disk) {
    if (disk == NULL)
        return;
    for (unsigned i = 0; i < disk->count; i++)
        free_link(&disk->links[i]);
    for (uint32_t i = 0; i < disk->file_count; i++) {
        close(disk->files[i].fd);
        free(disk->files[i].path);
    }
    free(disk->files);
    free(disk->links);
    free(disk);
}
