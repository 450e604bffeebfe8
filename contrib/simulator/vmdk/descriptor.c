/*
 * The text descriptor: lines as they are, so that what is written back differs only where a value
 * changed.
 */
#include "internal.h"

#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <unistd.h>

static const char *const access_words[] = {"RW", "RDONLY", "NOACCESS"};

static char *trimmed(char *text) {
    while (isspace((unsigned char)*text))
        text++;
    size_t length = strlen(text);
    while (length > 0 && isspace((unsigned char)text[length - 1]))
        text[--length] = 0;
    return text;
}

static bool is_extent_line(const char *text) {
    for (size_t i = 0; i < sizeof access_words / sizeof *access_words; i++) {
        size_t length = strlen(access_words[i]);
        if (strncasecmp(text, access_words[i], length) == 0 && isspace((unsigned char)text[length]))
            return true;
    }
    return false;
}

static bool parse_number(const char **text, uint64_t *number) {
    const char *from = *text + strspn(*text, " \t");
    if (!isdigit((unsigned char)*from))
        return false;
    char *end;
    errno = 0;
    *number = strtoull(from, &end, 10);
    *text = end;
    return errno == 0 && (*end == 0 || isspace((unsigned char)*end));
}

static const char *parse_word(const char *text, char *word, size_t room) {
    text += strspn(text, " \t");
    size_t length = strcspn(text, " \t\"");
    if (length == 0 || length >= room)
        return NULL;
    memcpy(word, text, length);
    word[length] = 0;
    return text + length;
}

/* ACCESS SECTORS KIND ["NAME" [OFFSET]]. */
static int parse_extent(const char *text, struct descriptor_extent *extent) {
    char word[16];
    if ((text = parse_word(text, word, sizeof word)) == NULL)
        return VIX_E_DISK_INVALIDDISK;
    if (strcasecmp(word, "NOACCESS") == 0)
        return VIX_E_DISK_NOTSUPPORTED;
    extent->writable = strcasecmp(word, "RW") == 0;
    if (!parse_number(&text, &extent->sectors) || extent->sectors > MAX_CAPACITY)
        return VIX_E_DISK_INVALIDDISK;
    if ((text = parse_word(text, extent->kind, sizeof extent->kind)) == NULL)
        return VIX_E_DISK_INVALIDDISK;
    text += strspn(text, " \t");
    if (*text == 0)
        return strcasecmp(extent->kind, "ZERO") == 0 ? VIX_OK : VIX_E_DISK_INVALIDDISK;
    const char *end = *text == '"' ? strchr(text + 1, '"') : NULL;
    if (end == NULL || end == text + 1)
        return VIX_E_DISK_INVALIDDISK;
    extent->name = strndup(text + 1, (size_t)(end - text - 1));
    if (extent->name == NULL)
        return VIX_E_OUT_OF_MEMORY;
    text = end + 1;
    bool with_offset = text[strspn(text, " \t")] != 0;
    if (with_offset && (!parse_number(&text, &extent->offset) || extent->offset > MAX_CAPACITY))
        return VIX_E_DISK_INVALIDDISK;
    return VIX_OK;
}

int descriptor_insert_line(struct descriptor *descriptor, size_t index, struct descriptor_line line) {
    if (descriptor->count == descriptor->line_room) {
        size_t room = 2 * descriptor->line_room + 32;
        struct descriptor_line *lines = realloc(descriptor->lines, room * sizeof *lines);
        if (lines == NULL)
            return VIX_E_OUT_OF_MEMORY;
        descriptor->lines = lines;
        descriptor->line_room = room;
    }
    memmove(&descriptor->lines[index + 1], &descriptor->lines[index],
            (descriptor->count - index) * sizeof *descriptor->lines);
    descriptor->lines[index] = line;
    descriptor->count++;
    bool at_end = index + 1 == descriptor->count;
    for (size_t i = 0; i < descriptor->extent_count && !at_end; i++)
        if (descriptor->extents[i].line >= index)
            descriptor->extents[i].line++;
    return VIX_OK;
}

int descriptor_add_extent(struct descriptor *descriptor, struct descriptor_extent extent) {
    if (descriptor->extent_count >= MAX_EXTENTS)
        return VIX_E_DISK_INVALIDDISK;
    if (descriptor->extent_count == descriptor->extent_room) {
        size_t room = 2 * descriptor->extent_room + 4;
        struct descriptor_extent *extents = realloc(descriptor->extents, room * sizeof *extents);
        if (extents == NULL)
            return VIX_E_OUT_OF_MEMORY;
        descriptor->extents = extents;
        descriptor->extent_room = room;
    }
    descriptor->extents[descriptor->extent_count++] = extent;
    return VIX_OK;
}

static int parse_line(struct descriptor *descriptor, char *text) {
    struct descriptor_line line = {.text = strdup(text)};
    size_t index = descriptor->count;
    int code = line.text == NULL ? VIX_E_OUT_OF_MEMORY
                                 : descriptor_insert_line(descriptor, index, line);
    if (code != VIX_OK) {
        free(line.text);
        return code;
    }
    text = trimmed(text);
    if (*text == 0 || *text == '#')
        return VIX_OK;
    if (is_extent_line(text)) {
        struct descriptor_extent extent = {.line = index};
        code = parse_extent(text, &extent);
        if (code == VIX_OK)
            code = descriptor_add_extent(descriptor, extent);
        if (code != VIX_OK)
            free(extent.name);
        return code;
    }
    char *equals = strchr(text, '=');
    if (equals == NULL)
        return VIX_E_DISK_INVALIDDISK;
    *equals = 0;
    char *value = trimmed(equals + 1);
    size_t length = strlen(value);
    if (length >= 2 && value[0] == '"' && value[length - 1] == '"') {
        value[length - 1] = 0;
        value++;
    }
    struct descriptor_line *stored = &descriptor->lines[index];
    stored->key = strdup(trimmed(text));
    stored->value = strdup(value);
    return stored->key == NULL || stored->value == NULL ? VIX_E_OUT_OF_MEMORY : VIX_OK;
}

static bool parse_cid(const struct descriptor *descriptor, const char *key, uint32_t *cid) {
    const char *value = descriptor_value(descriptor, key);
    if (value == NULL || strlen(value) == 0 || strlen(value) > 8 ||
        strspn(value, "0123456789abcdefABCDEF") != strlen(value))
        return false;
    *cid = (uint32_t)strtoul(value, NULL, 16);
    return true;
}

/* What every descriptor must say, whatever its extents are. */
static int check_fields(struct descriptor *descriptor, const char *path, char why[VMDK_WHY]) {
    const char *version = descriptor_value(descriptor, "version");
    if (version == NULL)
        return fail(why, VIX_E_DISK_INVALIDDISK, "%.160s is no disk descriptor: it has no version", path);
    if (strlen(version) != 1 || *version < '1' || *version > '4')
        return fail(why, VIX_E_DISK_UNSUPPORTEDDISKVERSION, "%.160s: descriptor version %.20s", path,
                    version);
    descriptor->parent_cid = NO_PARENT;
    if (!parse_cid(descriptor, "CID", &descriptor->cid) ||
        (descriptor_value(descriptor, "parentCID") != NULL &&
         !parse_cid(descriptor, "parentCID", &descriptor->parent_cid)))
        return fail(why, VIX_E_DISK_INVALIDDISK, "%.160s: CID or parentCID is missing or no number", path);
    if (descriptor_value(descriptor, "createType") == NULL)
        return fail(why, VIX_E_DISK_INVALIDDISK, "%.160s: createType is missing", path);
    if (descriptor->extent_count == 0)
        return fail(why, VIX_E_DISK_INVALIDDISK, "%.160s lists no extent", path);
    return VIX_OK;
}

int descriptor_parse(char *text, const char *path, struct descriptor *descriptor, char why[VMDK_WHY]) {
    char *rest = text;
    for (char *line; (line = strsep(&rest, "\n")) != NULL;) {
        size_t length = strlen(line);
        if (length > 0 && line[length - 1] == '\r')
            line[length - 1] = 0;
        if (rest == NULL && *line == 0)
            break; /* what follows the last line break */
        int code = parse_line(descriptor, line);
        if (code != VIX_OK)
            return fail(why, code, "%.160s: line %zu of the descriptor is not understood", path,
                        descriptor->count);
    }
    return check_fields(descriptor, path, why);
}

/* The text ends at a zero byte, also where it has a file of its own: qemu pads it, and leaves the end of
 * a longer one behind. */
static int read_text(int fd, const char *path, struct descriptor *descriptor, const struct stat *status,
                     char why[VMDK_WHY]) {
    uint64_t bytes = descriptor->embedded != 0 ? descriptor->embedded : (uint64_t)status->st_size;
    if (bytes > MAX_DESCRIPTOR)
        return fail(why, VIX_E_DISK_INVALIDDISK, "%.160s is too large for a descriptor", path);
    char *text = malloc(bytes + 1);
    if (text == NULL)
        return VIX_E_OUT_OF_MEMORY;
    int code = read_at(fd, text, bytes, descriptor->offset);
    text[bytes] = 0;
    if (code != VIX_OK)
        code = fail(why, code, "cannot read the descriptor of %.160s", path);
    else
        code = descriptor_parse(text, path, descriptor, why);
    free(text);
    return code;
}

static int locate(int fd, const char *path, struct descriptor *descriptor, char why[VMDK_WHY]) {
    char magic[4] = "";
    if (pread(fd, magic, sizeof magic, 0) < 0)
        return fail_errno(why, "cannot read", path);
    if (memcmp(magic, "COWD", 4) == 0)
        return fail(why, VIX_E_DISK_NOTSUPPORTED, "%.160s is a VMFS sparse extent", path);
    if (!is_sparse_magic(magic))
        return VIX_OK;
    struct sparse_header header;
    int code = sparse_header_read(fd, path, &header, why);
    if (code != VIX_OK)
        return code;
    if (header.descriptor_offset == 0 || header.descriptor_size == 0)
        return fail(why, VIX_E_DISK_INVALIDDISK, "%.160s is an extent, it has no descriptor", path);
    descriptor->offset = header.descriptor_offset * SECTOR;
    descriptor->embedded = header.descriptor_size * SECTOR;
    return VIX_OK;
}

int descriptor_read(const char *path, struct descriptor *descriptor, struct stat *status,
                    char why[VMDK_WHY]) {
    int fd;
    struct stat own;
    struct stat *seen = status != NULL ? status : &own;
    *descriptor = (struct descriptor){0};
    int code = open_regular(path, O_RDONLY, &fd, seen, why);
    if (code != VIX_OK)
        return code;
    code = locate(fd, path, descriptor, why);
    if (code == VIX_OK)
        code = read_text(fd, path, descriptor, seen, why);
    close(fd);
    if (code != VIX_OK)
        descriptor_free(descriptor);
    return code;
}

void descriptor_free(struct descriptor *descriptor) {
    for (size_t i = 0; i < descriptor->count; i++) {
        free(descriptor->lines[i].text);
        free(descriptor->lines[i].key);
        free(descriptor->lines[i].value);
    }
    for (size_t i = 0; i < descriptor->extent_count; i++)
        free(descriptor->extents[i].name);
    free(descriptor->lines);
    free(descriptor->extents);
    *descriptor = (struct descriptor){0};
}

static struct descriptor_line *find_line(const struct descriptor *descriptor, const char *key) {
    for (size_t i = 0; i < descriptor->count; i++)
        if (descriptor->lines[i].key != NULL && strcasecmp(descriptor->lines[i].key, key) == 0)
            return &descriptor->lines[i];
    return NULL;
}

const char *descriptor_value(const struct descriptor *descriptor, const char *key) {
    const struct descriptor_line *line = find_line(descriptor, key);
    return line == NULL ? NULL : line->value;
}

bool descriptor_is_thin(const struct descriptor *descriptor) {
    const char *thin = descriptor_value(descriptor, "ddb.thinProvisioned");
    return thin != NULL && strcmp(thin, "1") == 0;
}
