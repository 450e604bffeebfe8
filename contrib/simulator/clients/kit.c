#include "kit.h"

#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>

static const struct {
    const char *name;
    size_t offset;
} functions[] = {
#define KIT_ENTRY(NAME) {#NAME, offsetof(struct kit, NAME)},
    KIT_FUNCTIONS(KIT_ENTRY)
#undef KIT_ENTRY
};

#define FUNCTIONS (sizeof functions / sizeof *functions)

const char *kit_function(unsigned index)
{
    return index < FUNCTIONS ? functions[index].name : NULL;
}

bool kit_has(const struct kit *kit, unsigned index)
{
    void *address;
    memcpy(&address, (const char *)kit + functions[index].offset, sizeof address);
    return address != NULL;
}

/* `libvixDiskLib.so.8.0.3` is 80. */
static void find_release(struct kit *kit, void *address)
{
    Dl_info info;
    char path[PATH_MAX];
    unsigned major, minor;
    if (!dladdr(address, &info) || !realpath(info.dli_fname, path))
        return;
    const char *slash = strrchr(path, '/');
    snprintf(kit->file, sizeof kit->file, "%.255s", slash ? slash + 1 : path);
    const char *number = strstr(kit->file, ".so.");
    if (number && sscanf(number, ".so.%u.%u", &major, &minor) == 2)
        kit->release = major * 10 + minor;
}

bool kit_load(struct kit *kit, char *why, size_t size)
{
    static const char *const names[] = {"libvixDiskLib.so.9", "libvixDiskLib.so.8",
                                        "libvixDiskLib.so.7", "libvixDiskLib.so.6",
                                        "libvixDiskLib.so"};
    void *library = NULL;
    *kit = (struct kit){0};
    *why = 0;
    for (size_t i = 0; !library && i < sizeof names / sizeof *names; i++)
        if (!(library = dlopen(names[i], RTLD_NOW | RTLD_LOCAL)) && !*why)
            snprintf(why, size, "%s (is the kit's lib64 in LD_LIBRARY_PATH?)", dlerror());
    if (!library)
        return false;
    for (size_t i = 0; i < FUNCTIONS; i++) {
        char name[64];
        snprintf(name, sizeof name, "VixDiskLib_%s", functions[i].name);
        void *address = dlsym(library, name);
        memcpy((char *)kit + functions[i].offset, &address, sizeof address);
        if (address && !*kit->file)
            find_release(kit, address);
    }
    if (!kit->InitEx || !kit->ConnectEx || !kit->Open || !kit->Close || !kit->Disconnect) {
        snprintf(why, size, "the library lacks the functions that every release has");
        return false;
    }
    return true;
}

VixError kit_connect(const struct kit *kit, const struct login *login, bool read_only,
                     const char *snapshot, const char *transports, VixDiskLibConnection *connection)
{
    char spec[128];
    /* Without AllocateConnectParams the library is older than the header: its struct is shorter. */
    VixDiskLibConnectParams *params =
        kit->AllocateConnectParams ? kit->AllocateConnectParams() : calloc(1, sizeof *params);
    if (!params)
        return VIX_E_OUT_OF_MEMORY;
    snprintf(spec, sizeof spec, "moref=%s", login->moref ? login->moref : "");
    params->vmxSpec = login->moref ? spec : NULL;
    params->serverName = (char *)login->server;
    params->thumbPrint = (char *)login->thumbprint;
    params->credType = VIXDISKLIB_CRED_UID;
    params->creds.uid.userName = (char *)login->user;
    params->creds.uid.password = (char *)login->password;
    params->port = login->port;
    if (kit->AllocateConnectParams)
        params->specType = VIXDISKLIB_SPEC_VMX;
    *connection = NULL;
    VixError error = kit->ConnectEx(params, read_only, snapshot, transports, connection);
    if (kit->AllocateConnectParams)
        kit->FreeConnectParams(params); /* the strings stay ours */
    else
        free(params);
    return error;
}

char *kit_read_secret(const char *path)
{
    /* A crash must not leave the secret in a core file. 1 and not 0: that holds for a handler of cores
     * behind a pipe too. */
    const struct rlimit none = {1, 1};
    setrlimit(RLIMIT_CORE, &none);
    FILE *file = fopen(path, "re");
    char *line = NULL;
    size_t room = 0;
    if (!file)
        return NULL;
    if (getline(&line, &room, file) < 0) {
        free(line);
        line = NULL;
        errno = ferror(file) ? errno : ENODATA;
    } else {
        line[strcspn(line, "\r\n")] = 0;
    }
    int error = errno;
    fclose(file);
    errno = error;
    return line;
}

double kit_seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}
