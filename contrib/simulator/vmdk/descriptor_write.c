/* Changes of the text descriptor, and its way back into the file. */
#include "internal.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <unistd.h>

static char *format_line(const char *key, const char *value) {
    static const char *const bare[] = {"version", "CID", "parentCID"};
    bool quoted = true;
    for (size_t i = 0; i < sizeof bare / sizeof *bare; i++)
        quoted = quoted && strcasecmp(key, bare[i]) != 0;
    const char *space = strncasecmp(key, "ddb.", 4) == 0 ? " " : "";
    const char *quote = quoted ? "\"" : "";
    char *text;
    return asprintf(&text, "%s%s=%s%s%s%s", key, space, space, quote, value, quote) < 0 ? NULL : text;
}

/* Behind the last line of its kind: the disk database ends the file, the other fields begin it. */
static size_t place_of_new(const struct descriptor *descriptor, const char *key) {
    bool database = strncasecmp(key, "ddb.", 4) == 0;
    for (size_t i = descriptor->count; i > 0; i--) {
        const char *other = descriptor->lines[i - 1].key;
        if (other != NULL && (strncasecmp(other, "ddb.", 4) == 0) == database)
            return i;
    }
    return database ? descriptor->count : 0;
}

int descriptor_set(struct descriptor *descriptor, const char *key, const char *value) {
    struct descriptor_line line = {format_line(key, value), strdup(key), strdup(value)};
    int code = VIX_E_OUT_OF_MEMORY;
    if (line.text == NULL || line.key == NULL || line.value == NULL)
        goto failed;
    for (size_t i = 0; i < descriptor->count; i++) {
        struct descriptor_line *old = &descriptor->lines[i];
        if (old->key == NULL || strcasecmp(old->key, key) != 0)
            continue;
        free(old->text);
        free(old->key);
        free(old->value);
        *old = line;
        return VIX_OK;
    }
    code = descriptor_insert_line(descriptor, place_of_new(descriptor, key), line);
    if (code == VIX_OK)
        return VIX_OK;
failed:
    free(line.text);
    free(line.key);
    free(line.value);
    return code;
}

int descriptor_set_cid(struct descriptor *descriptor, uint32_t cid) {
    char text[40];
    snprintf(text, sizeof text, "%08x", cid);
    int code = descriptor_set(descriptor, "CID", text);
    descriptor->cid = cid;
    /* The long id ends with the short one, wherever there is a long one. */
    if (code == VIX_OK && descriptor_value(descriptor, "ddb.longContentID") != NULL) {
        uint32_t part[3];
        random_bytes(part, sizeof part);
        snprintf(text, sizeof text, "%08x%08x%08x%08x", part[0], part[1], part[2], cid);
        code = descriptor_set(descriptor, "ddb.longContentID", text);
    }
    return code;
}

int descriptor_set_parent(struct descriptor *descriptor, const char *hint, uint32_t cid) {
    char text[16];
    snprintf(text, sizeof text, "%08x", cid);
    int code = descriptor_set(descriptor, "parentCID", text);
    if (code == VIX_OK)
        code = descriptor_set(descriptor, "parentFileNameHint", hint);
    descriptor->parent_cid = cid;
    return code;
}

static char *format_extent(const struct descriptor_extent *extent) {
    const char *access = extent->writable ? "RW" : "RDONLY";
    unsigned long long sectors = extent->sectors, offset = extent->offset;
    char *text;
    int length;
    if (extent->name == NULL)
        length = asprintf(&text, "%s %llu %s", access, sectors, extent->kind);
    else if (strcasecmp(extent->kind, "FLAT") == 0 || offset != 0)
        length = asprintf(&text, "%s %llu %s \"%s\" %llu", access, sectors, extent->kind, extent->name,
                          offset);
    else
        length = asprintf(&text, "%s %llu %s \"%s\"", access, sectors, extent->kind, extent->name);
    return length < 0 ? NULL : text;
}

int descriptor_set_extent(struct descriptor *descriptor, size_t index,
                          const struct descriptor_extent *extent) {
    struct descriptor_extent copy = *extent;
    char *text = format_extent(extent);
    copy.name = extent->name == NULL ? NULL : strdup(extent->name);
    int code = VIX_E_OUT_OF_MEMORY;
    if (text == NULL || (extent->name != NULL && copy.name == NULL))
        goto failed;
    if (index < descriptor->extent_count) {
        struct descriptor_extent *old = &descriptor->extents[index];
        copy.line = old->line;
        free(descriptor->lines[copy.line].text);
        descriptor->lines[copy.line].text = text;
        free(old->name);
        *old = copy;
        return VIX_OK;
    }
    copy.line = descriptor->extents[descriptor->extent_count - 1].line + 1;
    code = descriptor_insert_line(descriptor, copy.line, (struct descriptor_line){.text = text});
    if (code != VIX_OK)
        goto failed;
    text = NULL; /* it is the line's now */
    code = descriptor_add_extent(descriptor, copy);
    if (code == VIX_OK)
        return VIX_OK;
failed:
    free(text);
    free(copy.name);
    return code;
}

char *descriptor_text(const struct descriptor *descriptor, size_t *bytes) {
    char *text = NULL;
    FILE *stream = open_memstream(&text, bytes);
    if (stream == NULL)
        return NULL;
    for (size_t i = 0; i < descriptor->count; i++)
        fprintf(stream, "%s\n", descriptor->lines[i].text);
    if (fclose(stream) != 0) {
        free(text);
        return NULL;
    }
    return text;
}

static int write_embedded(const char *path, const struct descriptor *descriptor, const char *text,
                          size_t bytes, char why[VMDK_WHY]) {
    if (bytes > descriptor->embedded)
        return fail(why, VIX_E_BUFFER_TOOSMALL, "%.160s has no room for a descriptor of %zu bytes", path,
                    bytes);
    char *padded = calloc(1, descriptor->embedded);
    if (padded == NULL)
        return VIX_E_OUT_OF_MEMORY;
    memcpy(padded, text, bytes);
    int fd;
    struct stat status;
    int code = open_regular(path, O_RDWR, &fd, &status, why);
    if (code == VIX_OK) {
        code = write_at(fd, padded, descriptor->embedded, descriptor->offset);
        if (code != VIX_OK)
            fail(why, code, "cannot write the descriptor of %.160s", path);
        close(fd);
    }
    free(padded);
    return code;
}

/* Anew and then renamed, so that who opens the disk meanwhile never sees half of it. */
static int write_apart(const char *path, const char *text, size_t bytes, char why[VMDK_WHY]) {
    char *real = realpath(path, NULL), *temporary = NULL;
    struct stat status;
    if (real == NULL || stat(real, &status) != 0) {
        free(real);
        return fail_errno(why, "cannot find", path);
    }
    if (access(real, W_OK) != 0 || asprintf(&temporary, "%s.XXXXXX", real) < 0) {
        free(real);
        return fail_errno(why, "cannot write", path);
    }
    int code = VIX_OK;
    int fd = mkostemp(temporary, O_CLOEXEC);
    if (fd < 0)
        code = fail_errno(why, "cannot write beside", path);
    else {
        code = write_at(fd, text, bytes, 0);
        if (code != VIX_OK)
            fail(why, code, "cannot write the descriptor %.160s", path);
        else if (fchmod(fd, status.st_mode & 07777) != 0 || rename(temporary, real) != 0)
            code = fail_errno(why, "cannot replace", path);
        if (code != VIX_OK)
            unlink(temporary);
        close(fd);
    }
    free(temporary);
    free(real);
    return code;
}

int descriptor_write(const char *path, const struct descriptor *descriptor, char why[VMDK_WHY]) {
    size_t bytes;
    char *text = descriptor_text(descriptor, &bytes);
    if (text == NULL)
        return VIX_E_OUT_OF_MEMORY;
    int code = descriptor->embedded != 0 ? write_embedded(path, descriptor, text, bytes, why)
                                         : write_apart(path, text, bytes, why);
    free(text);
    return code;
}
