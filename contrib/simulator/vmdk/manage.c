/* Disks as files: unlink, rename, attach. */
#include "internal.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* The extent's own file, unless it is the descriptor's or was named before. */
static bool has_own_file(const struct descriptor *descriptor, size_t index) {
    const char *name = descriptor->extents[index].name;
    if (name == NULL || descriptor->embedded != 0)
        return false;
    for (size_t i = 0; i < index; i++)
        if (descriptor->extents[i].name != NULL && strcmp(descriptor->extents[i].name, name) == 0)
            return false;
    return true;
}

/* A descriptor may name any file; only those beside it are taken for parts of the disk. */
static int check_names(const char *path, const struct descriptor *descriptor, char why[VMDK_WHY]) {
    for (size_t i = 0; i < descriptor->extent_count; i++)
        if (has_own_file(descriptor, i) && strchr(descriptor->extents[i].name, '/') != NULL)
            return fail(why, VIX_E_NOT_SUPPORTED, "%.100s has an extent in another folder: %.100s", path,
                        descriptor->extents[i].name);
    return VIX_OK;
}

int vmdk_unlink(const char *path, char why[VMDK_WHY]) {
    struct descriptor descriptor;
    int code = descriptor_read(path, &descriptor, NULL, why);
    if (code != VIX_OK)
        return code;
    code = check_names(path, &descriptor, why);
    for (size_t i = 0; code == VIX_OK && i < descriptor.extent_count; i++) {
        if (!has_own_file(&descriptor, i))
            continue;
        char *file = path_beside(path, descriptor.extents[i].name);
        if (file == NULL)
            code = VIX_E_OUT_OF_MEMORY;
        else if (unlink(file) != 0 && errno != ENOENT)
            code = fail_errno(why, "cannot remove", file);
        free(file);
    }
    descriptor_free(&descriptor);
    if (code == VIX_OK && unlink(path) != 0)
        code = fail_errno(why, "cannot remove", path);
    return code;
}

/* ---- rename ---- */

static char *renamed(const char *name, const char *old_stem, const char *new_stem) {
    size_t length = strlen(old_stem);
    char *new;
    if (strncmp(name, old_stem, length) != 0)
        return strdup(name);
    return asprintf(&new, "%s%s", new_stem, name + length) < 0 ? NULL : new;
}

static int move_file(const char *from, const char *to, char why[VMDK_WHY]) {
    struct stat status;
    if (lstat(to, &status) == 0)
        return fail(why, VIX_E_FILE_ALREADY_EXISTS, "%.200s exists already", to);
    return rename(from, to) == 0 ? VIX_OK : fail_errno(why, "cannot rename", from);
}

static int move_beside(const char *from, const char *name, const char *to, const char *new_name,
                       char why[VMDK_WHY]) {
    char *old = path_beside(from, name), *new = path_beside(to, new_name);
    int code = old == NULL || new == NULL ? VIX_E_OUT_OF_MEMORY : move_file(old, new, why);
    free(old);
    free(new);
    return code;
}

/* Names the extents as they are called beside `to`, and moves those that have files of their own;
 * `moved` counts the extents that are done. */
static int move_extents(const char *from, const char *to, const struct descriptor *old,
                        struct descriptor *new, size_t *moved, char why[VMDK_WHY]) {
    char *old_stem = path_stem(from), *new_stem = path_stem(to);
    int code = old_stem == NULL || new_stem == NULL ? VIX_E_OUT_OF_MEMORY : VIX_OK;
    for (; code == VIX_OK && *moved < old->extent_count; ++*moved) {
        struct descriptor_extent extent = new->extents[*moved];
        if (extent.name == NULL)
            continue;
        char *name = old->embedded ? strdup(path_name(to)) : renamed(extent.name, old_stem, new_stem);
        extent.name = name;
        code = name == NULL ? VIX_E_OUT_OF_MEMORY : descriptor_set_extent(new, *moved, &extent);
        if (code == VIX_OK && has_own_file(old, *moved))
            code = move_beside(from, old->extents[*moved].name, to, name, why);
        free(name);
        if (code != VIX_OK)
            break;
    }
    free(old_stem);
    free(new_stem);
    return code;
}

static void move_back(const char *from, const char *to, const struct descriptor *old,
                      const struct descriptor *new, size_t moved) {
    for (size_t i = 0; i < moved; i++)
        if (has_own_file(old, i))
            move_beside(to, new->extents[i].name, from, old->extents[i].name, NULL);
}

/* A hint that is relative means another file from another folder. */
static int keep_parent(const char *from, const char *to, struct descriptor *descriptor, char why[VMDK_WHY]) {
    const char *old = descriptor_value(descriptor, "parentFileNameHint");
    if (is_root_link(descriptor) || old == NULL || *old == '/')
        return VIX_OK;
    char *parent = path_beside(from, old);
    char *hint = parent == NULL ? NULL : hint_towards(to, parent);
    int code = VIX_OK;
    if (parent == NULL)
        code = VIX_E_OUT_OF_MEMORY;
    else if (hint == NULL)
        code = fail_errno(why, "cannot find the parent", parent);
    else
        code = descriptor_set_parent(descriptor, hint, descriptor->parent_cid);
    free(parent);
    free(hint);
    return code;
}

static int rename_disk(const char *from, const char *to, const struct descriptor *old,
                       struct descriptor *new, char why[VMDK_WHY]) {
    size_t moved = 0;
    int code = check_names(from, old, why);
    if (code == VIX_OK && !same_folder(from, to))
        code = keep_parent(from, to, new, why);
    if (code != VIX_OK)
        return code;
    code = move_extents(from, to, old, new, &moved, why);
    if (code == VIX_OK)
        code = move_file(from, to, why);
    if (code != VIX_OK) {
        move_back(from, to, old, new, moved);
        return code;
    }
    code = descriptor_write(to, new, why);
    if (code != VIX_OK && rename(to, from) == 0)
        move_back(from, to, old, new, moved);
    return code;
}

int vmdk_rename(const char *from, const char *to, char why[VMDK_WHY]) {
    struct descriptor old, new;
    struct stat status;
    if (strchr(path_name(to), '"') != NULL || *path_name(to) == 0)
        return fail(why, VIX_E_FILE_NAME_INVALID, "%.200s cannot be named in a descriptor", to);
    if (lstat(to, &status) == 0)
        return fail(why, VIX_E_FILE_ALREADY_EXISTS, "%.200s exists already", to);
    int code = descriptor_read(from, &old, NULL, why);
    if (code != VIX_OK)
        return code;
    code = descriptor_read(from, &new, NULL, why);
    if (code == VIX_OK) {
        code = rename_disk(from, to, &old, &new, why);
        descriptor_free(&new);
    }
    descriptor_free(&old);
    return code;
}

/* ---- attach ---- */

static bool shares_link(const struct vmdk *parent, const struct link *link) {
    for (unsigned i = 0; i < parent->count; i++)
        if (parent->links[i].device == link->device && parent->links[i].inode == link->inode)
            return true;
    return false;
}

int vmdk_attach_possible(const struct vmdk *parent, const struct vmdk *child, char why[VMDK_WHY]) {
    const struct link *leaf = leaf_of(child);
    if (child->count != 1)
        return fail(why, VIX_E_INVALID_ARG, "%.160s is opened with parents already", leaf->path);
    if (is_root_link(&leaf->descriptor))
        return fail(why, VIX_E_DISK_ATTACH_ROOTLINK, "%.160s is a base, not a delta", leaf->path);
    for (size_t i = 0; i < leaf->count; i++)
        if (leaf->extents[i].kind == EXTENT_FLAT)
            return fail(why, VIX_E_DISK_ATTACH_ROOTLINK, "%.160s is flat, not a delta", leaf->path);
    if (vmdk_capacity(parent) != vmdk_capacity(child))
        return fail(why, VIX_E_DISK_CAPACITY_MISMATCH, "%llu and %llu sectors",
                    (unsigned long long)vmdk_capacity(parent), (unsigned long long)vmdk_capacity(child));
    if (shares_link(parent, leaf))
        return fail(why, VIX_E_DISK_INVALIDCHAIN, "%.160s would be its own parent", leaf->path);
    if (parent->count >= MAX_LINKS)
        return fail(why, VIX_E_DISK_INVALIDCHAIN, "more than %u links", MAX_LINKS);
    return VIX_OK;
}

struct parent {
    const char *hint;
    uint32_t cid;
};

static int name_parent(struct descriptor *descriptor, const void *data) {
    const struct parent *parent = data;
    return descriptor_set_parent(descriptor, parent->hint, parent->cid);
}

int vmdk_attach(struct vmdk *parent, struct vmdk *child, char why[VMDK_WHY]) {
    int code = vmdk_attach_possible(parent, child, why);
    if (code != VIX_OK)
        return code;
    if (!(child->flags & VMDK_WRITABLE))
        return fail(why, VIX_E_FILE_READ_ONLY, "the child is opened read-only");
    struct descriptor now;
    code = descriptor_read(leaf_of(parent)->path, &now, NULL, why);
    if (code != VIX_OK)
        return code;
    struct parent named = {hint_towards(leaf_of(child)->path, leaf_of(parent)->path), now.cid};
    descriptor_free(&now);
    if (named.hint == NULL)
        return fail_errno(why, "cannot find", leaf_of(parent)->path);
    code = leaf_update(child, name_parent, &named, why);
    free((char *)named.hint);
    if (code == VIX_OK) {
        code = open_parents(child, why);
        child->flags &= ~VMDK_SINGLE_LINK;
    }
    return code;
}
