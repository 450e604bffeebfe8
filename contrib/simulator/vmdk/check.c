/*
 * Damage in the grain directories and tables of a link, and its repair.
 *
 * Both copies of a table are compared. Where they differ the first one holds, unless its entry
 * cannot be right and the other's can. A grain that two entries share gets a copy for the second.
 */
#include "internal.h"

#include <endian.h>
#include <stdlib.h>
#include <string.h>

struct check {
    const struct sparse *sparse;
    int fd;
    bool repair;
    uint64_t file_size; /* before the repair: what is appended makes no entry right that was not */
    bool redundant;
    /* A bit for each grain that the file has room for, and for each sector that a table may take. */
    uint8_t *grains, *tables;
    uint64_t grain_room, table_room;
    uint64_t faults;
    char *why;
    const char *path;
};

static void found(struct check *check, const char *fault, uint64_t number) {
    if (check->faults++ == 0)
        fail(check->why, VIX_E_DISK_NEEDSREPAIR, "%.150s: %s %llu", check->path, fault,
             (unsigned long long)number);
}

/* True for the first who asks for this number; for those beyond the bits, always. */
static bool take(uint8_t *bits, uint64_t room, uint64_t number) {
    uint8_t bit = (uint8_t)(1u << (number % 8));
    if (number >= room)
        return true; /* appended by this repair */
    bool first = !(bits[number / 8] & bit);
    bits[number / 8] |= bit;
    return first;
}

/* Two tables that overlap are not both right; the first one is taken for it. */
static bool take_table(struct check *check, uint32_t *place) {
    const struct sparse_header *header = &check->sparse->header;
    bool right = sparse_is_table(header, *place, check->file_size);
    for (uint64_t i = 0; right && i < sparse_table_bytes(header) / SECTOR; i++)
        right = take(check->tables, check->table_room, *place + i);
    if (!right)
        *place = 0;
    return right;
}

static bool is_entry(const struct check *check, uint64_t grain, uint32_t entry) {
    const struct sparse_header *header = &check->sparse->header;
    if (entry == 0 || (entry == 1 && (header->flags & SPARSE_ZEROED)))
        return true;
    uint64_t sectors = smaller(header->grain, header->capacity - grain * header->grain);
    return entry >= header->overhead && ((uint64_t)entry + sectors) * SECTOR <= check->file_size;
}

/* Behind all grains; with contents, as large as a grain or a table. */
static int append(struct check *check, const void *content, uint64_t bytes, uint32_t *place) {
    uint64_t sector;
    int code = sparse_append_position(check->sparse, check->fd, &sector);
    if (code == VIX_OK && sector > UINT32_MAX)
        code = VIX_E_DISK_FULL;
    if (code == VIX_OK)
        code = write_at(check->fd, content, bytes, sector * SECTOR);
    *place = (uint32_t)sector;
    return code;
}

static int separate(struct check *check, uint32_t *entry) {
    const struct sparse_header *header = &check->sparse->header;
    uint64_t bytes = header->grain * SECTOR, from = (uint64_t)*entry * SECTOR;
    char *content = calloc(1, bytes);
    if (content == NULL)
        return VIX_E_OUT_OF_MEMORY;
    int code = read_at(check->fd, content, smaller(bytes, check->file_size - from), from);
    if (code == VIX_OK)
        code = append(check, content, bytes, entry);
    free(content);
    return code;
}

static int check_shared(struct check *check, uint64_t grain, uint32_t *entry, bool *changed) {
    const struct sparse_header *header = &check->sparse->header;
    if (*entry < header->overhead || take(check->grains, check->grain_room, *entry / header->grain))
        return VIX_OK;
    found(check, "two entries share the grain of entry", grain);
    *changed = true;
    return check->repair ? separate(check, entry) : VIX_OK;
}

static int check_entries(struct check *check, uint64_t first, uint64_t count, uint32_t *entries,
                         uint32_t *others, bool *changed) {
    for (uint64_t i = 0; i < count; i++) {
        uint32_t entry = le32toh(entries[i]);
        uint32_t other = others == NULL ? entry : le32toh(others[i]);
        if (!is_entry(check, first + i, entry)) {
            found(check, "the file ends before the grain of entry", first + i);
            entry = is_entry(check, first + i, other) ? other : 0;
            *changed = true;
        } else if (entry != other) {
            found(check, "the grain tables disagree about entry", first + i);
            *changed = true;
        }
        int code = check_shared(check, first + i, &entry, changed);
        if (code != VIX_OK)
            return code;
        entries[i] = htole32(entry);
        if (others != NULL)
            others[i] = entries[i];
    }
    return VIX_OK;
}

/* Writes the repaired table in both places; a place that is none becomes one. */
static int write_table(struct check *check, uint64_t table, const uint32_t *entries, uint32_t places[2]) {
    const struct sparse_header *header = &check->sparse->header;
    const uint64_t directories[2] = {header->directory, header->redundant};
    for (int i = check->redundant; i >= 0; i--) {
        int code;
        if (places[i] != 0)
            code = write_at(check->fd, entries, (uint64_t)header->entries * 4, (uint64_t)places[i] * SECTOR);
        else {
            code = append(check, entries, sparse_table_bytes(header), &places[i]);
            uint32_t raw = htole32(places[i]);
            if (code == VIX_OK)
                code = write_at(check->fd, &raw, sizeof raw, directories[i] * SECTOR + table * 4);
        }
        if (code != VIX_OK)
            return code;
    }
    return VIX_OK;
}

static int read_table(const struct check *check, uint32_t place, uint32_t *entries) {
    return read_at(check->fd, entries, (uint64_t)check->sparse->header.entries * 4,
                   (uint64_t)place * SECTOR);
}

static int check_table(struct check *check, uint64_t table, uint32_t places[2]) {
    const struct sparse_header *header = &check->sparse->header;
    bool redundant = check->redundant;
    if (places[0] == 0 && (!redundant || places[1] == 0))
        return VIX_OK; /* not allocated yet */
    uint32_t first[MAX_TABLE_BYTES / 4] = {0}, second[MAX_TABLE_BYTES / 4] = {0};
    bool good = take_table(check, &places[0]), other = redundant && take_table(check, &places[1]);
    bool changed = !good || (redundant && !other);
    if (changed)
        found(check, "a grain directory leads nowhere at table", table);
    int code = VIX_OK;
    if (good)
        code = read_table(check, places[0], first);
    if (code == VIX_OK && other)
        code = read_table(check, places[1], good ? second : first);
    if (code != VIX_OK)
        return code;
    uint64_t grain = table * header->entries;
    code = check_entries(check, grain, smaller(header->entries, check->sparse->grains - grain), first,
                         good && other ? second : NULL, &changed);
    return code == VIX_OK && changed && check->repair ? write_table(check, table, first, places) : code;
}

static int check_tables(struct check *check) {
    const struct sparse *sparse = check->sparse;
    for (uint64_t table = 0; table < sparse->tables; table++) {
        uint32_t places[2] = {0, 0};
        int code = read_at(check->fd, &places[0], 4, sparse->header.directory * SECTOR + table * 4);
        if (code == VIX_OK && check->redundant)
            code = read_at(check->fd, &places[1], 4, sparse->header.redundant * SECTOR + table * 4);
        places[0] = le32toh(places[0]);
        places[1] = le32toh(places[1]);
        if (code == VIX_OK)
            code = check_table(check, table, places);
        if (code != VIX_OK)
            return code;
    }
    return VIX_OK;
}

static int check_extent(const struct vmdk *disk, const struct extent *extent, bool repair,
                        uint64_t *faults, char why[VMDK_WHY]) {
    const struct sparse_header *header = &extent->sparse->header;
    struct check check = {
        .sparse = extent->sparse,
        .redundant = header->flags & SPARSE_REDUNDANT && header->redundant != header->directory,
        .fd = disk->files[extent->file].fd,
        .repair = repair,
        .faults = *faults,
        .why = why,
        .path = disk->files[extent->file].path,
    };
    struct stat status;
    if (fstat(check.fd, &status) != 0)
        return fail_errno(why, "cannot stat", check.path);
    check.file_size = (uint64_t)status.st_size;
    /* An entry has 32 bits: no grain lies above that, however long the file is. */
    uint64_t sectors = smaller(check.file_size / SECTOR + 1, UINT64_C(1) << 32);
    check.grain_room = divide_up(sectors, header->grain);
    check.table_room = sectors;
    check.grains = calloc(check.grain_room / 8 + 1, 1);
    check.tables = calloc(check.table_room / 8 + 1, 1);
    int code = VIX_E_OUT_OF_MEMORY;
    if (check.grains != NULL && check.tables != NULL)
        code = check_tables(&check);
    if (code != VIX_OK)
        fail(why, code, "cannot check %.200s", check.path);
    free(check.grains);
    free(check.tables);
    *faults = check.faults;
    return code;
}

int vmdk_check(const char *path, bool repair, char why[VMDK_WHY]) {
    struct vmdk *disk;
    int code = vmdk_open(path, VMDK_SINGLE_LINK | (repair ? VMDK_WRITABLE : 0), &disk, why);
    if (code != VIX_OK)
        return code;
    uint64_t faults = 0, left = 0; /* found, and not repaired */
    const struct link *leaf = leaf_of(disk);
    for (size_t i = 0; code == VIX_OK && i < leaf->count; i++) {
        const struct extent *extent = &leaf->extents[i];
        uint64_t before = faults;
        if (extent->kind == EXTENT_SPARSE)
            code = check_extent(disk, extent, extent->writable, &faults, why);
        if (!extent->writable)
            left += faults - before;
    }
    if (code == VIX_OK && repair)
        code = vmdk_flush(disk);
    vmdk_close(disk);
    return code == VIX_OK && left > 0 ? VIX_E_DISK_NEEDSREPAIR : code;
}
