#include "access.h"

#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#include "../include/vixDiskLib.h"
#include "../vmdk/vmdk.h"
#include "attachments.h"

static int refuse(struct access *access, int code, const char *why)
{
    snprintf(access->why, sizeof access->why, "%s: %s", access->path, why);
    return code;
}

/* From this release on independent disks do not open. */
#define NO_INDEPENDENT_DISKS 70

/* ---- files ---- */

static bool same_file(const char *a, const char *b)
{
    struct stat first, second;
    return stat(a, &first) == 0 && stat(b, &second) == 0 && first.st_dev == second.st_dev &&
           first.st_ino == second.st_ino;
}

static bool is_disk(const struct site *site, const struct access *access, const char *path)
{
    char datastore[64], file[SITE_PATH_MAX];
    return site_file(site, path, datastore, file) && same_file(file, access->file);
}

static bool is_one_of(const struct site *site, const struct access *access, char **disks,
                      unsigned count)
{
    for (unsigned i = 0; i < count; i++)
        if (is_disk(site, access, disks[i]))
            return true;
    return false;
}

/* Whether the file is a link of the chain that ends at the disk. */
static bool is_link_of(const struct site *site, const struct access *access, const char *path)
{
    char datastore[64], file[SITE_PATH_MAX], why[VMDK_WHY];
    struct vmdk *disk;
    if (!site_file(site, path, datastore, file))
        return false;
    if (same_file(file, access->file))
        return true;
    if (vmdk_open(file, 0, &disk, why) != VIX_OK)
        return false;
    bool found = false;
    for (unsigned link = 0; link < vmdk_links(disk) && !found; link++)
        found = same_file(vmdk_link_path(disk, link), access->file);
    vmdk_close(disk);
    return found;
}

static bool is_in_chains(const struct site *site, const struct access *access, char **disks,
                         unsigned count)
{
    for (unsigned i = 0; i < count; i++)
        if (is_link_of(site, access, disks[i]))
            return true;
    return false;
}

static bool belongs_to_vm(const struct site *site, const struct access *access)
{
    const struct registry_vm *vm = access->vm;
    if (is_in_chains(site, access, vm->disks, vm->disk_count))
        return true;
    /* A snapshot that was reverted from has branches that no disk of the VM leads to. */
    for (unsigned i = 0; i < site->registry->snapshot_count; i++) {
        const struct registry_snapshot *snapshot = &site->registry->snapshots[i];
        if (strcmp(snapshot->vm, vm->moref) == 0 &&
            is_in_chains(site, access, snapshot->disks, snapshot->disk_count))
            return true;
    }
    return is_in_chains(site, access, vm->ide, vm->ide_count) ||
           is_in_chains(site, access, vm->independent, vm->independent_count);
}

/* ---- rules ---- */

static int check_path(struct site *site, struct access *access)
{
    struct stat status;
    char folder[SITE_PATH_MAX + 80];
    if (!site_file(site, access->path, access->datastore, access->file))
        return refuse(access, VIX_E_FILE_NOT_FOUND, "not of the form [DATASTORE] FOLDER/FILE");
    snprintf(folder, sizeof folder, "%s/%s", site->folder, access->datastore);
    if (stat(folder, &status) < 0 || !S_ISDIR(status.st_mode))
        return refuse(access, VIX_E_FILE_NOT_FOUND, "there is no such datastore");
    if (stat(access->file, &status) < 0 || !S_ISREG(status.st_mode))
        return refuse(access, VIX_E_FILE_NOT_FOUND, "there is no such file");
    return VIX_OK;
}

static int check_snapshot(struct site *site, struct access *access)
{
    const struct registry_snapshot *snapshot =
        registry_snapshot_by_moref(site->registry, access->snapshot);
    if (snapshot == NULL || strcmp(snapshot->vm, access->vm->moref) != 0)
        return refuse(access, VIX_E_SNAPSHOT_NOTFOUND, "the VM has no such snapshot");
    if (!is_one_of(site, access, snapshot->disks, snapshot->disk_count))
        return refuse(access, VIX_E_FILE_ACCESS_ERROR, "not a disk of this snapshot");
    if (access->writable && access->vm->powered_on)
        return refuse(access, VIX_E_FAIL, "the VM is running, its disks cannot be written");
    return VIX_OK;
}

static int check_current(struct site *site, struct access *access)
{
    const struct registry_vm *vm = access->vm;
    bool independent = is_one_of(site, access, vm->independent, vm->independent_count);
    if (independent && access->release >= NO_INDEPENDENT_DISKS)
        return refuse(access, VIX_E_FAIL, "an independent disk");
    if (vm->powered_on && access->writable)
        return refuse(access, VIX_E_FAIL, "the VM is running, its disks cannot be written");
    if (vm->powered_on && (independent || is_one_of(site, access, vm->disks, vm->disk_count) ||
                           is_one_of(site, access, vm->ide, vm->ide_count)))
        return refuse(access, VIX_E_FAIL, "the VM runs on this file");
    if (vm->powered_on)
        return refuse(access, VIX_E_FILE_ACCESS_ERROR, "the VM is running: needs a snapshot");
    if (!belongs_to_vm(site, access))
        return refuse(access, VIX_E_FILE_ACCESS_ERROR, "not a disk of this VM");
    return VIX_OK;
}

int access_check(struct site *site, struct access *access)
{
    if (access->vm == NULL) {
        snprintf(access->why, sizeof access->why, "there is no such virtual machine");
        return VIX_E_VM_NOT_FOUND;
    }
    int error = check_path(site, access);
    if (error == VIX_OK && attachments_removed(site, access->vm->moref))
        error = refuse(access, VIX_E_FILE_NOT_FOUND, "the VM has lost its disks");
    if (error == VIX_OK)
        error = access->snapshot != NULL && access->snapshot[0] != '\0'
                    ? check_snapshot(site, access)
                    : check_current(site, access);
    /* The name becomes part of an address of the form [DATASTORE] FILE@HOST:PORT. */
    if (error == VIX_OK && strchr(access->datastore, '@') != NULL)
        error = refuse(access, VIX_E_FAIL, "the address of the disk cannot be read");
    return error;
}
