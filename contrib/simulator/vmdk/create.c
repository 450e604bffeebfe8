/* New disks: a base of any form that is served, and hosted-sparse deltas. */
#include "internal.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <unistd.h>

#define GRAIN 128u           /* sectors: 64 KiB */
#define DESCRIPTOR_ROOM 20u  /* sectors of an embedded descriptor */
#define HARDWARE_VERSION 14u /* where the caller names none */

static const struct form forms[] = {
    {VIXDISKLIB_DISK_MONOLITHIC_SPARSE, "monolithicSparse", "SPARSE", NULL, false, true, false},
    {VIXDISKLIB_DISK_MONOLITHIC_FLAT, "monolithicFlat", "FLAT", "-flat", false, false, true},
    {VIXDISKLIB_DISK_SPLIT_SPARSE, "twoGbMaxExtentSparse", "SPARSE", "-s", true, true, false},
    {VIXDISKLIB_DISK_SPLIT_FLAT, "twoGbMaxExtentFlat", "FLAT", "-f", true, false, true},
    {VIXDISKLIB_DISK_VMFS_FLAT, "vmfs", "VMFS", "-flat", false, false, true},
    {VIXDISKLIB_DISK_VMFS_THIN, "vmfs", "VMFS", "-flat", false, false, false},
};

const struct form *form_of(VixDiskLibDiskType type) {
    for (size_t i = 0; i < sizeof forms / sizeof *forms; i++)
        if (forms[i].type == type)
            return &forms[i];
    return NULL;
}

char *path_stem(const char *path) {
    const char *name = path_name(path);
    size_t length = strlen(name);
    if (length > 5 && strcasecmp(name + length - 5, ".vmdk") == 0)
        length -= 5;
    return strndup(name, length);
}

char *extent_name(const char *path, const struct form *form, unsigned number) {
    char *stem = path_stem(path), *name = NULL;
    if (stem == NULL)
        return NULL;
    int length;
    if (form->suffix == NULL)
        length = asprintf(&name, "%s", path_name(path));
    else if (form->split)
        length = asprintf(&name, "%s%s%03u.vmdk", stem, form->suffix, number);
    else
        length = asprintf(&name, "%s%s.vmdk", stem, form->suffix);
    free(stem);
    return length < 0 ? NULL : name;
}

/* All that a new descriptor says. */
struct new_disk {
    const struct form *form;
    uint64_t capacity;
    const char *adapter;
    VixDiskLibGeometry geometry;
    const char *hardware_version;
    uint32_t cid, parent_cid;
    char long_id[40], uuid[60];
    const char *hint; /* NULL: a base */
};

static void format_uuid(char uuid[60]) {
    unsigned char bytes[16];
    random_bytes(bytes, sizeof bytes);
    bytes[0] = 0x60;
    bytes[1] = 0x00;
    bytes[2] = 0xc2;
    bytes[3] = 0x90 | (bytes[3] & 0x0f);
    bytes[8] = 0x80 | (bytes[8] & 0x3f);
    char *to = uuid;
    for (int i = 0; i < 16; i++)
        to += sprintf(to, i == 2 ? "%02X%s" : "%02x%s", bytes[i], i == 7 ? "-" : i == 15 ? "" : " ");
}

static void print_extents(FILE *stream, const char *path, const struct new_disk *new) {
    uint64_t most = new->form->split ? SPLIT_SECTORS : new->capacity;
    unsigned number = 0;
    for (uint64_t done = 0; done < new->capacity; done += most) {
        char *name = extent_name(path, new->form, ++number);
        fprintf(stream, "RW %llu %s \"%s\"%s\n", (unsigned long long)smaller(most, new->capacity - done),
                new->form->kind, name == NULL ? "" : name, strcmp(new->form->kind, "FLAT") ? "" : " 0");
        free(name);
    }
}

static char *new_text(const char *path, const struct new_disk *new) {
    char *text = NULL;
    size_t bytes;
    FILE *stream = open_memstream(&text, &bytes);
    if (stream == NULL)
        return NULL;
    fprintf(stream, "# Disk DescriptorFile\nversion=1\nencoding=\"UTF-8\"\nCID=%08x\nparentCID=%08x\n",
            new->cid, new->parent_cid);
    fprintf(stream, "createType=\"%s\"\n", new->form->create_type);
    if (new->hint != NULL)
        fprintf(stream, "parentFileNameHint=\"%s\"\n", new->hint);
    fprintf(stream, "\n# Extent description\n");
    print_extents(stream, path, new);
    fprintf(stream, "\n# The Disk Data Base\n#DDB\n\nddb.adapterType = \"%s\"\n", new->adapter);
    fprintf(stream, "ddb.geometry.cylinders = \"%u\"\n", new->geometry.cylinders);
    fprintf(stream, "ddb.geometry.heads = \"%u\"\n", new->geometry.heads);
    fprintf(stream, "ddb.geometry.sectors = \"%u\"\n", new->geometry.sectors);
    fprintf(stream, "ddb.longContentID = \"%s\"\n", new->long_id);
    if (new->form->type == VIXDISKLIB_DISK_VMFS_THIN)
        fprintf(stream, "ddb.thinProvisioned = \"1\"\n");
    fprintf(stream, "ddb.uuid = \"%s\"\nddb.virtualHWVersion = \"%s\"\n", new->uuid,
            new->hardware_version);
    if (fclose(stream) != 0) {
        free(text);
        return NULL;
    }
    return text;
}

static int fill_extent(int fd, const struct form *form, uint64_t sectors) {
    if (form->sparse) {
        struct sparse_header header = {
            .version = 1,
            .flags = SPARSE_REDUNDANT,
            .capacity = sectors,
            .grain = GRAIN,
            .descriptor_offset = form->suffix == NULL ? 1 : 0,
            .descriptor_size = form->suffix == NULL ? DESCRIPTOR_ROOM : 0,
            .entries = MAX_TABLE_BYTES / 4,
        };
        return sparse_format(fd, &header);
    }
    off_t bytes = (off_t)(sectors * SECTOR);
    int number = form->preallocated ? posix_fallocate(fd, 0, bytes) : 0;
    if (number == 0 && ftruncate(fd, bytes) != 0)
        number = errno;
    return number == 0 ? VIX_OK : code_of_errno(number);
}

int create_extent_file(const char *path, const struct form *form, uint64_t sectors, char why[VMDK_WHY]) {
    int fd;
    int code = create_file(path, &fd, why);
    if (code != VIX_OK)
        return code;
    code = fill_extent(fd, form, sectors);
    close(fd);
    if (code != VIX_OK) {
        unlink(path);
        fail(why, code, "cannot make %.120s %llu sectors large", path, (unsigned long long)sectors);
    }
    return code;
}

/* The extents' files; of those that were made before a failure none is left. */
static int create_extents(const char *path, const struct form *form, const struct descriptor *descriptor,
                          vmdk_progress progress, void *data, char why[VMDK_WHY]) {
    size_t made = 0;
    int code = VIX_OK;
    while (made < descriptor->extent_count && code == VIX_OK) {
        const struct descriptor_extent *extent = &descriptor->extents[made];
        char *file = path_beside(path, extent->name);
        code = file == NULL ? VIX_E_OUT_OF_MEMORY
                            : create_extent_file(file, form, extent->sectors, why);
        free(file);
        made += code == VIX_OK;
        show_progress(progress, data, made, descriptor->extent_count);
    }
    for (size_t i = 0; i < made && code != VIX_OK; i++) {
        char *file = path_beside(path, descriptor->extents[i].name);
        if (file != NULL)
            unlink(file);
        free(file);
    }
    return code;
}

static int write_new_descriptor(const char *path, const struct form *form, struct descriptor *descriptor,
                                char why[VMDK_WHY]) {
    int fd = -1;
    if (form->suffix == NULL) {
        descriptor->offset = SECTOR;
        descriptor->embedded = DESCRIPTOR_ROOM * SECTOR;
    } else {
        int code = create_file(path, &fd, why);
        if (code != VIX_OK)
            return code;
        close(fd);
    }
    int code = descriptor_write(path, descriptor, why);
    if (code != VIX_OK && fd >= 0)
        unlink(path);
    return code;
}

static int create_disk(const char *path, const struct new_disk *new, vmdk_progress progress, void *data,
                       char why[VMDK_WHY]) {
    struct descriptor descriptor = {0};
    struct stat status;
    for (const char *c = path_name(path); *c != 0; c++)
        if (*c == '"' || (unsigned char)*c < ' ')
            return fail(why, VIX_E_FILE_NAME_INVALID, "%.200s cannot be named in a descriptor", path);
    if (new->capacity == 0 || new->capacity > MAX_CAPACITY)
        return fail(why, VIX_E_INVALID_ARG, "a capacity of %llu sectors",
                    (unsigned long long)new->capacity);
    if (lstat(path, &status) == 0)
        return fail(why, VIX_E_FILE_ALREADY_EXISTS, "%.200s exists already", path);
    show_progress(progress, data, 0, 1);
    char *text = new_text(path, new);
    int code = text == NULL ? VIX_E_OUT_OF_MEMORY : descriptor_parse(text, path, &descriptor, why);
    free(text);
    if (code == VIX_OK)
        code = create_extents(path, new->form, &descriptor, progress, data, why);
    if (code == VIX_OK) {
        code = write_new_descriptor(path, new->form, &descriptor, why);
        for (size_t i = 0; code != VIX_OK && i < descriptor.extent_count; i++) {
            char *file = path_beside(path, descriptor.extents[i].name);
            if (file != NULL)
                unlink(file);
            free(file);
        }
    }
    descriptor_free(&descriptor);
    return code;
}

static const char *adapter_name(VixDiskLibAdapterType adapter) {
    switch (adapter) {
    case VIXDISKLIB_ADAPTER_IDE:
        return "ide";
    case VIXDISKLIB_ADAPTER_SCSI_BUSLOGIC:
        return "buslogic";
    case VIXDISKLIB_ADAPTER_SCSI_LSILOGIC:
        return "lsilogic";
    default:
        return NULL;
    }
}

int vmdk_create(const char *path, const struct vmdk_create *create, vmdk_progress progress, void *data,
                char why[VMDK_WHY]) {
    char version[16];
    unsigned number = create->hardware_version != 0 ? create->hardware_version : HARDWARE_VERSION;
    snprintf(version, sizeof version, "%u", number);
    struct new_disk new = {
        .form = form_of(create->type),
        .capacity = create->capacity,
        .adapter = adapter_name(create->adapter),
        .geometry = geometry_of(create->capacity, create->adapter),
        .hardware_version = version,
        .cid = random_cid(),
        .parent_cid = NO_PARENT,
    };
    if (new.form == NULL)
        return fail(why, VIX_E_NOT_SUPPORTED, "disks of type %d are not made", (int)create->type);
    if (new.adapter == NULL)
        return fail(why, VIX_E_INVALID_ARG, "there is no adapter %d", (int)create->adapter);
    uint32_t part[3];
    random_bytes(part, sizeof part);
    snprintf(new.long_id, sizeof new.long_id, "%08x%08x%08x%08x", part[0], part[1], part[2], new.cid);
    format_uuid(new.uuid);
    return create_disk(path, &new, progress, data, why);
}

char *hint_towards(const char *child, const char *parent) {
    return same_folder(child, parent) ? strdup(path_name(parent)) : realpath(parent, NULL);
}

static const char *or_else(const char *value, const char *otherwise) {
    return value != NULL ? value : otherwise;
}

int vmdk_create_child(struct vmdk *parent, const char *path, VixDiskLibDiskType type,
                      vmdk_progress progress, void *data, char why[VMDK_WHY]) {
    struct new_disk new = {.form = form_of(type), .capacity = vmdk_capacity(parent)};
    if (new.form == NULL || !new.form->sparse)
        return fail(why, VIX_E_NOT_SUPPORTED, "deltas of type %d are not made", (int)type);
    if (parent->count >= MAX_LINKS)
        return fail(why, VIX_E_DISK_INVALIDCHAIN, "more than %u links", MAX_LINKS);
    const char *parent_path = leaf_of(parent)->path;
    struct descriptor now; /* another opener may have given it a new content id */
    int code = descriptor_read(parent_path, &now, NULL, why);
    if (code != VIX_OK)
        return code;
    char *hint = hint_towards(path, parent_path);
    if (hint == NULL) {
        descriptor_free(&now);
        return fail_errno(why, "cannot find", parent_path);
    }
    /* Until it is written, its content is its parent's. */
    new.hint = hint;
    new.cid = new.parent_cid = now.cid;
    new.adapter = or_else(adapter_name((VixDiskLibAdapterType)vmdk_adapter(parent)), "lsilogic");
    new.geometry = vmdk_geometry(parent);
    char version[16];
    snprintf(version, sizeof version, "%u", HARDWARE_VERSION);
    new.hardware_version = or_else(descriptor_value(&now, "ddb.virtualHWVersion"), version);
    snprintf(new.long_id, sizeof new.long_id, "%s", or_else(descriptor_value(&now, "ddb.longContentID"), ""));
    if (strlen(new.long_id) != 32)
        snprintf(new.long_id, sizeof new.long_id, "%032x", now.cid);
    const char *uuid = descriptor_value(&now, "ddb.uuid");
    format_uuid(new.uuid);
    if (uuid != NULL)
        snprintf(new.uuid, sizeof new.uuid, "%s", uuid);
    code = create_disk(path, &new, progress, data, why);
    free(hint);
    descriptor_free(&now);
    return code;
}
