/* The hosted sparse extent: its header, and its empty form. */
#include "internal.h"

#include <endian.h>
#include <stdlib.h>
#include <string.h>

#define MAGIC "KDMV"
#define DIRECTORY_AT_END UINT64_MAX
#define MAX_GRAIN 65536u /* sectors */
#define MAX_ENTRIES (MAX_TABLE_BYTES / 4)
#define MAX_TABLES (1u << 24)

/* On the disk: little-endian, packed, one sector. */
struct __attribute__((packed)) raw_header {
    char magic[4];
    uint32_t version, flags;
    uint64_t capacity, grain, descriptor_offset, descriptor_size;
    uint32_t entries;
    uint64_t redundant, directory, overhead;
    uint8_t unclean;
    char line_ends[4];
    uint16_t compression;
    uint8_t rest[433];
};
_Static_assert(sizeof(struct raw_header) == SECTOR, "the header is one sector");

#define FLAG_LINE_ENDS 1u
static const char line_ends[4] = {'\n', ' ', '\r', '\n'}; /* what a text-mode copy would change */

bool is_sparse_magic(const void *bytes) { return memcmp(bytes, MAGIC, 4) == 0; }

uint64_t sparse_table_bytes(const struct sparse_header *header) {
    return divide_up((uint64_t)header->entries * 4, SECTOR) * SECTOR;
}

uint64_t sparse_table_count(const struct sparse_header *header) {
    return divide_up(divide_up(header->capacity, header->grain), header->entries);
}

static bool hits_descriptor(const struct sparse_header *header, uint64_t sector, uint64_t bytes) {
    return sector == 0 || (sector < header->descriptor_offset + header->descriptor_size &&
                           sector + divide_up(bytes, SECTOR) > header->descriptor_offset);
}

bool sparse_is_table(const struct sparse_header *header, uint32_t sector, uint64_t file_size) {
    uint64_t bytes = sparse_table_bytes(header);
    return (uint64_t)sector * SECTOR + bytes <= file_size && !hits_descriptor(header, sector, bytes);
}

static int check_header(const struct sparse_header *header, const char *path, char why[VMDK_WHY]) {
    if (header->version < 1 || header->version > 3)
        return fail(why, VIX_E_DISK_UNSUPPORTEDDISKVERSION, "%.160s: sparse extent version %u", path,
                    header->version);
    if (header->flags & (SPARSE_COMPRESSED | SPARSE_MARKERS) || header->directory == DIRECTORY_AT_END)
        return fail(why, VIX_E_DISK_NOTSUPPORTED, "%.160s is compressed (streamOptimized)", path);
    if (header->capacity > MAX_CAPACITY)
        return fail(why, VIX_E_DISK_INVALIDDISK, "%.160s: a capacity of %llu sectors", path,
                    (unsigned long long)header->capacity);
    if (header->grain < 8 || header->grain > MAX_GRAIN || (header->grain & (header->grain - 1)) != 0)
        return fail(why, VIX_E_DISK_INVALIDDISK, "%.160s: grains of %llu sectors", path,
                    (unsigned long long)header->grain);
    if (header->entries < 1 || header->entries > MAX_ENTRIES)
        return fail(why, VIX_E_DISK_INVALIDDISK, "%.160s: grain tables of %u entries", path,
                    header->entries);
    if (sparse_table_count(header) > MAX_TABLES)
        return fail(why, VIX_E_DISK_INVALIDDISK, "%.160s: %llu grain tables", path,
                    (unsigned long long)sparse_table_count(header));
    if (header->descriptor_offset > UINT32_MAX || header->descriptor_size > MAX_DESCRIPTOR / SECTOR)
        return fail(why, VIX_E_DISK_INVALIDDISK, "%.160s: the descriptor's place is impossible", path);
    bool redundant = (header->flags & SPARSE_REDUNDANT) != 0;
    uint64_t bytes = sparse_table_count(header) * 4;
    if (header->directory > UINT32_MAX || hits_descriptor(header, header->directory, bytes) ||
        (redundant &&
         (header->redundant > UINT32_MAX || hits_descriptor(header, header->redundant, bytes))))
        return fail(why, VIX_E_DISK_INVALIDDISK, "%.160s: the grain directory's place is impossible",
                    path);
    return VIX_OK;
}

int sparse_header_read(int fd, const char *path, struct sparse_header *header, char why[VMDK_WHY]) {
    struct raw_header raw;
    int code = read_at(fd, &raw, sizeof raw, 0);
    if (code != VIX_OK)
        return fail(why, code, "%.160s: the header of the sparse extent cannot be read", path);
    if (!is_sparse_magic(raw.magic))
        return fail(why, VIX_E_DISK_INVALIDDISK, "%.160s is no hosted sparse extent", path);
    *header = (struct sparse_header){
        .version = le32toh(raw.version),
        .flags = le32toh(raw.flags),
        .capacity = le64toh(raw.capacity),
        .grain = le64toh(raw.grain),
        .descriptor_offset = le64toh(raw.descriptor_offset),
        .descriptor_size = le64toh(raw.descriptor_size),
        .entries = le32toh(raw.entries),
        .redundant = le64toh(raw.redundant),
        .directory = le64toh(raw.directory),
        .overhead = le64toh(raw.overhead),
    };
    if ((header->flags & FLAG_LINE_ENDS) && memcmp(raw.line_ends, line_ends, sizeof line_ends) != 0)
        return fail(why, VIX_E_DISK_INVALIDDISK, "%.160s was damaged by a copy as text", path);
    return check_header(header, path, why);
}

int sparse_header_write(int fd, const struct sparse_header *header) {
    struct raw_header raw = {
        .version = htole32(header->version),
        .flags = htole32(header->flags | FLAG_LINE_ENDS),
        .capacity = htole64(header->capacity),
        .grain = htole64(header->grain),
        .descriptor_offset = htole64(header->descriptor_offset),
        .descriptor_size = htole64(header->descriptor_size),
        .entries = htole32(header->entries),
        .redundant = htole64(header->redundant),
        .directory = htole64(header->directory),
        .overhead = htole64(header->overhead),
    };
    memcpy(raw.magic, MAGIC, sizeof raw.magic);
    memcpy(raw.line_ends, line_ends, sizeof line_ends);
    return write_at(fd, &raw, sizeof raw, 0);
}

/* Entries that lead to `tables` consecutive tables from `sector` on. */
static int write_directory(int fd, const struct sparse_header *header, uint64_t directory, uint64_t tables,
                           uint64_t sector) {
    uint32_t *entries = calloc(tables, sizeof *entries);
    if (entries == NULL)
        return VIX_E_OUT_OF_MEMORY;
    for (uint64_t i = 0; i < tables; i++)
        entries[i] = htole32((uint32_t)(sector + i * sparse_table_bytes(header) / SECTOR));
    int code = write_at(fd, entries, tables * sizeof *entries, directory * SECTOR);
    free(entries);
    return code;
}

int sparse_format(int fd, struct sparse_header *header) {
    uint64_t tables = sparse_table_count(header);
    uint64_t directory_sectors = divide_up(tables * 4, SECTOR);
    uint64_t table_sectors = tables * sparse_table_bytes(header) / SECTOR;
    header->redundant = 1 + header->descriptor_size;
    header->directory = header->redundant + directory_sectors + table_sectors;
    uint64_t end = header->directory + directory_sectors + table_sectors;
    header->overhead = divide_up(end, header->grain) * header->grain;
    if (header->overhead > UINT32_MAX || header->capacity > MAX_CAPACITY)
        return VIX_E_DISK_NOTSUPPORTED;
    int code = sparse_header_write(fd, header);
    if (code == VIX_OK)
        code = write_directory(fd, header, header->redundant, tables,
                               header->redundant + directory_sectors);
    if (code == VIX_OK)
        code = write_directory(fd, header, header->directory, tables,
                               header->directory + directory_sectors);
    /* The tables are zeros; a last byte makes the file as long as its overhead says. */
    if (code == VIX_OK)
        code = write_at(fd, "", 1, header->overhead * SECTOR - 1);
    return code;
}

static int load_directory(struct sparse *sparse, int fd) {
    uint32_t *entries = malloc(sparse->tables * sizeof *entries);
    if (entries == NULL)
        return VIX_E_OUT_OF_MEMORY;
    int code = read_at(fd, entries, sparse->tables * sizeof *entries, sparse->header.directory * SECTOR);
    bool whole = code == VIX_OK;
    for (uint64_t i = 0; whole && i < sparse->tables; i++)
        whole = (entries[i] = le32toh(entries[i])) != 0;
    if (whole)
        sparse->directory = entries;
    else
        free(entries);
    return code;
}

int sparse_open(int fd, const char *path, struct sparse **opened, char why[VMDK_WHY]) {
    struct sparse *sparse = calloc(1, sizeof *sparse);
    if (sparse == NULL)
        return VIX_E_OUT_OF_MEMORY;
    struct stat status;
    int code = sparse_header_read(fd, path, &sparse->header, why);
    if (code == VIX_OK && fstat(fd, &status) != 0)
        code = fail_errno(why, "cannot stat", path);
    if (code != VIX_OK)
        goto failed;
    sparse->grains = divide_up(sparse->header.capacity, sparse->header.grain);
    sparse->tables = sparse_table_count(&sparse->header);
    uint64_t end = sparse->header.directory * SECTOR + sparse->tables * 4;
    if (sparse->header.flags & SPARSE_REDUNDANT && sparse->header.redundant > sparse->header.directory)
        end = sparse->header.redundant * SECTOR + sparse->tables * 4;
    if (end > (uint64_t)status.st_size) {
        code = fail(why, VIX_E_DISK_INVALIDDISK, "%.160s is truncated: its grain directory ends at %llu",
                    path, (unsigned long long)end);
        goto failed;
    }
    code = sparse->tables == 0 ? VIX_OK : load_directory(sparse, fd);
    if (code != VIX_OK) {
        fail(why, code, "%.160s: the grain directory cannot be read", path);
        goto failed;
    }
    *opened = sparse;
    return VIX_OK;
failed:
    sparse_free(sparse);
    return code;
}

void sparse_free(struct sparse *sparse) {
    if (sparse == NULL)
        return;
    free(sparse->directory);
    free(sparse->window.entries);
    free(sparse);
}
