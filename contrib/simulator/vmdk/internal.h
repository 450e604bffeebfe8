/*
 * What the files of the simulator's VMDK code share among themselves.
 *
 * A disk is a list of links, the leaf first (so that the file numbers of the leaf never depend on
 * how many parents are opened); the interface counts from the base, see link_at(). A link is a list
 * of extents; an extent is flat, hosted-sparse or ZERO.
 */
#ifndef SIMULATOR_VMDK_INTERNAL_H
#define SIMULATOR_VMDK_INTERNAL_H

#include <sys/stat.h>
#include <sys/types.h>

#include "vmdk.h"

#define SECTOR 512u
#define MAX_LINKS 255u
#define MAX_EXTENTS 32768u
#define MAX_CAPACITY (UINT64_C(1) << 37) /* sectors: 64 TiB, above what the format's makers allow */
#define MAX_DESCRIPTOR (4u << 20)        /* bytes */
#define NO_PARENT 0xffffffffu            /* the parentCID of a base */
#define SPLIT_SECTORS 4192256u           /* an extent of a split disk: 2047 MiB */

/* ---- io.c ---- */

/* Leaves a line in `why` (which may be NULL) and returns `code`. */
int fail(char why[VMDK_WHY], int code, const char *format, ...) __attribute__((format(printf, 3, 4)));
int code_of_errno(int number);
int fail_errno(char why[VMDK_WHY], const char *what, const char *path);
/* All bytes or an error; a file that ends early is VIX_E_DISK_INVALIDDISK. */
int read_at(int fd, void *buffer, uint64_t bytes, uint64_t offset);
int write_at(int fd, const void *buffer, uint64_t bytes, uint64_t offset);
/* A regular file, never blocking on what only looks like one. */
int open_regular(const char *path, int flags, int *fd, struct stat *status, char why[VMDK_WHY]);
int create_file(const char *path, int *fd, char why[VMDK_WHY]);
char *path_beside(const char *path, const char *name); /* `name` seen from the folder of `path` */
char *path_folder(const char *path);
const char *path_name(const char *path);
bool same_folder(const char *one, const char *other);
void random_bytes(void *buffer, size_t bytes);
uint32_t random_cid(void);
bool all_zero(const void *buffer, size_t bytes);
void show_progress(vmdk_progress progress, void *data, uint64_t done, uint64_t total);

/* ---- descriptor.c ---- */

struct descriptor_line {
    char *text;  /* as it is written */
    char *key;   /* NULL for comments and extents */
    char *value; /* without quotes */
};

struct descriptor_extent {
    size_t line;
    bool writable; /* RW, not RDONLY */
    uint64_t sectors;
    char kind[16]; /* FLAT, VMFS, SPARSE, ZERO ... */
    char *name;    /* NULL for ZERO */
    uint64_t offset; /* sectors, in a flat file */
};

struct descriptor {
    struct descriptor_line *lines;
    size_t count, line_room;
    struct descriptor_extent *extents;
    size_t extent_count, extent_room;
    uint32_t cid, parent_cid;
    uint64_t embedded; /* bytes it may take in its extent; 0: a file of its own */
    uint64_t offset;   /* bytes, of an embedded one */
};

/* `status` may be NULL. */
int descriptor_read(const char *path, struct descriptor *descriptor, struct stat *status,
                    char why[VMDK_WHY]);
int descriptor_parse(char *text, const char *path, struct descriptor *descriptor, char why[VMDK_WHY]);
int descriptor_write(const char *path, const struct descriptor *descriptor, char why[VMDK_WHY]);
char *descriptor_text(const struct descriptor *descriptor, size_t *bytes);
void descriptor_free(struct descriptor *descriptor);
const char *descriptor_value(const struct descriptor *descriptor, const char *key);
int descriptor_insert_line(struct descriptor *descriptor, size_t index, struct descriptor_line line);
int descriptor_add_extent(struct descriptor *descriptor, struct descriptor_extent extent);
int descriptor_set(struct descriptor *descriptor, const char *key, const char *value);
int descriptor_set_cid(struct descriptor *descriptor, uint32_t cid);
int descriptor_set_parent(struct descriptor *descriptor, const char *hint, uint32_t cid);
/* Replaces an extent, or adds one after the last when `index` is extent_count. */
int descriptor_set_extent(struct descriptor *descriptor, size_t index,
                          const struct descriptor_extent *extent);
bool descriptor_is_thin(const struct descriptor *descriptor);

/* ---- sparse.c, grains.c ---- */

#define SPARSE_REDUNDANT (1u << 1)
#define SPARSE_ZEROED (1u << 2) /* a grain table entry of 1 is a grain of zeros */
#define SPARSE_COMPRESSED (1u << 16)
#define SPARSE_MARKERS (1u << 17)

#define MAX_TABLE_BYTES 2048 /* of a grain table: 512 entries, which is also the usual number */

struct sparse_header {
    uint32_t version, flags;
    uint64_t capacity, grain; /* sectors */
    uint64_t descriptor_offset, descriptor_size;
    uint32_t entries;             /* in a grain table */
    uint64_t redundant, directory; /* sectors, where the grain directories are */
    uint64_t overhead;
};

enum piece_kind { PIECE_DATA, PIECE_ZERO, PIECE_ABSENT };

struct piece {
    enum piece_kind kind;
    uint32_t file;
    uint64_t start;  /* sectors, in the disk */
    uint64_t length; /* sectors */
    uint64_t offset; /* bytes, in the file, of data */
};

/* Grain table entries, as they were in one call. */
struct window {
    uint64_t epoch, first, count;
    uint32_t *entries;
    size_t room;
    uint64_t file_size;
};

struct sparse {
    struct sparse_header header;
    uint64_t grains, tables;
    uint32_t *directory; /* kept only if it leads to all tables already, and so stays as it is */
    struct window window;
};

bool is_sparse_magic(const void *bytes);
int sparse_header_read(int fd, const char *path, struct sparse_header *header, char why[VMDK_WHY]);
int sparse_header_write(int fd, const struct sparse_header *header);
uint64_t sparse_table_bytes(const struct sparse_header *header); /* rounded up to sectors */
uint64_t sparse_table_count(const struct sparse_header *header);
/* A grain table may lie at the sector: in the file, and not over the header or the descriptor. */
bool sparse_is_table(const struct sparse_header *header, uint32_t sector, uint64_t file_size);
/* Lays out directories and tables behind the descriptor, all tables allocated, and writes them. */
int sparse_format(int fd, struct sparse_header *header);
int sparse_open(int fd, const char *path, struct sparse **sparse, char why[VMDK_WHY]);
void sparse_free(struct sparse *sparse);

/* The piece at `sector` (of the extent), which ends at or before `end`; .start is left alone. */
int sparse_piece(struct sparse *sparse, int fd, uint64_t epoch, uint64_t sector, uint64_t end,
                 struct piece *piece);
/* Grain table entries from `grain` on, at most `count`, of what the file holds now. */
int sparse_load(struct sparse *sparse, int fd, uint64_t epoch, uint64_t grain, uint64_t count);
int sparse_append_position(const struct sparse *sparse, int fd, uint64_t *sector);
/* Lets `count` grains of one table lead to consecutive grains from `sector` on. */
int sparse_link_grains(struct sparse *sparse, int fd, uint64_t grain, uint64_t count, uint64_t sector);
int sparse_set_entry(struct sparse *sparse, int fd, uint64_t grain, uint32_t entry);

/* ---- open.c, chain.c ---- */

enum extent_kind { EXTENT_FLAT, EXTENT_SPARSE, EXTENT_ZERO };

struct extent {
    enum extent_kind kind;
    bool writable;
    uint64_t start, sectors; /* in the disk */
    uint32_t file;
    uint64_t offset; /* bytes, of flat ones */
    struct sparse *sparse;
};

struct link {
    char *path;
    struct descriptor descriptor;
    dev_t device;
    ino_t inode;
    struct extent *extents;
    size_t count;
    uint64_t capacity;
    uint64_t seen_epoch; /* the call that `seen` belongs to */
    struct piece seen;
};

struct data_file {
    int fd;
    char *path;
    bool flat;
};

struct vmdk {
    int flags;
    struct link *links; /* the leaf first */
    unsigned count;
    struct data_file *files;
    uint32_t file_count;
    uint64_t epoch; /* one more at each call: nothing read from tables outlives it */
    bool touched;   /* the leaf has its new content id */
};

static inline struct link *leaf_of(const struct vmdk *disk) { return &disk->links[0]; }
static inline struct link *link_at(const struct vmdk *disk, unsigned link) {
    return &disk->links[disk->count - 1 - link];
}

int open_parents(struct vmdk *disk, char why[VMDK_WHY]); /* from the last opened link on */
bool is_root_link(const struct descriptor *descriptor);
struct extent *extent_at(const struct link *link, uint64_t sector);
/* The links from `link` (0 is the leaf) down to the base; past their ends there are zeros. */
int chain_read(struct vmdk *disk, unsigned link, uint64_t start, uint64_t count, void *buffer);
int chain_resolve(struct vmdk *disk, unsigned link, uint64_t start, uint64_t count,
                  struct vmdk_segment *segments, size_t max, size_t *used, uint64_t *covered);
int link_piece(struct vmdk *disk, unsigned link, uint64_t sector, uint64_t end, struct piece *piece);
int leaf_update(struct vmdk *disk, int (*change)(struct descriptor *, const void *), const void *data,
                char why[VMDK_WHY]);
VixDiskLibGeometry geometry_of(uint64_t capacity, VixDiskLibAdapterType adapter);

/* ---- create.c ---- */

/* How the files of a type of disk look. */
struct form {
    VixDiskLibDiskType type;
    const char *create_type, *kind; /* of the descriptor and its extents */
    const char *suffix;             /* of the extents' names; NULL: one file for all */
    bool split, sparse, preallocated;
};

const struct form *form_of(VixDiskLibDiskType type); /* NULL: not one that can be made */
/* Creates the file of an extent (which may not exist) and makes it as long as it has to be. */
int create_extent_file(const char *path, const struct form *form, uint64_t sectors, char why[VMDK_WHY]);
char *extent_name(const char *path, const struct form *form, unsigned number);
char *path_stem(const char *path); /* the name without ".vmdk" */
char *hint_towards(const char *child, const char *parent); /* a name if they share a folder */

/* ---- manage.c, clone.c ---- */

/* Visits what is allocated, in pieces of at most `chunk` sectors that begin at multiples of it. */
int visit_allocated(struct vmdk *disk, uint64_t chunk,
                    int (*visit)(void *data, uint64_t start, uint64_t count), void *data);

static inline uint64_t smaller(uint64_t a, uint64_t b) { return a < b ? a : b; }
static inline uint64_t divide_up(uint64_t a, uint64_t b) { return a / b + (a % b != 0); }

#endif
