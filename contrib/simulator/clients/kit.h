/*
 * A client's way to the library: loaded at run time by its name, as every client of the real one
 * does, and used through its public interface alone.
 *
 * LD_LIBRARY_PATH has to lead to the kit's lib64/ from the start of the process.
 */
#ifndef SIMULATOR_KIT_H
#define SIMULATOR_KIT_H

/* A client serves all releases; what an older one lacks is NULL in the table below. */
#undef VIX_RELEASE
#include <stdbool.h>
#include <stddef.h>

#include "vixDiskLib.h"

#define KIT_FUNCTIONS(DO)                                                                          \
    DO(InitEx) DO(Init) DO(Exit) DO(ListTransportModes) DO(Cleanup) DO(GetErrorText)               \
    DO(FreeErrorText) DO(AllocateConnectParams) DO(GetConnectParams) DO(FreeConnectParams)         \
    DO(Connect) DO(ConnectEx) DO(Disconnect) DO(PrepareForAccess) DO(EndAccess) DO(Open)           \
    DO(Close) DO(GetInfo) DO(FreeInfo) DO(GetTransportMode) DO(Read) DO(Write) DO(ReadAsync)       \
    DO(WriteAsync) DO(Wait) DO(Flush) DO(QueryAllocatedBlocks) DO(FreeBlockList)                   \
    DO(ReadMetadata) DO(GetMetadataKeys) DO(WriteMetadata) DO(Create) DO(CreateChild) DO(Unlink)   \
    DO(Grow) DO(Shrink) DO(Defragment) DO(Rename) DO(Clone) DO(Attach) DO(IsAttachPossible)        \
    DO(SpaceNeededForClone) DO(CheckRepair)

/* The functions, without their prefix: vix.Open(...). */
struct kit {
#define KIT_POINTER(NAME) __typeof__(VixDiskLib_##NAME) *NAME;
    KIT_FUNCTIONS(KIT_POINTER)
#undef KIT_POINTER
    char file[256];   /* the library's file, symbolic links followed, without its folder */
    unsigned release; /* from that name: 65, 67, 70, 80 ...; 0 when it does not tell */
};

/* Who wants what from whom. NULL is left NULL. */
struct login {
    const char *server, *user, *password, *thumbprint;
    const char *moref; /* of the VM: `vm-16` */
    unsigned port;
};

/* False with the reason. */
bool kit_load(struct kit *kit, char *why, size_t size);

/* The names of the functions, for kit_has(). NULL past the last. */
const char *kit_function(unsigned index);
bool kit_has(const struct kit *kit, unsigned index);

/* ConnectEx with a user name and a password. */
VixError kit_connect(const struct kit *kit, const struct login *login, bool read_only,
                     const char *snapshot, const char *transports, VixDiskLibConnection *connection);

/* The first line of a file, to be freed; NULL with errno. Secrets come this way, never by argv. */
char *kit_read_secret(const char *path);

double kit_seconds(void); /* a clock that only goes on */

#endif
