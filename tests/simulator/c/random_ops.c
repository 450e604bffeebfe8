/*
 * Random asynchronous reads and writes, held against an array of bytes.
 *
 * usage: random_ops LIBDIR CONFIG SERVER VM MODES DISK OPERATIONS SEED      (SERVER - is none)
 *
 * A request that overlaps one that is outstanding is not started before Wait, unless both only read:
 * what such requests see is nobody's promise. Every other one runs beside up to DEPTH others.
 */
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "vixDiskLib.h"

#define SECTOR VIXDISKLIB_SECTOR_SIZE
#define CHECK(condition, ...)                                                                      \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, __VA_ARGS__);                                                          \
            fputc('\n', stderr);                                                                   \
            exit(3);                                                                               \
        }                                                                                          \
    } while (0)

enum { DEPTH = 24, LONGEST = 200 };

struct operation {
    bool used, done, writes;
    uint64_t start, count;
    VixError result;
    uint8_t *bytes;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct operation operations[DEPTH];
static VixDiskLibHandle handle;
static uint8_t *model;
static uint64_t capacity, random_state, waits, reads, writes_made;

static uint64_t chance(uint64_t below)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state % below;
}

static void say(const char *format, va_list arguments)
{
    (void)format;
    (void)arguments;
}

static void finished(void *data, VixError result)
{
    struct operation *operation = data;
    pthread_mutex_lock(&lock);
    CHECK(!operation->done, "a callback came twice");
    operation->result = result;
    operation->done = true;
    pthread_mutex_unlock(&lock);
}

/* Takes the results of what is done; returns a free place, or NULL. */
static struct operation *harvest(void)
{
    struct operation *found = NULL;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < DEPTH; i++) {
        struct operation *operation = &operations[i];
        if (operation->used && operation->done) {
            CHECK(!operation->result, "error %llu", (unsigned long long)operation->result);
            CHECK(operation->writes || !memcmp(operation->bytes, model + operation->start * SECTOR,
                                               operation->count * SECTOR),
                  "%llu sectors at %llu are not the model's", (unsigned long long)operation->count,
                  (unsigned long long)operation->start);
            free(operation->bytes);
            operation->used = false;
        }
        if (!operation->used)
            found = operation;
    }
    pthread_mutex_unlock(&lock);
    return found;
}

static void wait_for_all(void)
{
    CHECK(!VixDiskLib_Wait(handle), "Wait failed");
    for (int i = 0; i < DEPTH; i++) {
        pthread_mutex_lock(&lock);
        CHECK(!operations[i].used || operations[i].done, "outstanding after Wait");
        pthread_mutex_unlock(&lock);
    }
    harvest();
    waits++;
}

static bool in_the_way(const struct operation *wanted)
{
    for (int i = 0; i < DEPTH; i++) {
        const struct operation *other = &operations[i];
        if (other->used && (other->writes || wanted->writes) &&
            other->start < wanted->start + wanted->count &&
            wanted->start < other->start + other->count)
            return true;
    }
    return false;
}

static void begin(void)
{
    struct operation *place, wanted = {.used = true};
    VixError error;
    wanted.writes = chance(3) == 0;
    wanted.count = 1 + chance(chance(4) ? 16 : LONGEST);
    wanted.start = chance(capacity - wanted.count + 1);
    place = harvest();
    if (in_the_way(&wanted) || !place)
        wait_for_all();
    place = harvest();
    wanted.bytes = malloc(wanted.count * SECTOR);
    CHECK(place && wanted.bytes, "no place, no memory");
    if (wanted.writes) {
        for (uint64_t i = 0; i < wanted.count * SECTOR; i += sizeof(uint64_t)) {
            uint64_t word = chance(UINT64_MAX);
            memcpy(wanted.bytes + i, &word, sizeof word);
        }
        memcpy(model + wanted.start * SECTOR, wanted.bytes, wanted.count * SECTOR);
    }
    *place = wanted;
    error = (wanted.writes ? VixDiskLib_WriteAsync(handle, wanted.start, wanted.count, wanted.bytes,
                                                   finished, place)
                           : VixDiskLib_ReadAsync(handle, wanted.start, wanted.count, wanted.bytes,
                                                  finished, place));
    CHECK(VIX_ERROR_CODE(error) == VIX_ASYNC, "not accepted: %llu", (unsigned long long)error);
    *(wanted.writes ? &writes_made : &reads) += 1;
}

static VixDiskLibConnection connect_to(const char *server, const char *vm, const char *modes)
{
    VixDiskLibConnectParams params = {0};
    VixDiskLibConnection connection;
    char spec[64], name[64], user[] = "operator", password[] = "secret";
    bool remote = strcmp(server, "-") != 0;
    VixError error;
    snprintf(spec, sizeof spec, "moref=%s", vm);
    snprintf(name, sizeof name, "%s", server);
    if (remote) {
        params.vmxSpec = spec;
        params.serverName = name;
        params.credType = VIXDISKLIB_CRED_UID;
        params.creds.uid.userName = user;
        params.creds.uid.password = password;
    }
    error = VixDiskLib_ConnectEx(&params, 0, NULL, remote ? modes : NULL, &connection);
    CHECK(!error, "ConnectEx: %llu", (unsigned long long)error);
    return connection;
}

static void read_the_model(void)
{
    VixDiskLibInfo *info;
    CHECK(!VixDiskLib_GetInfo(handle, &info), "GetInfo failed");
    capacity = info->capacity;
    VixDiskLib_FreeInfo(info);
    model = malloc(capacity * SECTOR);
    CHECK(model, "no memory");
    for (uint64_t at = 0; at < capacity; at += LONGEST) {
        uint64_t count = capacity - at < LONGEST ? capacity - at : LONGEST;
        CHECK(!VixDiskLib_Read(handle, at, count, model + at * SECTOR), "Read failed");
    }
}

static void compare_all(void)
{
    uint8_t *piece = malloc(LONGEST * SECTOR);
    for (uint64_t at = 0; at < capacity; at += LONGEST) {
        uint64_t count = capacity - at < LONGEST ? capacity - at : LONGEST;
        CHECK(!VixDiskLib_Read(handle, at, count, piece), "Read failed");
        CHECK(!memcmp(piece, model + at * SECTOR, count * SECTOR), "at the end: sector %llu differs",
              (unsigned long long)at);
    }
    free(piece);
    fwrite(model, SECTOR, capacity, stdout);
    fflush(stdout);
}

int main(int count, char **arguments)
{
    VixDiskLibConnection connection;
    VixError error;
    long total;
    if (count != 9)
        return 1;
    random_state = strtoull(arguments[8], NULL, 10) * 0x9E3779B97F4A7C15u + 1;
    error = VixDiskLib_InitEx(7, 0, say, say, say, arguments[1], arguments[2]);
    CHECK(!error, "InitEx: %llu", (unsigned long long)error);
    connection = connect_to(arguments[3], arguments[4], arguments[5]);
    error = VixDiskLib_Open(connection, arguments[6], 0, &handle);
    CHECK(!error, "Open: %llu", (unsigned long long)error);
    fprintf(stderr, "transport %s\n", VixDiskLib_GetTransportMode(handle));
    read_the_model();
    total = strtol(arguments[7], NULL, 10);
    for (long i = 0; i < total; i++)
        begin();
    wait_for_all();
    CHECK(!VixDiskLib_Flush(handle), "Flush failed");
    compare_all();
    free(model);
    CHECK(!VixDiskLib_Close(handle), "Close failed");
    CHECK(!VixDiskLib_Disconnect(connection), "Disconnect failed");
    VixDiskLib_Exit();
    fprintf(stderr, "%llu reads, %llu writes, %llu waits\n", (unsigned long long)reads,
            (unsigned long long)writes_made, (unsigned long long)waits);
    return 0;
}
