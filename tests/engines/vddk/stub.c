/* A tiny library with the interface of libvixDiskLib, for the tests of the binding alone. It logs
 * what it was given, so that a test sees it; the path of a disk chooses how ReadAsync behaves.
 * -DRELEASE=802 chooses the layouts and which functions there are, -DNO_OPEN leaves one out. */
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef uint64_t Error;
typedef void LogFunc(const char *, va_list);
typedef void (*Callback)(void *, Error);

typedef struct {
    char *vmx, *server, *thumb;
    long privateUse;
    int cred;
    union {
        struct { char *user, *password; } uid;
        struct { char *cookie, *user, *key; } session;
    } creds;
    uint32_t port, nfc;
    char *api, reserved[8];
    void *state;
    char *spec[3];
    int specType;
} Params;

typedef struct {
    uint32_t bios[3], phys[3];
    uint64_t capacity;
    int adapter, links;
    char *parent, *uuid;
#if RELEASE >= 700
    uint32_t logical, physical;
#endif
} Info;

typedef struct { uint64_t offset, length; } Block;
typedef struct { uint32_t n; Block blocks[]; } Blocks;

typedef struct { const Params *params; } Connection;
typedef struct { char path[64]; Connection *connection; pthread_t thread; int threads; } Handle;

enum { CAPACITY = 1000 };

static LogFunc *say_log, *say_warn;

static void tell(LogFunc *to, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    to(format, arguments);
    va_end(arguments);
}

#define LOG(...) tell(say_log, __VA_ARGS__)
#define S(text) ((text) ? (text) : "(null)")

static void *log_elsewhere(void *data)
{
    LOG("from a thread of mine: %d %s %.2f", 42, "words", 2.5);
    return data;
}

Error VixDiskLib_InitEx(uint32_t major, uint32_t minor, LogFunc *log, LogFunc *warn, LogFunc *panic,
                        const char *libdir, const char *file)
{
    pthread_t thread;
    char *line = malloc(10001);
    say_log = log;
    say_warn = warn;
    LOG("init %u.%u libdir=%s file=%s", major, minor, libdir, S(file));
    if (major > 7)
        return 3;
    LOG("VMware VixDiskLib (%u.%u) Release build-%d", major, minor, 21562716);
    tell(warn, "VDDK_PhoneHome: %s failed\n", "sending");
    tell(warn, "a warning without arguments, 100%% sure\n");
    tell(panic, "panic %d", 1);
    memset(line, 'x', 10000);
    line[10000] = 0;
    LOG("%s", line);
    free(line);
    pthread_create(&thread, NULL, log_elsewhere, NULL);
    pthread_join(thread, NULL);
    return 0;
}

void VixDiskLib_Exit(void) { LOG("exit"); }
const char *VixDiskLib_ListTransportModes(void) { return "file:san:hotadd:nbdssl:nbd"; }

Error VixDiskLib_Cleanup(const Params *p, uint32_t *cleaned, uint32_t *remaining)
{
    LOG("cleanup vmx=%s server=%s", S(p->vmx), S(p->server));
    *cleaned = 2;
    *remaining = 1;
    return 0;
}

Error VixDiskLib_PrepareForAccess(const Params *p, const char *identity)
{
    LOG("prepare %s %s", S(p->vmx), identity);
    return 0;
}

#if RELEASE >= 670
Params *VixDiskLib_AllocateConnectParams(void)
{
    LOG("allocate %d", (int)sizeof(Params));
    return calloc(1, sizeof(Params));
}

Error VixDiskLib_FreeBlockList(Blocks *list)
{
    LOG("free blocks");
    free(list);
    return 0;
}

Error VixDiskLib_QueryAllocatedBlocks(Handle *h, uint64_t start, uint64_t n, uint64_t chunk,
                                      Blocks **list)
{
    static const Block all[] = {{512, 128}, {128, 128}, {640, 128}};
    LOG("query %d %d %d", (int)start, (int)n, (int)chunk);
    if (start % chunk || n % chunk || start + n > CAPACITY)
        return 3;
    *list = calloc(1, sizeof(Blocks) + sizeof all);
    if (!strcmp(h->path, "absurd")) {
        (*list)->n = 1000000;
        return 0;
    }
    for (int i = 0; i < 3; i++)
        if (all[i].offset >= start && all[i].offset < start + n)
            (*list)->blocks[(*list)->n++] = all[i];
    return 0;
}
#endif

void VixDiskLib_FreeConnectParams(Params *p)
{
    LOG("free params server=%s password=%s", S(p->server), S(p->creds.uid.password));
    free(p);
}

Error VixDiskLib_ConnectEx(const Params *p, char readonly, const char *snapshot, const char *modes,
                           Connection **connection)
{
    LOG("connect vmx=%s server=%s thumb=%s cred=%d port=%u nfc=%u", S(p->vmx), S(p->server),
        S(p->thumb), p->cred, p->port, p->nfc);
    if (p->cred == 1)
        LOG("uid %s %s", S(p->creds.uid.user), S(p->creds.uid.password));
    if (p->cred == 2)
        LOG("session %s %s %s", S(p->creds.session.cookie), S(p->creds.session.user),
            S(p->creds.session.key));
    LOG("with ro=%d snapshot=%s modes=%s state=%p spec=%d", readonly, S(snapshot), S(modes),
        p->state, p->specType);
    if (p->server && !strcmp(p->server, "wrong"))
        return 35 | (Error)7 << 32;
    *connection = calloc(1, sizeof(Connection));
    (*connection)->params = p;
    return 0;
}

Error VixDiskLib_Disconnect(Connection *c)
{
    LOG("disconnect %s", S(c->params->server));
    free(c);
    return 0;
}

#ifndef NO_OPEN
Error VixDiskLib_Open(Connection *c, const char *path, uint32_t flags, Handle **h)
{
    LOG("open %s flags=%u server=%s", path, flags, S(c->params->server));
    if (!strcmp(path, "none"))
        return 4;
    *h = calloc(1, sizeof(Handle));
    strncpy((*h)->path, path, 63);
    (*h)->connection = c;
    return 0;
}
#endif

Error VixDiskLib_Close(Handle *h)
{
    LOG("close %s threads=%d", h->path, h->threads);
    free(h);
    return 0;
}

Error VixDiskLib_GetInfo(Handle *h, Info **info)
{
    *info = calloc(1, sizeof(Info));
    **info = (Info){{1, 2, 3}, {4, 5, 6}, CAPACITY, 3, 2, strdup("parent.vmdk"), strdup("an uuid")};
#if RELEASE >= 700
    (*info)->logical = 512;
    (*info)->physical = 4096;
#endif
    return 0;
}

void VixDiskLib_FreeInfo(Info *info)
{
    LOG("free info of %d", (int)sizeof(Info));
    free(info->parent);
    free(info->uuid);
    free(info);
}

const char *VixDiskLib_GetTransportMode(Handle *h) { return "nbdssl"; }

static Error fill(uint64_t start, uint64_t n, uint8_t *to)
{
    if (start + n > CAPACITY)
        return 16007;
    for (uint64_t i = 0; i < n; i++)
        memset(to + i * 512, (int)(start + i), 512);
    return 0;
}

Error VixDiskLib_Read(Handle *h, uint64_t start, uint64_t n, uint8_t *to)
{
    if (!strcmp(h->path, "memory")) {
        tell(say_warn, "NfcServer: Failed to allocate the requested %d bytes", 24);
        return 1;
    }
    return fill(start, n, to);
}

Error VixDiskLib_Write(Handle *h, uint64_t start, uint64_t n, const uint8_t *from)
{
    LOG("write %d %d %x", (int)start, (int)n, from[0]);
    return 0;
}

typedef struct { Callback callback; void *data; uint64_t start, n; uint8_t *to; } Job;

static void *work(void *data)
{
    Job job = *(Job *)data;
    free(data);
    Error result = fill(job.start, job.n, job.to);
    job.callback(job.data, result);
    return NULL;
}

#ifndef NO_ASYNC
Error VixDiskLib_ReadAsync(Handle *h, uint64_t start, uint64_t n, uint8_t *to, Callback callback,
                           void *data)
{
    const char *how = h->path;
    if (!strcmp(how, "thread")) {
        Job *job = malloc(sizeof *job);
        *job = (Job){callback, data, start, n, to};
        h->threads++;
        pthread_create(&h->thread, NULL, work, job);
        return 25000;
    }
    if (!strcmp(how, "refuse"))
        return 14011 | (Error)1 << 40;
    fill(start, n, to);
    if (!strcmp(how, "zero"))
        return 0;
    callback(data, !strcmp(how, "fail") ? 14011 | (Error)1 << 40 : 0);
    if (!strcmp(how, "twice"))
        callback(data, 0);
    if (!strcmp(how, "both"))
        return 1;
    return strcmp(how, "zero and callback") ? 25000 : 0;
}

Error VixDiskLib_WriteAsync(Handle *h, uint64_t start, uint64_t n, const uint8_t *from,
                            Callback callback, void *data)
{
    callback(data, VixDiskLib_Write(h, start, n, from));
    return 25000;
}

Error VixDiskLib_Wait(Handle *h)
{
    if (h->threads)
        pthread_join(h->thread, NULL);
    h->threads = 0;
    return 0;
}

Error VixDiskLib_Flush(Handle *h)
{
    LOG("flush %s", h->path);
    return 0;
}
#endif

static Error give(const char *from, size_t n, char *to, size_t length, size_t *needed)
{
    *needed = n;
    if (length < n)
        return 24;
    memcpy(to, from, n);
    return 0;
}

Error VixDiskLib_GetMetadataKeys(Handle *h, char *to, size_t length, size_t *needed)
{
    static const char keys[] = "adapterType\0gone\0uuid\0";
    return give(keys, sizeof keys, to, length, needed);
}

Error VixDiskLib_ReadMetadata(Handle *h, const char *key, char *to, size_t length, size_t *needed)
{
    if (!strcmp(key, "gone")) {
        *needed = 99;
        return 16052;
    }
    const char *value = strcmp(key, "uuid") ? "lsilogic" : "60 00 C2 9a";
    return give(value, strlen(value) + 1, to, length, needed);
}

char *VixDiskLib_GetErrorText(Error error, const char *locale)
{
    char *text = malloc(64);
    if (error == 4)
        return free(text), NULL;
    snprintf(text, 64, "the stub's words for %d%s", (int)error, locale ? locale : "");
    return text;
}

void VixDiskLib_FreeErrorText(char *text) { free(text); }
