/*
 * A client that knows of the library only what is published: InitEx from the main thread before any
 * other thread is made, ConnectEx, Open, GetInfo and FreeInfo, many ReadAsync outstanding with
 * callbacks on threads that are not ours, Wait before Close, Flush, Disconnect, Exit.
 *
 * usage: public_client LIBDIR CONFIG SERVER USER PASSWORD VM SNAPSHOT MODES DISK [WRITE]
 *
 * The disk's bytes go to stdout; what the library says, and what was done, to stderr. With WRITE the
 * disk is opened for writing, and every 1000th sector is overwritten first.
 */
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "vixDiskLib.h"

enum { DEPTH = 16, CHUNK = 128 }; /* requests outstanding, sectors of each */

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;

struct slot {
    bool busy;
    VixError result;
    uint8_t bytes[CHUNK * VIXDISKLIB_SECTOR_SIZE];
};

static struct slot slots[DEPTH];

static void say(const char *level, const char *format, va_list arguments)
{
    pthread_mutex_lock(&lock);
    fprintf(stderr, "%s: ", level);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    pthread_mutex_unlock(&lock);
}

static void on_log(const char *format, va_list arguments)
{
    say("log", format, arguments);
}

static void on_warn(const char *format, va_list arguments)
{
    say("warn", format, arguments);
}

static void on_panic(const char *format, va_list arguments)
{
    say("panic", format, arguments);
}

static void must(VixError error, const char *what)
{
    char *text;
    if (VIX_SUCCEEDED(error))
        return;
    text = VixDiskLib_GetErrorText(error, NULL);
    fprintf(stderr, "%s: %llu: %s\n", what, (unsigned long long)VIX_ERROR_CODE(error),
            text ? text : "no text");
    VixDiskLib_FreeErrorText(text);
    exit(2);
}

/* Runs on a thread of the library's, or inside ReadAsync: it takes no lock that is held there. */
static void finished(void *data, VixError result)
{
    struct slot *slot = data;
    pthread_mutex_lock(&lock);
    slot->result = result;
    slot->busy = false;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}

static void await(struct slot *slot)
{
    pthread_mutex_lock(&lock);
    while (slot->busy)
        pthread_cond_wait(&changed, &lock);
    pthread_mutex_unlock(&lock);
    must(slot->result, "an asynchronous request");
}

static void began(VixError error, const char *what)
{
    if (VIX_ERROR_CODE(error) != VIX_ASYNC)
        must(error, what);
}

static uint64_t count_at(uint64_t start, uint64_t capacity)
{
    return capacity - start < CHUNK ? capacity - start : CHUNK;
}

static void copy_out(VixDiskLibHandle handle, uint64_t capacity)
{
    uint64_t next = 0;
    for (uint64_t at = 0; at < capacity; at += CHUNK) {
        struct slot *slot;
        for (; next < capacity && next < at + DEPTH * CHUNK; next += CHUNK) {
            slot = &slots[next / CHUNK % DEPTH];
            slot->busy = true;
            began(VixDiskLib_ReadAsync(handle, next, count_at(next, capacity), slot->bytes, finished,
                                       slot),
                  "ReadAsync");
        }
        slot = &slots[at / CHUNK % DEPTH];
        await(slot);
        fwrite(slot->bytes, VIXDISKLIB_SECTOR_SIZE, count_at(at, capacity), stdout);
    }
    must(VixDiskLib_Wait(handle), "Wait");
}

static void overwrite(VixDiskLibHandle handle, uint64_t capacity)
{
    unsigned used = 0;
    for (uint64_t at = 0; at < capacity; at += 1000) {
        struct slot *slot = &slots[used++ % DEPTH];
        await(slot);
        memset(slot->bytes, (int)('a' + at / 1000), VIXDISKLIB_SECTOR_SIZE);
        slot->busy = true;
        began(VixDiskLib_WriteAsync(handle, at, 1, slot->bytes, finished, slot), "WriteAsync");
    }
    must(VixDiskLib_Wait(handle), "Wait");
    must(VixDiskLib_Flush(handle), "Flush");
}

static VixDiskLibConnection connect_to(char **arguments, bool writes)
{
    VixDiskLibConnection connection;
    VixDiskLibConnectParams *params = VixDiskLib_AllocateConnectParams();
    char spec[256];
    snprintf(spec, sizeof spec, "moref=%s", arguments[6]);
    params->vmxSpec = spec;
    params->serverName = arguments[3];
    params->credType = VIXDISKLIB_CRED_UID;
    params->creds.uid.userName = arguments[4];
    params->creds.uid.password = arguments[5];
    params->specType = VIXDISKLIB_SPEC_VMX;
    must(VixDiskLib_ConnectEx(params, !writes, *arguments[7] ? arguments[7] : NULL, arguments[8],
                              &connection),
         "ConnectEx");
    VixDiskLib_FreeConnectParams(params);
    return connection;
}

int main(int count, char **arguments)
{
    VixDiskLibConnection connection;
    VixDiskLibHandle handle;
    VixDiskLibInfo *info;
    uint64_t capacity;
    bool writes = count == 11;
    if (count < 10)
        return 1;
    must(VixDiskLib_InitEx(7, 0, on_log, on_warn, on_panic, arguments[1], arguments[2]), "InitEx");
    connection = connect_to(arguments, writes);
    must(VixDiskLib_Open(connection, arguments[9], writes ? 0 : VIXDISKLIB_FLAG_OPEN_READ_ONLY,
                         &handle),
         "Open");
    must(VixDiskLib_GetInfo(handle, &info), "GetInfo");
    capacity = info->capacity;
    VixDiskLib_FreeInfo(info);
    fprintf(stderr, "transport %s\n", VixDiskLib_GetTransportMode(handle));
    if (writes)
        overwrite(handle, capacity);
    copy_out(handle, capacity);
    must(VixDiskLib_Close(handle), "Close");
    must(VixDiskLib_Disconnect(connection), "Disconnect");
    VixDiskLib_Exit();
    fflush(stdout);
    fprintf(stderr, "done\n");
    return 0;
}
