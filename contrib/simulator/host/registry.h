/*
 * SITE/registry.conf: which virtual machines, snapshots, hosts and datastores a site has.
 *
 *     [host esx1]
 *     datastores = ds1, ds2          those it can reach; each is the folder SITE/NAME
 *
 *     [datastore ds1]                this section may be missing: vmfs, 1 MiB, plenty of space
 *     kind = vmfs                    vmfs, nfs, vsan or local (local and vsan: no SAN)
 *     block_size = 1048576           bytes
 *     free = 107374182400            bytes
 *
 *     [vm vm-16]                     the moref
 *     name = web01
 *     host = esx1
 *     power = off                    on or off
 *     vmx = [ds1] web01/web01.vmx    may be missing
 *     disk = [ds1] web01/web01-000001.vmdk      the leaf it runs on; repeated
 *     independent = [ds1] web01/scratch.vmdk    a disk in an independent mode; repeated
 *     ide = [ds1] web01/old.vmdk                a disk at an IDE controller; repeated
 *
 *     [snapshot snapshot-12]
 *     vm = vm-16
 *     disk = [ds1] web01/web01.vmdk             what the snapshot holds; repeated
 *
 * The file is read again when it changed, whenever a login or an open asks for it. A datastore's
 * path is `[NAME] folder/file.vmdk`; it must not lead out of the datastore's folder.
 */
#ifndef SIMULATOR_REGISTRY_H
#define SIMULATOR_REGISTRY_H

#include <stdbool.h>
#include <stdint.h>

struct registry_host {
    char name[64];
    char **datastores;
    unsigned datastore_count;
};

struct registry_datastore {
    char name[64];
    enum { STORE_VMFS, STORE_NFS, STORE_VSAN, STORE_LOCAL } kind;
    uint64_t block_size, free;
};

struct registry_vm {
    char moref[64], name[128], host[64], vmx[512];
    bool powered_on;
    char **disks, **independent, **ide;
    unsigned disk_count, independent_count, ide_count;
};

struct registry_snapshot {
    char moref[64], vm[64];
    char **disks;
    unsigned disk_count;
};

struct registry {
    struct registry_host *hosts;
    struct registry_datastore *datastores;
    struct registry_vm *vms;
    struct registry_snapshot *snapshots;
    unsigned host_count, datastore_count, vm_count, snapshot_count;
};

/* Parses `text`; NULL with a line in `why`. registry_free(NULL) is fine. */
struct registry *registry_parse(const char *text, char *why, unsigned size);
void registry_free(struct registry *registry);

/* NULL when there is none. A vmxSpec is `moref=vm-16` or `folder/file.vmx?dcPath=..&dsName=..`. */
const struct registry_vm *registry_vm_by_spec(const struct registry *registry, const char *vmx_spec);
const struct registry_snapshot *registry_snapshot_by_moref(const struct registry *registry,
                                                           const char *moref);
const struct registry_host *registry_host_by_name(const struct registry *registry, const char *name);
/* Never NULL: a datastore without a section has the values by default, in `defaults`. */
const struct registry_datastore *registry_datastore_by_name(const struct registry *registry,
                                                            const char *name,
                                                            struct registry_datastore *defaults);

/* Splits `[ds1] web01/web01.vmdk`; false when it is not of that form or leads out of the store. */
bool registry_split_path(const char *path, char *datastore, unsigned datastore_size, char *file,
                         unsigned file_size);

#endif
