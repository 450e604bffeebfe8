/* What san and hotadd need, and what they fail for. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../include/vixDiskLib.h"
#include "memory.h"
#include "opening.h"

static int check_availability(struct opening *opening)
{
    const struct settings *settings = opening->settings;
    if (opening->transport == TRANSPORT_SAN && !settings->san_available)
        return opening_refuse(opening, VIX_E_NOT_SUPPORTED, "no LUN of it is seen here");
    if (opening->transport == TRANSPORT_HOTADD &&
        (!settings->hotadd_available || settings->hotadd_proxy[0] == '\0'))
        return opening_refuse(opening, VIX_E_NOT_SUPPORTED, "this is no virtual machine there");
    if (!settings->license)
        return opening_refuse(opening, VIX_E_DISK_NOLICENSE, "no license for this transport");
    return VIX_OK;
}

static const struct registry_vm *proxy_vm(const struct opening *opening)
{
    char spec[80];
    snprintf(spec, sizeof spec, "moref=%s", opening->settings->hotadd_proxy);
    return registry_vm_by_spec(opening->site->registry, spec);
}

/* A refused attachment fails the open, or is as if the transport were not to be had. */
static int refuse_hotadd(struct opening *opening, int code, const char *why)
{
    code = opening->settings->hotadd_fails ? code : VIX_E_NOT_SUPPORTED;
    return opening_refuse(opening, code, why);
}

static const struct registry_datastore *proxy_datastore(const struct opening *opening,
                                                        const struct registry_vm *proxy,
                                                        struct registry_datastore *defaults)
{
    char name[64], file[SITE_PATH_MAX];
    if (proxy->disk_count == 0 || !site_file(opening->site, proxy->disks[0], name, file))
        return NULL;
    return registry_datastore_by_name(opening->site->registry, name, defaults);
}

static int check_hotadd(struct opening *opening)
{
    struct registry_datastore defaults[2];
    const struct registry_vm *vm = opening->access.vm, *proxy = proxy_vm(opening);
    if (proxy == NULL)
        return opening_refuse(opening, VIX_E_NOT_SUPPORTED, "the proxy is not in the inventory");
    if (vm->independent_count > 0 || vm->ide_count > 0)
        return refuse_hotadd(opening, VIX_E_FAIL, "the VM has an independent or an IDE disk");
    if (attachments_count(opening->site) >= opening->settings->hotadd_slots)
        return refuse_hotadd(opening, VIX_E_FILE_ACCESS_ERROR, "the proxy has no free slot");
    const struct registry_datastore *theirs = registry_datastore_by_name(
        opening->site->registry, opening->access.datastore, &defaults[0]);
    const struct registry_datastore *ours = proxy_datastore(opening, proxy, &defaults[1]);
    if (ours != NULL && ours->block_size != theirs->block_size)
        return refuse_hotadd(opening, VIX_E_FAIL, "the datastores' block sizes differ");
    return VIX_OK;
}

static bool is_thick_type(VixDiskLibDiskType type)
{
    return type == VIXDISKLIB_DISK_VMFS_FLAT || type == VIXDISKLIB_DISK_MONOLITHIC_FLAT ||
           type == VIXDISKLIB_DISK_SPLIT_FLAT;
}

static bool is_thick(struct vmdk *disk)
{
    struct vmdk *base;
    char why[VMDK_WHY];
    if (vmdk_links(disk) == 1)
        return is_thick_type(vmdk_type(disk));
    if (vmdk_open(vmdk_link_path(disk, 0), VMDK_SINGLE_LINK, &base, why) != VIX_OK)
        return false;
    bool thick = is_thick_type(vmdk_type(base));
    vmdk_close(base);
    return thick;
}

static int check_space(struct opening *opening)
{
    struct registry_datastore defaults;
    const struct registry_vm *proxy = proxy_vm(opening);
    const struct registry_datastore *ours = proxy_datastore(opening, proxy, &defaults);
    if (ours == NULL || vmdk_capacity(opening->disk) <= ours->free / VIXDISKLIB_SECTOR_SIZE ||
        !is_thick(opening->disk))
        return VIX_OK;
    return refuse_hotadd(opening, VIX_E_DISK_FULL, "the proxy's datastore has too little space");
}

static int no_devices(struct opening *opening)
{
    if (!opening->site->devices_refused)
        fprintf(stderr, "vixsim-host: no loop devices: %s; san and hotadd are not to be had\n",
                strerror(errno));
    opening->site->devices_refused = true;
    return opening_refuse(opening, VIX_E_NOT_SUPPORTED, "loop devices cannot be made");
}

static int see_luns(struct opening *opening)
{
    if (!opening->settings->san_loop)
        return VIX_OK;
    opening->devices = memory_zeroed(vmdk_files(opening->disk), sizeof *opening->devices);
    for (unsigned i = 0; i < vmdk_files(opening->disk); i++) {
        struct device *device = device_acquire(opening->site, vmdk_file_path(opening->disk, i));
        if (device == NULL)
            return no_devices(opening);
        opening->devices[opening->device_count++] = device;
    }
    return VIX_OK;
}

static int attach(struct opening *opening)
{
    unsigned count = vmdk_files(opening->disk);
    const char **files = memory_zeroed(count, sizeof *files);
    for (unsigned i = 0; i < count; i++)
        files[i] = vmdk_file_path(opening->disk, i);
    struct attachment like = {.moref = (char *)(uintptr_t)opening->access.vm->moref,
                              .path = (char *)(uintptr_t)opening->path,
                              .tmp_directory = opening->login->tmp_directory,
                              .session = opening->session->id,
                              .pid = opening->session->peer.pid,
                              .alive = true};
    opening->attachment = attachment_make(opening->site, &like, files, count);
    free(files);
    return opening->attachment != NULL ? VIX_OK : no_devices(opening);
}

int transport_check(struct opening *opening)
{
    if (!transport_is_device(opening->transport))
        return VIX_OK;
    int error = check_availability(opening);
    if (error != VIX_OK || opening->transport != TRANSPORT_HOTADD)
        return error;
    return check_hotadd(opening);
}

int transport_begin(struct opening *opening)
{
    if (opening->transport == TRANSPORT_SAN)
        return see_luns(opening);
    if (opening->transport != TRANSPORT_HOTADD)
        return VIX_OK;
    int error = check_space(opening);
    return error == VIX_OK ? attach(opening) : error;
}
