/* Where the sectors of a chain lie, and reading and writing them. */
#include "internal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define SEGMENTS 64u /* looked up at once */

struct extent *extent_at(const struct link *link, uint64_t sector) {
    size_t low = 0, high = link->count;
    while (high - low > 1) {
        size_t middle = low + (high - low) / 2;
        if (link->extents[middle].start <= sector)
            low = middle;
        else
            high = middle;
    }
    return &link->extents[low];
}

/* What one link holds at `sector`, as far as `end` at most; `sector` lies inside the link. What was
 * found is remembered for the rest of the call: the links below ask again piece by piece. */
int link_piece(struct vmdk *disk, unsigned number, uint64_t sector, uint64_t end, struct piece *piece) {
    struct link *link = &disk->links[number];
    struct piece *seen = &link->seen;
    if (link->seen_epoch != disk->epoch || sector < seen->start || sector >= seen->start + seen->length) {
        const struct extent *extent = extent_at(link, sector);
        uint64_t stop = smaller(end, extent->start + extent->sectors);
        *seen = (struct piece){.start = sector, .length = stop - sector, .file = extent->file};
        link->seen_epoch = 0;
        if (extent->kind == EXTENT_ZERO)
            seen->kind = PIECE_ZERO;
        else if (extent->kind == EXTENT_FLAT) {
            seen->kind = PIECE_DATA;
            seen->offset = extent->offset + (sector - extent->start) * SECTOR;
        } else {
            int code = sparse_piece(extent->sparse, disk->files[extent->file].fd, disk->epoch,
                                    sector - extent->start, stop - extent->start, seen);
            if (code != VIX_OK)
                return code;
        }
        link->seen_epoch = disk->epoch;
    }
    uint64_t passed = sector - seen->start;
    *piece = *seen;
    piece->start = sector;
    piece->offset += passed * SECTOR;
    piece->length = smaller(seen->length - passed, end - sector);
    return VIX_OK;
}

/* The segment at `sector`: the first link that knows decides. `end` is as far as the caller will ask
 * in this call, so that tables are read that far at once. */
static int chain_segment(struct vmdk *disk, unsigned top, uint64_t sector, uint64_t end,
                         struct vmdk_segment *segment) {
    uint64_t stop = end;
    *segment = (struct vmdk_segment){.file = VMDK_HOLE};
    for (unsigned number = top; number < disk->count; number++) {
        if (sector >= disk->links[number].capacity)
            break;
        struct piece piece;
        uint64_t last = smaller(end, disk->links[number].capacity);
        int code = link_piece(disk, number, sector, last, &piece);
        if (code != VIX_OK)
            return code;
        stop = smaller(stop, sector + piece.length);
        if (piece.kind == PIECE_DATA)
            *segment = (struct vmdk_segment){piece.file, disk->count - 1 - number, piece.offset, 0};
        if (piece.kind != PIECE_ABSENT)
            break;
    }
    segment->length = (stop - sector) * SECTOR;
    return VIX_OK;
}

static bool touches(const struct vmdk_segment *before, const struct vmdk_segment *after) {
    if (before->file != after->file)
        return false;
    return after->file == VMDK_HOLE ||
           (before->link == after->link && before->offset + before->length == after->offset);
}

int chain_resolve(struct vmdk *disk, unsigned top, uint64_t start, uint64_t count,
                  struct vmdk_segment *segments, size_t max, size_t *used, uint64_t *covered) {
    uint64_t sector = start, end = start + count;
    *used = 0;
    disk->epoch++;
    while (sector < end) {
        struct vmdk_segment segment;
        int code = chain_segment(disk, top, sector, end, &segment);
        if (code != VIX_OK)
            return code;
        if (*used > 0 && touches(&segments[*used - 1], &segment))
            segments[*used - 1].length += segment.length;
        else if (*used < max)
            segments[(*used)++] = segment;
        else
            break;
        sector += segment.length / SECTOR;
    }
    *covered = sector - start;
    return VIX_OK;
}

static bool is_inside(const struct vmdk *disk, uint64_t start, uint64_t count) {
    uint64_t capacity = vmdk_capacity(disk);
    return start <= capacity && count <= capacity - start;
}

int vmdk_resolve(struct vmdk *disk, uint64_t start, uint64_t count, struct vmdk_segment *segments,
                 size_t max, size_t *used, uint64_t *covered) {
    if (!is_inside(disk, start, count))
        return VIX_E_DISK_OUTOFRANGE;
    return chain_resolve(disk, 0, start, count, segments, max, used, covered);
}

int chain_read(struct vmdk *disk, unsigned top, uint64_t start, uint64_t count, void *buffer) {
    struct vmdk_segment segments[SEGMENTS];
    char *to = buffer;
    while (count > 0) {
        size_t used;
        uint64_t covered;
        int code = chain_resolve(disk, top, start, count, segments, SEGMENTS, &used, &covered);
        for (size_t i = 0; code == VIX_OK && i < used; i++) {
            if (segments[i].file == VMDK_HOLE)
                memset(to, 0, segments[i].length);
            else
                code = read_at(disk->files[segments[i].file].fd, to, segments[i].length,
                               segments[i].offset);
            to += segments[i].length;
        }
        if (code != VIX_OK)
            return code;
        start += covered;
        count -= covered;
    }
    return VIX_OK;
}

int vmdk_read(struct vmdk *disk, uint64_t start, uint64_t count, void *buffer) {
    if (!is_inside(disk, start, count))
        return VIX_E_DISK_OUTOFRANGE;
    return chain_read(disk, 0, start, count, buffer);
}

/* A grain of the leaf as it reads now, with `count` sectors from `skip` on replaced. */
static int composed_grain(struct vmdk *disk, const struct extent *extent, enum piece_kind kind,
                          uint64_t grain, uint64_t skip, uint64_t count, const void *data, char *whole) {
    uint64_t size = extent->sparse->header.grain;
    uint64_t inside = smaller(size, extent->sectors - grain * size);
    memset(whole, 0, size * SECTOR);
    if (kind == PIECE_ABSENT && count < inside) {
        if (disk->count == 1 && !is_root_link(&leaf_of(disk)->descriptor))
            return VIX_E_DISK_OPENPARENT; /* opened alone: what the parents hold here is unknown */
        int code = chain_read(disk, 1, extent->start + grain * size, inside, whole);
        if (code != VIX_OK)
            return code;
    }
    memcpy(whole + skip * SECTOR, data, count * SECTOR);
    return VIX_OK;
}

/* Writes grains that are new from `position` on; only the first and the last can need filling. */
static int write_grains(struct vmdk *disk, const struct extent *extent, enum piece_kind kind,
                        uint64_t sector, uint64_t count, const char *data, uint64_t position) {
    uint64_t size = extent->sparse->header.grain;
    int fd = disk->files[extent->file].fd;
    char *whole = NULL;
    int code = VIX_OK;
    while (count > 0 && code == VIX_OK) {
        uint64_t skip = sector % size;
        uint64_t part = skip == 0 && count >= size ? count / size * size : smaller(size - skip, count);
        if (part >= size)
            code = write_at(fd, data, part * SECTOR, position * SECTOR);
        else {
            if (whole == NULL && (whole = malloc(size * SECTOR)) == NULL)
                return VIX_E_OUT_OF_MEMORY;
            code = composed_grain(disk, extent, kind, sector / size, skip, part, data, whole);
            if (code == VIX_OK)
                code = write_at(fd, whole, size * SECTOR, position * SECTOR);
        }
        position += divide_up(part, size) * size;
        sector += part;
        data += part * SECTOR;
        count -= part;
    }
    free(whole);
    return code;
}

static int write_new(struct vmdk *disk, const struct extent *extent, const struct piece *piece,
                     const char *data, uint64_t *written) {
    struct sparse *sparse = extent->sparse;
    int fd = disk->files[extent->file].fd;
    uint64_t size = sparse->header.grain, sector = piece->start - extent->start;
    uint64_t first = sector / size, position;
    uint64_t table_end = (first / sparse->header.entries + 1) * sparse->header.entries * size;
    uint64_t count = smaller(piece->length, table_end - sector);
    uint64_t grains = (sector + count - 1) / size - first + 1;
    int code = sparse_append_position(sparse, fd, &position);
    if (code == VIX_OK && position + grains * size > UINT32_MAX)
        code = VIX_E_DISK_FULL; /* an entry could not lead there */
    if (code == VIX_OK)
        code = write_grains(disk, extent, piece->kind, sector, count, data, position);
    if (code == VIX_OK)
        code = sparse_link_grains(sparse, fd, first, grains, position);
    *written = count;
    return code;
}

static int give_new_cid(struct descriptor *descriptor, const void *unused) {
    (void)unused;
    return descriptor_set_cid(descriptor, random_cid());
}

static int write_piece(struct vmdk *disk, uint64_t start, uint64_t count, const char *data,
                       uint64_t *written) {
    struct piece piece;
    const struct extent *extent = extent_at(leaf_of(disk), start);
    if (!extent->writable || extent->kind == EXTENT_ZERO)
        return VIX_E_FILE_READ_ONLY;
    disk->epoch++;
    int code = link_piece(disk, 0, start, start + count, &piece);
    if (code != VIX_OK)
        return code;
    if (piece.kind != PIECE_DATA)
        return write_new(disk, extent, &piece, data, written);
    *written = piece.length;
    return write_at(disk->files[piece.file].fd, data, piece.length * SECTOR, piece.offset);
}

int vmdk_write(struct vmdk *disk, uint64_t start, uint64_t count, const void *buffer) {
    const char *data = buffer;
    if (!(disk->flags & VMDK_WRITABLE))
        return VIX_E_FILE_READ_ONLY;
    if (!is_inside(disk, start, count))
        return VIX_E_DISK_OUTOFRANGE;
    /* First the id, then the data: a child must not accept a parent that changed. */
    if (count > 0 && !disk->touched && !(disk->flags & VMDK_KEEP_CID)) {
        int code = leaf_update(disk, give_new_cid, NULL, NULL);
        if (code != VIX_OK)
            return code;
    }
    disk->touched = disk->touched || count > 0;
    while (count > 0) {
        uint64_t written;
        int code = write_piece(disk, start, count, data, &written);
        if (code != VIX_OK)
            return code;
        start += written;
        data += written * SECTOR;
        count -= written;
    }
    return VIX_OK;
}

int vmdk_flush(struct vmdk *disk) {
    for (size_t i = 0; i < leaf_of(disk)->count; i++) {
        const struct extent *extent = &leaf_of(disk)->extents[i];
        if (extent->writable && extent->kind != EXTENT_ZERO &&
            fdatasync(disk->files[extent->file].fd) != 0)
            return code_of_errno(errno);
    }
    return VIX_OK;
}
