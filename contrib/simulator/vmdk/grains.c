/* Grain directories and grain tables: what they say, and the change of both of them. */
#include "internal.h"

#include <endian.h>
#include <stdlib.h>
#include <string.h>

#define WINDOW 65536u /* entries read at once at most: 256 KiB, 4 GiB of a disk with usual grains */
#define ZEROED 1u

static int file_bytes(int fd, uint64_t *bytes) {
    struct stat status;
    if (fstat(fd, &status) != 0)
        return VIX_E_FILE_ERROR;
    *bytes = (uint64_t)status.st_size;
    return VIX_OK;
}

/* The directory's entries for `count` tables; anew unless they cannot change any more. */
static int load_tables(const struct sparse *sparse, int fd, uint64_t table, uint64_t count,
                       uint32_t *places) {
    if (sparse->directory != NULL) {
        memcpy(places, &sparse->directory[table], count * sizeof *places);
        return VIX_OK;
    }
    int code = read_at(fd, places, count * sizeof *places, sparse->header.directory * SECTOR + table * 4);
    for (uint64_t i = 0; code == VIX_OK && i < count; i++)
        places[i] = le32toh(places[i]);
    return code;
}

/* Fills the window's entries, tables that lie side by side in one read. */
static int load_entries(struct window *window, const struct sparse *sparse, int fd, const uint32_t *places,
                        uint64_t first_table) {
    uint64_t per_table = sparse->header.entries, end = window->first + window->count;
    bool dense = per_table * 4 == sparse_table_bytes(&sparse->header);
    uint64_t step = per_table * 4 / SECTOR;
    for (uint64_t grain = window->first; grain < end;) {
        uint64_t table = grain / per_table;
        uint64_t stop = table + 1;
        uint32_t place = places[table - first_table];
        while (dense && place != 0 && stop * per_table < end &&
               places[stop - first_table] == place + (stop - table) * step)
            stop++;
        uint64_t count = smaller(stop * per_table, end) - grain;
        uint32_t *entries = &window->entries[grain - window->first];
        if (place == 0)
            memset(entries, 0, count * sizeof *entries);
        else if (!sparse_is_table(&sparse->header, place, UINT64_MAX))
            return VIX_E_DISK_INVALIDDISK;
        else {
            int code = read_at(fd, entries, count * sizeof *entries,
                               (uint64_t)place * SECTOR + (grain - table * per_table) * 4);
            if (code != VIX_OK)
                return code;
        }
        grain += count;
    }
    for (uint64_t i = 0; i < window->count; i++)
        window->entries[i] = le32toh(window->entries[i]);
    return VIX_OK;
}

int sparse_load(struct sparse *sparse, int fd, uint64_t epoch, uint64_t grain, uint64_t count) {
    struct window *window = &sparse->window;
    count = smaller(smaller(count, WINDOW), sparse->grains - grain);
    window->epoch = 0; /* nothing, should this fail */
    if (count > window->room) {
        uint32_t *entries = realloc(window->entries, count * sizeof *entries);
        if (entries == NULL)
            return VIX_E_OUT_OF_MEMORY;
        window->entries = entries;
        window->room = count;
    }
    window->first = grain;
    window->count = count;
    uint64_t table = grain / sparse->header.entries;
    uint64_t tables = (grain + count - 1) / sparse->header.entries - table + 1;
    uint32_t few[64];
    uint32_t *places = tables <= 64 ? few : malloc(tables * sizeof *places);
    if (places == NULL)
        return VIX_E_OUT_OF_MEMORY;
    int code = load_tables(sparse, fd, table, tables, places);
    if (code == VIX_OK)
        code = load_entries(window, sparse, fd, places, table);
    /* After the tables: a grain they lead to was in the file before them. */
    if (code == VIX_OK)
        code = file_bytes(fd, &window->file_size);
    if (places != few)
        free(places);
    if (code == VIX_OK)
        window->epoch = epoch;
    return code;
}

static enum piece_kind kind_of(const struct sparse *sparse, uint32_t entry) {
    if (entry == 0)
        return PIECE_ABSENT;
    return entry == ZEROED && (sparse->header.flags & SPARSE_ZEROED) ? PIECE_ZERO : PIECE_DATA;
}

int sparse_piece(struct sparse *sparse, int fd, uint64_t epoch, uint64_t sector, uint64_t end,
                 struct piece *piece) {
    struct window *window = &sparse->window;
    uint64_t size = sparse->header.grain, grain = sector / size;
    if (window->epoch != epoch || grain < window->first || grain >= window->first + window->count) {
        int code = sparse_load(sparse, fd, epoch, grain, divide_up(end, size) - grain);
        if (code != VIX_OK)
            return code;
    }
    const uint32_t *entries = &window->entries[grain - window->first];
    uint64_t room = window->first + window->count - grain, count = 1;
    piece->kind = kind_of(sparse, entries[0]);
    while (count < room && kind_of(sparse, entries[count]) == piece->kind &&
           (piece->kind != PIECE_DATA || entries[count] == entries[0] + count * size))
        count++;
    uint64_t stop = smaller(end, (grain + count) * size);
    piece->length = stop - sector;
    if (piece->kind != PIECE_DATA)
        return VIX_OK;
    piece->offset = ((uint64_t)entries[0] + (sector - grain * size)) * SECTOR;
    if (entries[0] < sparse->header.overhead || piece->offset + piece->length * SECTOR > window->file_size)
        return VIX_E_DISK_INVALIDDISK;
    return VIX_OK;
}

int sparse_append_position(const struct sparse *sparse, int fd, uint64_t *sector) {
    uint64_t bytes, grain = sparse->header.grain;
    int code = file_bytes(fd, &bytes);
    if (code != VIX_OK)
        return code;
    *sector = divide_up(divide_up(bytes, SECTOR), grain) * grain;
    if (*sector < sparse->header.overhead)
        *sector = divide_up(sparse->header.overhead, grain) * grain;
    return VIX_OK;
}

static int read_place(int fd, uint64_t directory, uint64_t table, uint32_t *place) {
    int code = read_at(fd, place, sizeof *place, directory * SECTOR + table * 4);
    *place = le32toh(*place);
    return code;
}

/* Appends an empty grain table, which the directory leads to only once it is written. */
static int append_table(const struct sparse *sparse, int fd, uint64_t directory, uint64_t table,
                        uint32_t *place) {
    static const char zeros[MAX_TABLE_BYTES];
    uint64_t sector;
    int code = sparse_append_position(sparse, fd, &sector);
    if (code == VIX_OK && sector > UINT32_MAX)
        code = VIX_E_DISK_FULL;
    if (code == VIX_OK)
        code = write_at(fd, zeros, sparse_table_bytes(&sparse->header), sector * SECTOR);
    if (code != VIX_OK)
        return code;
    *place = (uint32_t)sector;
    uint32_t raw = htole32(*place);
    return write_at(fd, &raw, sizeof raw, directory * SECTOR + table * 4);
}

/* Where the table is in either directory; of the redundant one 0 if it is of no use. */
static int find_tables(struct sparse *sparse, int fd, uint64_t table, uint32_t places[2]) {
    const struct sparse_header *header = &sparse->header;
    bool redundant = (header->flags & SPARSE_REDUNDANT) != 0;
    uint64_t bytes = 0;
    places[1] = 0;
    int code = sparse->directory != NULL ? (places[0] = sparse->directory[table], VIX_OK)
                                         : read_place(fd, header->directory, table, &places[0]);
    if (code == VIX_OK && redundant)
        code = read_place(fd, header->redundant, table, &places[1]);
    if (code != VIX_OK)
        return code;
    if (places[0] == 0) {
        if (redundant && places[1] == 0)
            code = append_table(sparse, fd, header->redundant, table, &places[1]);
        return code != VIX_OK ? code : append_table(sparse, fd, header->directory, table, &places[0]);
    }
    /* A write through a damaged directory must not land in data. */
    code = file_bytes(fd, &bytes);
    if (code == VIX_OK && !sparse_is_table(header, places[0], bytes))
        code = VIX_E_DISK_INVALIDDISK;
    if (places[1] == places[0] || !sparse_is_table(header, places[1], bytes))
        places[1] = 0;
    return code;
}

static int write_entries(struct sparse *sparse, int fd, uint64_t grain, uint64_t count,
                         const uint32_t *entries) {
    uint32_t places[2];
    uint64_t per_table = sparse->header.entries;
    int code = find_tables(sparse, fd, grain / per_table, places);
    /* The one that readers follow comes last. */
    for (int i = 1; code == VIX_OK && i >= 0; i--)
        if (places[i] != 0)
            code = write_at(fd, entries, count * sizeof *entries,
                            (uint64_t)places[i] * SECTOR + grain % per_table * 4);
    return code;
}

int sparse_link_grains(struct sparse *sparse, int fd, uint64_t grain, uint64_t count, uint64_t sector) {
    uint32_t entries[MAX_TABLE_BYTES / 4];
    for (uint64_t i = 0; i < count; i++)
        entries[i] = htole32((uint32_t)(sector + i * sparse->header.grain));
    return write_entries(sparse, fd, grain, count, entries);
}

int sparse_set_entry(struct sparse *sparse, int fd, uint64_t grain, uint32_t entry) {
    entry = htole32(entry);
    return write_entries(sparse, fd, grain, 1, &entry);
}
