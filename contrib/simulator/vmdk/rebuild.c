/* Shrinking and defragmenting: both write the leaf's sparse extents anew, grains in disk order. */
#include "internal.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct rebuild {
    struct vmdk *disk;
    struct extent *extent;
    struct sparse *fresh;
    int fd;            /* of the new file */
    bool drop;         /* grains of zeros are left out */
    uint64_t position; /* sectors, of the next grain in it */
    char *grain, *below;
};

static bool is_single(const struct vmdk *disk) {
    return disk->count == 1 && !is_root_link(&leaf_of(disk)->descriptor);
}

/* What a grain of zeros may become: nothing where zeros come through from below, the mark where the
 * extent has one, and else it stays. */
static int without_data(struct rebuild *rebuild, uint64_t grain, uint64_t sectors, bool *left_out) {
    const struct sparse *old = rebuild->extent->sparse;
    *left_out = false;
    if (!is_single(rebuild->disk)) {
        int code = chain_read(rebuild->disk, 1, rebuild->extent->start + grain * old->header.grain, sectors,
                              rebuild->below);
        if (code != VIX_OK)
            return code;
        *left_out = all_zero(rebuild->below, sectors * SECTOR);
    }
    if (*left_out || !(old->header.flags & SPARSE_ZEROED))
        return VIX_OK;
    *left_out = true;
    return sparse_set_entry(rebuild->fresh, rebuild->fd, grain, 1);
}

static int copy_grain(struct rebuild *rebuild, uint64_t grain, uint64_t offset) {
    const struct sparse *old = rebuild->extent->sparse;
    uint64_t size = old->header.grain;
    uint64_t sectors = smaller(size, rebuild->extent->sectors - grain * size);
    memset(rebuild->grain, 0, size * SECTOR);
    int code = read_at(rebuild->disk->files[rebuild->extent->file].fd, rebuild->grain, sectors * SECTOR,
                       offset);
    bool left_out = false;
    if (code == VIX_OK && rebuild->drop && all_zero(rebuild->grain, size * SECTOR))
        code = without_data(rebuild, grain, sectors, &left_out);
    if (code != VIX_OK || left_out)
        return code;
    code = write_at(rebuild->fd, rebuild->grain, size * SECTOR, rebuild->position * SECTOR);
    if (code == VIX_OK)
        code = sparse_link_grains(rebuild->fresh, rebuild->fd, grain, 1, rebuild->position);
    rebuild->position += size;
    return code;
}

static int copy_piece(struct rebuild *rebuild, const struct piece *piece) {
    uint64_t size = rebuild->extent->sparse->header.grain;
    int code = VIX_OK;
    for (uint64_t done = 0; code == VIX_OK && done < piece->length; done += size) {
        uint64_t grain = (piece->start + done) / size;
        if (piece->kind == PIECE_ZERO)
            code = sparse_set_entry(rebuild->fresh, rebuild->fd, grain, 1);
        else if (piece->kind == PIECE_DATA)
            code = copy_grain(rebuild, grain, piece->offset + done * SECTOR);
    }
    return code;
}

/* The pieces are relative to the extent here. */
static int copy_grains(struct rebuild *rebuild, vmdk_progress progress, void *data) {
    struct extent *extent = rebuild->extent;
    int fd = rebuild->disk->files[extent->file].fd;
    uint64_t capacity = leaf_of(rebuild->disk)->capacity;
    for (uint64_t sector = 0; sector < extent->sectors;) {
        struct piece piece = {.start = sector};
        /* The parents may be read between two pieces, so each is asked for by itself. */
        int code = sparse_piece(extent->sparse, fd, ++rebuild->disk->epoch, sector, extent->sectors, &piece);
        if (code == VIX_OK)
            code = copy_piece(rebuild, &piece);
        if (code != VIX_OK)
            return code;
        sector += piece.length;
        show_progress(progress, data, extent->start + sector, capacity);
    }
    return VIX_OK;
}

/* Header, empty tables, and the embedded descriptor if there is one. */
static int begin_file(struct rebuild *rebuild, const char *path, char why[VMDK_WHY]) {
    const struct sparse_header *old = &rebuild->extent->sparse->header;
    struct sparse_header header = *old;
    header.flags |= SPARSE_REDUNDANT;
    header.descriptor_offset = header.descriptor_size == 0 ? 0 : 1;
    int code = sparse_format(rebuild->fd, &header);
    uint64_t bytes = header.descriptor_size * SECTOR;
    if (code == VIX_OK && bytes > 0) {
        char *text = malloc(bytes);
        code = text == NULL ? VIX_E_OUT_OF_MEMORY
                            : read_at(rebuild->disk->files[rebuild->extent->file].fd, text, bytes,
                                      old->descriptor_offset * SECTOR);
        if (code == VIX_OK)
            code = write_at(rebuild->fd, text, bytes, SECTOR);
        free(text);
    }
    rebuild->position = header.overhead;
    return code == VIX_OK ? sparse_open(rebuild->fd, path, &rebuild->fresh, why) : code;
}

/* Puts the new file in the old one's place, under the same descriptor number. */
static int take_over(struct rebuild *rebuild, const char *temporary, const char *path) {
    struct data_file *file = &rebuild->disk->files[rebuild->extent->file];
    struct stat status;
    if (fstat(file->fd, &status) != 0 || fchmod(rebuild->fd, status.st_mode & 07777) != 0 ||
        fdatasync(rebuild->fd) != 0)
        return code_of_errno(errno);
    /* Another owner is kept where that is permitted. */
    if (fchown(rebuild->fd, status.st_uid, status.st_gid) != 0 && errno != EPERM)
        return code_of_errno(errno);
    if (rename(temporary, path) != 0 || dup3(rebuild->fd, file->fd, O_CLOEXEC) < 0 ||
        fstat(file->fd, &status) != 0)
        return code_of_errno(errno);
    struct link *leaf = leaf_of(rebuild->disk);
    if (leaf->descriptor.embedded != 0) {
        leaf->descriptor.offset = SECTOR;
        leaf->inode = status.st_ino;
    }
    leaf->seen_epoch = 0;
    sparse_free(rebuild->extent->sparse);
    rebuild->extent->sparse = rebuild->fresh;
    rebuild->fresh = NULL;
    return VIX_OK;
}

static int rebuild_extent(struct vmdk *disk, struct extent *extent, bool drop, vmdk_progress progress,
                          void *data, char why[VMDK_WHY]) {
    uint64_t bytes = extent->sparse->header.grain * SECTOR;
    struct rebuild rebuild = {.disk = disk, .extent = extent, .fd = -1, .drop = drop};
    char *path = realpath(disk->files[extent->file].path, NULL), *temporary = NULL;
    if (path == NULL)
        return fail_errno(why, "cannot find", disk->files[extent->file].path);
    rebuild.grain = malloc(bytes);
    rebuild.below = malloc(bytes);
    int code = VIX_OK;
    if (rebuild.grain == NULL || rebuild.below == NULL || asprintf(&temporary, "%s.XXXXXX", path) < 0)
        code = VIX_E_OUT_OF_MEMORY;
    else if ((rebuild.fd = mkostemp(temporary, O_CLOEXEC)) < 0)
        code = fail_errno(why, "cannot write beside", path);
    if (code == VIX_OK) {
        code = begin_file(&rebuild, path, why);
        if (code == VIX_OK)
            code = copy_grains(&rebuild, progress, data);
        if (code == VIX_OK)
            code = take_over(&rebuild, temporary, path);
        if (code != VIX_OK) {
            fail(why, code, "cannot rewrite %.200s", path);
            unlink(temporary);
        }
        close(rebuild.fd);
    }
    sparse_free(rebuild.fresh);
    free(temporary);
    free(rebuild.grain);
    free(rebuild.below);
    free(path);
    return code;
}

static int rebuild_leaf(struct vmdk *disk, bool drop, vmdk_progress progress, void *data,
                        char why[VMDK_WHY]) {
    struct link *leaf = leaf_of(disk);
    bool any = false;
    show_progress(progress, data, 0, 1);
    for (size_t i = 0; i < leaf->count; i++) {
        struct extent *extent = &leaf->extents[i];
        if (extent->kind != EXTENT_SPARSE)
            continue;
        any = true;
        if (!extent->writable)
            return fail(why, VIX_E_FILE_READ_ONLY, "%.200s is opened read-only", leaf->path);
        int code = rebuild_extent(disk, extent, drop, progress, data, why);
        if (code != VIX_OK)
            return code;
    }
    if (!any && drop)
        return fail(why, VIX_E_DISK_CANTSHRINK, "%.200s has no sparse extent", leaf->path);
    show_progress(progress, data, 1, 1);
    return VIX_OK;
}

int vmdk_shrink(struct vmdk *disk, vmdk_progress progress, void *data, char why[VMDK_WHY]) {
    return rebuild_leaf(disk, true, progress, data, why);
}

int vmdk_defragment(struct vmdk *disk, vmdk_progress progress, void *data, char why[VMDK_WHY]) {
    return rebuild_leaf(disk, false, progress, data, why);
}
