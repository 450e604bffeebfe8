/*
 * vixsim-vmdk: the simulator's VMDK code on the command line, for tests and for a look at a disk.
 */
#include <errno.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "vmdk.h"

#define SECTOR 512u
#define BUFFER 2048u /* sectors moved at once */
#define SEGMENTS 256u
#define RANGES 65536u

static const char usage[] =
    "usage: vixsim-vmdk [OPTION ...] COMMAND DISK [ARGUMENT ...]\n"
    "\n"
    "  info DISK                    fields, links and disk database\n"
    "  read DISK START COUNT        sectors to standard output\n"
    "  write DISK START             sectors from standard input\n"
    "  map DISK                     START COUNT, then LINK OFFSET FILE or hole\n"
    "  allocated DISK CHUNK         START COUNT of what is allocated, rounded out\n"
    "  check DISK                   look for damage in grain tables (--repair: and repair it)\n"
    "  set DISK KEY VALUE           an entry of the disk database\n"
    "  create DISK TYPE SECTORS     a new disk\n"
    "  child PARENT DISK TYPE       a new delta\n"
    "  attach DISK PARENT           let a delta continue another chain\n"
    "  clone SOURCE DISK TYPE       a copy of the whole chain (--overwrite: over an old disk)\n"
    "  space DISK TYPE              bytes that such a copy takes\n"
    "  grow DISK SECTORS            make a base larger (--geometry: and its geometry)\n"
    "  shrink DISK                  leave out grains of zeros\n"
    "  defragment DISK              put the grains in order\n"
    "  unlink DISK                  the descriptor and its extents\n"
    "  rename DISK NAME             the descriptor and its extents\n"
    "\n"
    "TYPE is monolithicSparse, monolithicFlat, twoGbMaxExtentSparse, twoGbMaxExtentFlat, vmfs or\n"
    "vmfsThin.\n"
    "\n"
    "  --single         open the leaf alone\n"
    "  --keep-cid       write without a new content id\n"
    "  --adapter NAME   of a new disk: ide, buslogic or lsilogic (the default)\n"
    "  --hardware N     the virtual hardware version of a new disk\n"
    "  --repair, --overwrite, --geometry   see above\n"
    "  --help           this text\n";

static struct {
    int flags;
    bool repair, overwrite, geometry;
    VixDiskLibAdapterType adapter;
    unsigned hardware;
} options = {.adapter = VIXDISKLIB_ADAPTER_SCSI_LSILOGIC};

static const struct {
    const char *name;
    VixDiskLibDiskType type;
} types[] = {
    {"monolithicSparse", VIXDISKLIB_DISK_MONOLITHIC_SPARSE},
    {"monolithicFlat", VIXDISKLIB_DISK_MONOLITHIC_FLAT},
    {"twoGbMaxExtentSparse", VIXDISKLIB_DISK_SPLIT_SPARSE},
    {"twoGbMaxExtentFlat", VIXDISKLIB_DISK_SPLIT_FLAT},
    {"vmfs", VIXDISKLIB_DISK_VMFS_FLAT},
    {"vmfsThin", VIXDISKLIB_DISK_VMFS_THIN},
    {"vmfsSparse", VIXDISKLIB_DISK_VMFS_SPARSE},
    {"streamOptimized", VIXDISKLIB_DISK_STREAM_OPTIMIZED},
};

static const struct {
    const char *name;
    VixDiskLibAdapterType adapter;
} adapters[] = {
    {"ide", VIXDISKLIB_ADAPTER_IDE},
    {"buslogic", VIXDISKLIB_ADAPTER_SCSI_BUSLOGIC},
    {"lsilogic", VIXDISKLIB_ADAPTER_SCSI_LSILOGIC},
};

static void misused(const char *what, const char *argument) {
    fprintf(stderr, "vixsim-vmdk: %s: %s (see --help)\n", what, argument);
    exit(2);
}

static uint64_t number(const char *text) {
    char *end;
    errno = 0;
    uint64_t value = strtoull(text, &end, 10);
    if (errno != 0 || end == text || *end != 0 || *text == '-')
        misused("not a number", text);
    return value;
}

static VixDiskLibDiskType type_named(const char *name) {
    for (size_t i = 0; i < sizeof types / sizeof *types; i++)
        if (strcmp(types[i].name, name) == 0)
            return types[i].type;
    misused("not a type of disk", name);
    return VIXDISKLIB_DISK_UNKNOWN;
}

static const char *type_name(VixDiskLibDiskType type) {
    for (size_t i = 0; i < sizeof types / sizeof *types; i++)
        if (types[i].type == type)
            return types[i].name;
    return "unknown";
}

static const char *adapter_name(int adapter) {
    for (size_t i = 0; i < sizeof adapters / sizeof *adapters; i++)
        if ((int)adapters[i].adapter == adapter)
            return adapters[i].name;
    return "unknown";
}

static struct vmdk_create wanted(const char *type, uint64_t capacity) {
    return (struct vmdk_create){type_named(type), options.adapter, options.hardware, capacity};
}

/* ---- commands on an open disk ---- */

static int run_info(struct vmdk *disk, char **arguments, char *why) {
    (void)arguments;
    (void)why;
    VixDiskLibGeometry geometry = vmdk_geometry(disk);
    const char *hint = vmdk_parent_hint(disk), *key;
    printf("capacity: %llu\n", (unsigned long long)vmdk_capacity(disk));
    printf("type: %s\n", type_name(vmdk_type(disk)));
    printf("adapter: %s\n", adapter_name(vmdk_adapter(disk)));
    printf("geometry: %u/%u/%u\n", geometry.cylinders, geometry.heads, geometry.sectors);
    printf("links: %u\n", vmdk_links(disk));
    if (hint != NULL)
        printf("parent: %s\n", hint);
    for (unsigned i = 0; i < vmdk_links(disk); i++)
        printf("link %u: %llu %s\n", i, (unsigned long long)vmdk_allocated_bytes(disk, i),
               vmdk_link_path(disk, i));
    for (unsigned i = 0; i < vmdk_files(disk); i++)
        printf("file %u: %s %s\n", i, vmdk_file_is_flat(disk, i) ? "flat" : "sparse",
               vmdk_file_path(disk, i));
    for (unsigned i = 0; (key = vmdk_metadata_key(disk, i)) != NULL; i++)
        printf("%s: %s\n", key, vmdk_metadata(disk, key));
    return VIX_OK;
}

static int run_read(struct vmdk *disk, char **arguments, char *why) {
    (void)why;
    static char buffer[BUFFER * SECTOR];
    uint64_t start = number(arguments[0]), count = number(arguments[1]);
    if (start > vmdk_capacity(disk) || count > vmdk_capacity(disk) - start)
        return VIX_E_DISK_OUTOFRANGE;
    while (count > 0) {
        uint64_t part = count < BUFFER ? count : BUFFER;
        int code = vmdk_read(disk, start, part, buffer);
        if (code != VIX_OK)
            return code;
        if (fwrite(buffer, SECTOR, part, stdout) != part)
            return VIX_E_FILE_ERROR;
        start += part;
        count -= part;
    }
    return VIX_OK;
}

static int run_write(struct vmdk *disk, char **arguments, char *why) {
    static char buffer[BUFFER * SECTOR];
    uint64_t start = number(arguments[0]);
    for (size_t bytes; (bytes = fread(buffer, 1, sizeof buffer, stdin)) > 0;) {
        if (bytes % SECTOR != 0) {
            snprintf(why, VMDK_WHY, "the input ends inside a sector");
            return VIX_E_INVALID_ARG;
        }
        int code = vmdk_write(disk, start, bytes / SECTOR, buffer);
        if (code != VIX_OK)
            return code;
        start += bytes / SECTOR;
    }
    return vmdk_flush(disk);
}

static int run_map(struct vmdk *disk, char **arguments, char *why) {
    (void)arguments;
    (void)why;
    struct vmdk_segment segments[SEGMENTS];
    for (uint64_t start = 0; start < vmdk_capacity(disk);) {
        size_t used;
        uint64_t covered;
        int code = vmdk_resolve(disk, start, vmdk_capacity(disk) - start, segments, SEGMENTS, &used,
                                &covered);
        if (code != VIX_OK)
            return code;
        for (size_t i = 0; i < used; i++) {
            unsigned long long count = segments[i].length / SECTOR;
            if (segments[i].file == VMDK_HOLE)
                printf("%llu %llu hole\n", (unsigned long long)start, count);
            else
                printf("%llu %llu %u %llu %s\n", (unsigned long long)start, count, segments[i].link,
                       (unsigned long long)segments[i].offset, vmdk_file_path(disk, segments[i].file));
            start += count;
        }
    }
    return VIX_OK;
}

static int run_allocated(struct vmdk *disk, char **arguments, char *why) {
    (void)why;
    static struct vmdk_range ranges[RANGES];
    size_t used;
    int code = vmdk_allocated(disk, 0, vmdk_capacity(disk), number(arguments[0]), ranges, RANGES, &used);
    for (size_t i = 0; code == VIX_OK && i < used; i++)
        printf("%llu %llu\n", (unsigned long long)ranges[i].start, (unsigned long long)ranges[i].count);
    return code;
}

static int run_set(struct vmdk *disk, char **arguments, char *why) {
    return vmdk_set_metadata(disk, arguments[0], arguments[1], why);
}

static int run_child(struct vmdk *disk, char **arguments, char *why) {
    return vmdk_create_child(disk, arguments[0], type_named(arguments[1]), NULL, NULL, why);
}

static int run_attach(struct vmdk *disk, char **arguments, char *why) {
    struct vmdk *parent;
    int code = vmdk_open(arguments[0], 0, &parent, why);
    if (code == VIX_OK)
        code = vmdk_attach(parent, disk, why);
    vmdk_close(parent);
    return code;
}

static int run_clone(struct vmdk *disk, char **arguments, char *why) {
    struct vmdk_create create = wanted(arguments[1], vmdk_capacity(disk));
    return vmdk_clone(disk, arguments[0], &create, options.overwrite, NULL, NULL, why);
}

static int run_space(struct vmdk *disk, char **arguments, char *why) {
    (void)why;
    printf("%llu\n", (unsigned long long)vmdk_space_needed(disk, type_named(arguments[0])));
    return VIX_OK;
}

static int run_shrink(struct vmdk *disk, char **arguments, char *why) {
    (void)arguments;
    return vmdk_shrink(disk, NULL, NULL, why);
}

static int run_defragment(struct vmdk *disk, char **arguments, char *why) {
    (void)arguments;
    return vmdk_defragment(disk, NULL, NULL, why);
}

/* ---- commands on files ---- */

static int run_create(const char *path, char **arguments, char *why) {
    struct vmdk_create create = wanted(arguments[0], number(arguments[1]));
    return vmdk_create(path, &create, NULL, NULL, why);
}

static int run_grow(const char *path, char **arguments, char *why) {
    return vmdk_grow(path, number(arguments[0]), options.geometry, NULL, NULL, why);
}

static int run_check(const char *path, char **arguments, char *why) {
    (void)arguments;
    return vmdk_check(path, options.repair, why);
}

static int run_unlink(const char *path, char **arguments, char *why) {
    (void)arguments;
    return vmdk_unlink(path, why);
}

static int run_rename(const char *path, char **arguments, char *why) {
    return vmdk_rename(path, arguments[0], why);
}

static const struct command {
    const char *name;
    int arguments; /* after DISK */
    int flags;     /* to open it with */
    int (*on_disk)(struct vmdk *disk, char **arguments, char *why);
    int (*on_path)(const char *path, char **arguments, char *why);
} commands[] = {
    {"info", 0, 0, run_info, NULL},
    {"read", 2, 0, run_read, NULL},
    {"write", 1, VMDK_WRITABLE, run_write, NULL},
    {"map", 0, 0, run_map, NULL},
    {"allocated", 1, 0, run_allocated, NULL},
    {"check", 0, 0, NULL, run_check},
    {"set", 2, VMDK_WRITABLE, run_set, NULL},
    {"create", 2, 0, NULL, run_create},
    {"child", 2, 0, run_child, NULL},
    {"attach", 1, VMDK_WRITABLE | VMDK_SINGLE_LINK, run_attach, NULL},
    {"clone", 2, 0, run_clone, NULL},
    {"space", 1, 0, run_space, NULL},
    {"grow", 1, 0, NULL, run_grow},
    {"shrink", 0, VMDK_WRITABLE, run_shrink, NULL},
    {"defragment", 0, VMDK_WRITABLE, run_defragment, NULL},
    {"unlink", 0, 0, NULL, run_unlink},
    {"rename", 1, 0, NULL, run_rename},
};

static int run(const struct command *command, const char *path, char **arguments, char *why) {
    if (command->on_path != NULL)
        return command->on_path(path, arguments, why);
    struct vmdk *disk;
    int code = vmdk_open(path, command->flags | options.flags, &disk, why);
    if (code == VIX_OK)
        code = command->on_disk(disk, arguments, why);
    vmdk_close(disk);
    return code;
}

static VixDiskLibAdapterType adapter_named(const char *name) {
    for (size_t i = 0; i < sizeof adapters / sizeof *adapters; i++)
        if (strcmp(adapters[i].name, name) == 0)
            return adapters[i].adapter;
    misused("not an adapter", name);
    return VIXDISKLIB_ADAPTER_UNKNOWN;
}

/* The options before the command; returns the index of the command. */
static int take_options(int count, char **words) {
    int i = 1;
    for (; i < count && strncmp(words[i], "--", 2) == 0; i++) {
        const char *word = words[i];
        bool last = i + 1 == count;
        if (strcmp(word, "--help") == 0) {
            fputs(usage, stdout);
            exit(0);
        } else if (strcmp(word, "--single") == 0)
            options.flags |= VMDK_SINGLE_LINK;
        else if (strcmp(word, "--keep-cid") == 0)
            options.flags |= VMDK_KEEP_CID;
        else if (strcmp(word, "--repair") == 0)
            options.repair = true;
        else if (strcmp(word, "--overwrite") == 0)
            options.overwrite = true;
        else if (strcmp(word, "--geometry") == 0)
            options.geometry = true;
        else if (strcmp(word, "--adapter") == 0 && !last)
            options.adapter = adapter_named(words[++i]);
        else if (strcmp(word, "--hardware") == 0 && !last)
            options.hardware = (unsigned)number(words[++i]);
        else
            misused("not an option, or without its value", word);
    }
    return i;
}

int main(int count, char **words) {
    int first = take_options(count, words);
    if (first + 1 >= count)
        misused("a command and a disk are missing", words[0]);
    const struct command *command = NULL;
    for (size_t i = 0; i < sizeof commands / sizeof *commands; i++)
        if (strcmp(commands[i].name, words[first]) == 0)
            command = &commands[i];
    if (command == NULL)
        misused("not a command", words[first]);
    if (count - first - 2 != command->arguments)
        misused("a wrong number of arguments", words[first]);
    char why[VMDK_WHY] = "";
    int code = run(command, words[first + 1], &words[first + 2], why);
    if (code == VIX_OK && fflush(stdout) != 0)
        code = VIX_E_FILE_ERROR;
    if (code == VIX_OK)
        return 0;
    if (why[0] != 0)
        fprintf(stderr, "vixsim-vmdk: %s (%d)\n", why, code);
    else
        fprintf(stderr, "vixsim-vmdk: %s %s failed (%d)\n", words[first], words[first + 1], code);
    return 1;
}
