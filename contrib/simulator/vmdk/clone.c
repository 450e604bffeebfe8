/* Copies of a whole chain, and what they take. */
#include "internal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define SLICE (UINT64_C(1) << 21) /* sectors that are asked about at once: 1 GiB */
#define CHUNK 128u                /* sectors: what is copied or left out */
#define BUFFER 2048u              /* sectors copied at once */

static int visit_range(struct vmdk_range range, uint64_t chunk,
                       int (*visit)(void *data, uint64_t start, uint64_t count), void *data) {
    int code = VIX_OK;
    while (range.count > 0 && code == VIX_OK) {
        uint64_t count = smaller(range.count, chunk - range.start % chunk);
        code = visit(data, range.start, count);
        range.start += count;
        range.count -= count;
    }
    return code;
}

int visit_allocated(struct vmdk *disk, uint64_t chunk,
                    int (*visit)(void *data, uint64_t start, uint64_t count), void *data) {
    size_t max = SLICE / CHUNK;
    struct vmdk_range *ranges = malloc(max * sizeof *ranges);
    if (ranges == NULL)
        return VIX_E_OUT_OF_MEMORY;
    int code = VIX_OK;
    uint64_t capacity = vmdk_capacity(disk);
    for (uint64_t start = 0; code == VIX_OK && start < capacity; start += SLICE) {
        size_t used;
        code = vmdk_allocated(disk, start, smaller(SLICE, capacity - start), CHUNK, ranges, max, &used);
        for (size_t i = 0; code == VIX_OK && i < used; i++)
            code = visit_range(ranges[i], chunk, visit, data);
    }
    free(ranges);
    return code;
}

struct copy {
    struct vmdk *source, *target;
    char *buffer;
    vmdk_progress progress;
    void *data;
};

static int copy_piece(void *data, uint64_t start, uint64_t count) {
    struct copy *copy = data;
    int code = vmdk_read(copy->source, start, count, copy->buffer);
    for (uint64_t done = 0; code == VIX_OK && done < count;) {
        uint64_t part = smaller(CHUNK, count - done);
        bool zero = all_zero(copy->buffer + done * SECTOR, part * SECTOR);
        /* As much at once as is all data. */
        while (!zero && done + part < count &&
               !all_zero(copy->buffer + (done + part) * SECTOR,
                         smaller(CHUNK, count - done - part) * SECTOR))
            part += smaller(CHUNK, count - done - part);
        if (!zero)
            code = vmdk_write(copy->target, start + done, part, copy->buffer + done * SECTOR);
        done += part;
    }
    show_progress(copy->progress, copy->data, start + count, vmdk_capacity(copy->source));
    return code;
}

static int copy_content(struct vmdk *source, const char *path, vmdk_progress progress, void *data,
                        char why[VMDK_WHY]) {
    struct copy copy = {source, NULL, malloc(BUFFER * SECTOR), progress, data};
    if (copy.buffer == NULL)
        return VIX_E_OUT_OF_MEMORY;
    int code = vmdk_open(path, VMDK_WRITABLE | VMDK_KEEP_CID, &copy.target, why);
    if (code == VIX_OK) {
        code = visit_allocated(source, BUFFER, copy_piece, &copy);
        if (code == VIX_OK)
            code = vmdk_flush(copy.target);
        if (code != VIX_OK)
            fail(why, code, "the copy to %.160s failed", path);
    }
    vmdk_close(copy.target);
    free(copy.buffer);
    return code;
}

static bool is_part_of(const struct vmdk *disk, const struct stat *status) {
    for (unsigned i = 0; i < disk->count; i++)
        if (disk->links[i].device == status->st_dev && disk->links[i].inode == status->st_ino)
            return true;
    for (uint32_t i = 0; i < disk->file_count; i++) {
        struct stat file;
        if (fstat(disk->files[i].fd, &file) == 0 && file.st_dev == status->st_dev &&
            file.st_ino == status->st_ino)
            return true;
    }
    return false;
}

/* Makes way for the copy. */
static int remove_old(const struct vmdk *source, const char *path, bool overwrite, char why[VMDK_WHY]) {
    struct stat status;
    if (stat(path, &status) != 0)
        return VIX_OK;
    if (is_part_of(source, &status))
        return fail(why, VIX_E_INVALID_ARG, "%.160s is part of what is to be copied", path);
    if (!overwrite)
        return fail(why, VIX_E_FILE_ALREADY_EXISTS, "%.200s exists already", path);
    struct descriptor descriptor;
    int code = descriptor_read(path, &descriptor, NULL, why);
    if (code != VIX_OK)
        return code;
    for (size_t i = 0; code == VIX_OK && i < descriptor.extent_count; i++) {
        char *file = path_beside(path, descriptor.extents[i].name ? descriptor.extents[i].name : ".");
        if (file == NULL)
            code = VIX_E_OUT_OF_MEMORY;
        else if (stat(file, &status) == 0 && is_part_of(source, &status))
            code = fail(why, VIX_E_INVALID_ARG, "%.160s is part of what is to be copied", file);
        free(file);
    }
    descriptor_free(&descriptor);
    return code != VIX_OK ? code : vmdk_unlink(path, why);
}

int vmdk_clone(struct vmdk *source, const char *path, const struct vmdk_create *create, bool overwrite,
               vmdk_progress progress, void *data, char why[VMDK_WHY]) {
    struct vmdk_create own = *create;
    own.capacity = vmdk_capacity(source);
    if (form_of(own.type) == NULL)
        return fail(why, VIX_E_NOT_SUPPORTED, "disks of type %d are not made", (int)own.type);
    int code = remove_old(source, path, overwrite, why);
    if (code == VIX_OK)
        code = vmdk_create(path, &own, NULL, NULL, why);
    if (code != VIX_OK)
        return code;
    show_progress(progress, data, 0, 1);
    code = copy_content(source, path, progress, data, why);
    if (code != VIX_OK)
        vmdk_unlink(path, NULL);
    else
        show_progress(progress, data, 1, 1);
    return code;
}

static int count_piece(void *data, uint64_t start, uint64_t count) {
    (void)start;
    *(uint64_t *)data += count;
    return VIX_OK;
}

uint64_t vmdk_space_needed(struct vmdk *source, VixDiskLibDiskType type) {
    const struct form *form = form_of(type);
    uint64_t capacity = vmdk_capacity(source), sectors = 0;
    if (form == NULL || form->preallocated || visit_allocated(source, BUFFER, count_piece, &sectors))
        return capacity * SECTOR;
    if (form->sparse) {
        struct sparse_header header = {.capacity = capacity, .grain = CHUNK, .entries = MAX_TABLE_BYTES / 4};
        uint64_t tables = sparse_table_count(&header);
        uint64_t directory = tables * sparse_table_bytes(&header) + divide_up(tables * 4, SECTOR) * SECTOR;
        sectors = divide_up(sectors + 2 * directory / SECTOR, CHUNK) * CHUNK + CHUNK;
    }
    return sectors * SECTOR;
}
