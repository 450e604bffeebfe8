/*
 * The simulator's own VMDK code: flat and hosted-sparse links, split or not, and chains of them.
 *
 * It serves the disks that the simulated hosts and the `file` transport open, and shares nothing
 * with any client: what one of them misreads, the other must be able to catch.
 *
 * Every function that can fail returns an error code of vixDiskLib.h (0 is success) and, where it
 * takes `why`, leaves one line there for the log. Counts and positions are in sectors of 512 bytes
 * unless their name says bytes. An object may be used by one thread at a time; reads through the
 * descriptors of vmdk_fd() may go on beside it.
 */
#ifndef SIMULATOR_VMDK_H
#define SIMULATOR_VMDK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "vixDiskLib.h"

#define VMDK_WHY 256
#define VMDK_HOLE UINT32_MAX /* a segment that no file holds: zeros */

struct vmdk; /* an open chain of links, the base first */

/* A piece of the disk and where its bytes lie. */
struct vmdk_segment {
    uint32_t file;   /* for vmdk_fd(), or VMDK_HOLE */
    uint32_t link;   /* 0 is the base; of a hole: meaningless */
    uint64_t offset; /* bytes, in that file */
    uint64_t length; /* bytes, a multiple of 512 */
};

/* A piece of the disk that is allocated. */
struct vmdk_range {
    uint64_t start;
    uint64_t count;
};

enum vmdk_open_flags {
    VMDK_WRITABLE = 1,     /* the leaf may be written; all other links are opened read-only */
    VMDK_SINGLE_LINK = 2,  /* the leaf alone: what it does not hold reads as zeros */
    VMDK_KEEP_CID = 4,     /* do not give the leaf a new content id at the first write */
};

/* Opens the chain that ends at the descriptor (or monolithic file) `path`. Fails with FILE_NOT_FOUND,
 * FILE_ACCESS_ERROR, DISK_PARTIALCHAIN (a parent is missing), DISK_CID_MISMATCH, DISK_INVALIDDISK,
 * DISK_UNSUPPORTEDDISKVERSION, DISK_NOTSUPPORTED (a format that is not served). */
int vmdk_open(const char *path, int flags, struct vmdk **disk, char why[VMDK_WHY]);
void vmdk_close(struct vmdk *disk); /* NULL is fine */

uint64_t vmdk_capacity(const struct vmdk *disk);
unsigned vmdk_links(const struct vmdk *disk);
int vmdk_adapter(const struct vmdk *disk); /* VixDiskLibAdapterType */
VixDiskLibGeometry vmdk_geometry(const struct vmdk *disk);
VixDiskLibDiskType vmdk_type(const struct vmdk *disk); /* of the leaf */
const char *vmdk_parent_hint(const struct vmdk *disk); /* of the leaf; NULL without a parent */
const char *vmdk_link_path(const struct vmdk *disk, unsigned link); /* its descriptor's file */
uint64_t vmdk_allocated_bytes(struct vmdk *disk, unsigned link); /* what its files really occupy */

/* The files that hold data, of all links; their numbers stay as they are until vmdk_close().
 * vmdk_fd() is open for writing only where the leaf is. */
unsigned vmdk_files(const struct vmdk *disk);
int vmdk_fd(const struct vmdk *disk, unsigned file);
const char *vmdk_file_path(const struct vmdk *disk, unsigned file);
bool vmdk_file_is_flat(const struct vmdk *disk, unsigned file);

/* Where `count` sectors from `start` lie, in order and merged where they touch, at most `max`
 * pieces. `*used` is how many pieces were filled in, `*covered` how many sectors they cover: fewer
 * than `count` only if `max` was reached. Grain tables are read anew at each call, so that what
 * another opener allocated is seen. DISK_OUTOFRANGE past the end. */
int vmdk_resolve(struct vmdk *disk, uint64_t start, uint64_t count, struct vmdk_segment *segments,
                 size_t max, size_t *used, uint64_t *covered);

int vmdk_read(struct vmdk *disk, uint64_t start, uint64_t count, void *buffer);
/* Allocates grains (filled up from the parents) where the leaf has none. A grain is written before
 * the tables that lead to it. DISK_FULL, FILE_ERROR, FILE_READ_ONLY, DISK_OUTOFRANGE. */
int vmdk_write(struct vmdk *disk, uint64_t start, uint64_t count, const void *buffer);
int vmdk_flush(struct vmdk *disk);

/* What any link of the chain holds, rounded out to `chunk` sectors and merged; at most `max`
 * ranges, `*used` of them. Flat extents count what their file has allocated (SEEK_DATA). The caller
 * keeps `start` and `count` multiples of `chunk`. OUT_OF_MEMORY when `max` is too small. */
int vmdk_allocated(struct vmdk *disk, uint64_t start, uint64_t count, uint64_t chunk,
                   struct vmdk_range *ranges, size_t max, size_t *used);

/* The disk database of the leaf: the ddb.* entries with their full name ("ddb.uuid"), plus the
 * names a library adds. `vmdk_metadata` returns NULL for an unknown key, `vmdk_metadata_key` NULL
 * past the last. Setting writes the descriptor anew (in place for embedded ones). */
const char *vmdk_metadata(const struct vmdk *disk, const char *key);
const char *vmdk_metadata_key(const struct vmdk *disk, unsigned index);
int vmdk_set_metadata(struct vmdk *disk, const char *key, const char *value, char why[VMDK_WHY]);

/* ---- disks as files (create.c, manage.c) ---- */

/* Called with 0..100; its answer is ignored. May be NULL. */
typedef void (*vmdk_progress)(void *data, int percent);

struct vmdk_create {
    VixDiskLibDiskType type; /* all but STREAM_OPTIMIZED, VMFS_SPARSE: NOT_SUPPORTED */
    VixDiskLibAdapterType adapter;
    unsigned hardware_version;
    uint64_t capacity;
};

int vmdk_create(const char *path, const struct vmdk_create *create, vmdk_progress progress, void *data,
                char why[VMDK_WHY]); /* FILE_ALREADY_EXISTS */
int vmdk_create_child(struct vmdk *parent, const char *path, VixDiskLibDiskType type,
                      vmdk_progress progress, void *data, char why[VMDK_WHY]);
int vmdk_unlink(const char *path, char why[VMDK_WHY]); /* the descriptor and its extents, not its parents */
int vmdk_rename(const char *from, const char *to, char why[VMDK_WHY]); /* extents too */
int vmdk_grow(const char *path, uint64_t capacity, bool geometry, vmdk_progress progress, void *data,
              char why[VMDK_WHY]); /* DISK_CAPACITY_MISMATCH when not larger; no parents, no children */
int vmdk_shrink(struct vmdk *disk, vmdk_progress progress, void *data, char why[VMDK_WHY]); /* drops zero grains */
int vmdk_defragment(struct vmdk *disk, vmdk_progress progress, void *data, char why[VMDK_WHY]); /* grains in disk order */
int vmdk_clone(struct vmdk *source, const char *path, const struct vmdk_create *create, bool overwrite,
               vmdk_progress progress, void *data, char why[VMDK_WHY]);
uint64_t vmdk_space_needed(struct vmdk *source, VixDiskLibDiskType type); /* bytes */
int vmdk_attach_possible(const struct vmdk *parent, const struct vmdk *child, char why[VMDK_WHY]);
int vmdk_attach(struct vmdk *parent, struct vmdk *child, char why[VMDK_WHY]); /* child opened SINGLE_LINK: its parent hint and CID are set, and the chain continues */
int vmdk_check(const char *path, bool repair, char why[VMDK_WHY]); /* DISK_NEEDSREPAIR where damage was found and `repair` is false */

#endif
