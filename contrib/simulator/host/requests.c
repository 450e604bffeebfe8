/* What is asked of an open disk. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "../include/vixDiskLib.h"
#include "memory.h"
#include "session.h"

#define SECTOR_BYTES UINT64_C(512)
#define NFC_HEADER_BYTES 24 /* what a request takes of the host's memory beside its bytes */
#define SEGMENTS_AT_ONCE 128
#define READ_SECTORS_MAX (UINT64_C(1) << 21) /* 1 GiB, so that one answer stays small */
#define RANGES_AT_FIRST 4096

/* What vmdk.h says of a disk goes out as wire.h says it. */
_Static_assert(sizeof(struct vmdk_segment) == sizeof(struct wire_segment) &&
                   offsetof(struct vmdk_segment, offset) == offsetof(struct wire_segment, offset) &&
                   offsetof(struct vmdk_segment, length) == offsetof(struct wire_segment, length) &&
                   VMDK_HOLE == WIRE_HOLE,
               "segments are laid out alike");

static bool is_inside(const struct session *session, uint64_t start, uint64_t count)
{
    uint64_t capacity = vmdk_capacity(session->disk);
    return start <= capacity && count <= capacity - start;
}

/* ---- reading ---- */

typedef bool (*segments_taker)(void *target, const struct vmdk_segment *segments, size_t count);

static int each_segments(struct vmdk *disk, uint64_t start, uint64_t count, segments_taker take,
                         void *target)
{
    struct vmdk_segment segments[SEGMENTS_AT_ONCE];
    while (count > 0) {
        size_t used = 0;
        uint64_t covered = 0;
        int error =
            vmdk_resolve(disk, start, count, segments, SEGMENTS_AT_ONCE, &used, &covered);
        if (error != VIX_OK)
            return error;
        if (covered == 0 || covered > count)
            return VIX_E_DISK_INVALIDDISK;
        if (!take(target, segments, used))
            return VIX_E_OUT_OF_MEMORY;
        start += covered;
        count -= covered;
    }
    return VIX_OK;
}

static bool put_segments(void *target, const struct vmdk_segment *segments, size_t count)
{
    struct wire_body *body = target;
    wire_put_raw(body, segments, count * sizeof *segments);
    return !body->failed;
}

static void read_arrived(struct request *request)
{
    struct session *session = request->session;
    uint64_t start = request->head.start, count = request->head.count;
    struct wire_body body = {0};
    int error = each_segments(session->disk, start, count, put_segments, &body);
    if (error == VIX_OK) {
        session->reads++;
        session->read_bytes += count * SECTOR_BYTES;
        request_done(request, body.bytes, body.used);
    } else {
        request_refuse(request, (uint32_t)error, "the disk's tables cannot be read");
    }
    wire_body_free(&body);
}

/* The usual small read where nothing takes time: no allocation, straight into the answer. */
static bool read_at_once(struct session *session, const struct wire_request *head)
{
    struct vmdk_segment segments[SEGMENTS_AT_ONCE];
    size_t used = 0;
    uint64_t covered = 0;
    if (!channel_is_instant(&session->channel) ||
        vmdk_resolve(session->disk, head->start, head->count, segments, SEGMENTS_AT_ONCE, &used,
                     &covered) != VIX_OK ||
        covered != head->count)
        return false;
    session->reads++;
    session->read_bytes += head->count * SECTOR_BYTES;
    peer_reply(&session->peer, head, VIX_OK, segments, used * sizeof *segments);
    return true;
}

/* ---- writing ---- */

static void write_lands(struct request *request)
{
    struct session *session = request->session;
    uint64_t count = request->head.count;
    int error = vmdk_write(session->disk, request->head.start, count, request->body);
    if (error != VIX_OK) {
        request_refuse(request, (uint32_t)error, "the write failed");
        return;
    }
    session->writes++;
    session->written_bytes += count * SECTOR_BYTES;
    request_done(request, NULL, 0);
}

/* ---- the host's memory ---- */

static bool memory_taken(struct session *session, const struct settings *settings, uint64_t bytes)
{
    return settings->memory_limit > 0 && !session_is_device(session) &&
           bytes + session->host->memory_bytes > settings->memory_limit;
}

static void refuse_memory(struct session *session, const struct wire_request *head, uint64_t bytes)
{
    char why[80];
    snprintf(why, sizeof why, "Failed to allocate the requested %llu bytes",
             (unsigned long long)bytes);
    events_note(session->site->events, "memory-refused",
                "session=%llu host=%s bytes=%llu taken=%llu", (unsigned long long)session->id,
                session->host->name, (unsigned long long)bytes,
                (unsigned long long)session->host->memory_bytes);
    peer_refuse(&session->peer, head, VIX_E_OUT_OF_MEMORY, why);
}

static void transfer(struct session *session, const struct wire_request *head, char *body,
                     void (*perform)(struct request *))
{
    struct request *request = request_new(session, head, body);
    uint64_t bytes = head->count * SECTOR_BYTES;
    request->memory_bytes = bytes + NFC_HEADER_BYTES;
    session->host->memory_bytes += request->memory_bytes;
    request_transfer(request, bytes, perform);
}

static int check_range(const struct session *session, const struct wire_request *head)
{
    if (head->count == 0)
        return VIX_E_INVALID_ARG;
    if (!is_inside(session, head->start, head->count))
        return VIX_E_DISK_OUTOFRANGE;
    return head->count > READ_SECTORS_MAX ? VIX_E_INVALID_ARG : VIX_OK;
}

static void read_disk(struct session *session, const struct settings *settings,
                      const struct wire_request *head, char *body)
{
    int error = session_is_device(session) ? VIX_E_NOT_SUPPORTED : check_range(session, head);
    uint64_t bytes = head->count * SECTOR_BYTES + NFC_HEADER_BYTES;
    free(body);
    if (error != VIX_OK) {
        peer_refuse(&session->peer, head, (uint32_t)error, "not a read that is served here");
    } else if (memory_taken(session, settings, bytes)) {
        refuse_memory(session, head, bytes);
    } else if (!read_at_once(session, head)) {
        struct wire_request empty = *head;
        empty.body = 0;
        transfer(session, &empty, NULL, read_arrived);
    }
}

static void write_disk(struct session *session, const struct settings *settings,
                       const struct wire_request *head, char *body)
{
    int error = check_range(session, head);
    uint64_t bytes = head->count * SECTOR_BYTES + NFC_HEADER_BYTES;
    if (error == VIX_OK && head->count * SECTOR_BYTES != head->body)
        error = VIX_E_INVALID_ARG;
    if (error == VIX_OK && !session->writable)
        error = VIX_E_FILE_READ_ONLY;
    if (error == VIX_OK && !memory_taken(session, settings, bytes)) {
        transfer(session, head, body, write_lands);
        return;
    }
    free(body);
    if (error != VIX_OK)
        peer_refuse(&session->peer, head, (uint32_t)error, "not a write that is taken here");
    else
        refuse_memory(session, head, bytes);
}

/* ---- other requests ---- */

static void flush_now(struct request *request)
{
    int error = vmdk_flush(request->session->disk);
    if (error == VIX_OK)
        request_done(request, NULL, 0);
    else
        request_refuse(request, (uint32_t)error, "the disk cannot be flushed");
}

static void set_metadata_now(struct request *request)
{
    struct session *session = request->session;
    struct wire_reader reader = {.bytes = request->body, .left = request->head.body};
    const char *key = wire_take_str(&reader), *value = wire_take_str(&reader);
    char why[VMDK_WHY] = "not a key and a value, or a disk that is not open for writing";
    int error = VIX_E_INVALID_ARG;
    if (!session->writable)
        error = VIX_E_FILE_READ_ONLY;
    else if (!reader.failed && key != NULL && value != NULL)
        error = vmdk_set_metadata(session->disk, key, value, why);
    if (error == VIX_OK)
        request_done(request, NULL, 0);
    else
        request_refuse(request, (uint32_t)error, why);
}

static uint64_t round_trip_ns(const struct session *session, const struct settings *settings)
{
    return session_is_device(session) ? 0
                                      : timing_latency(settings->profile.net_latency_ns,
                                                       settings->profile.net_jitter,
                                                       &session->site->random);
}

/* ---- what is allocated ---- */

static bool query_fits(const struct session *session, uint64_t start, uint64_t count,
                       uint64_t chunk)
{
    return chunk >= VIXDISKLIB_MIN_CHUNK_SIZE && chunk <= VIXDISKLIB_MAX_CHUNK_SIZE &&
           (chunk & (chunk - 1)) == 0 && count > 0 && start % chunk == 0 && count % chunk == 0 &&
           count <= chunk * VIXDISKLIB_MAX_CHUNK_NUMBER && is_inside(session, start, count);
}

static uint64_t chunk_of(const struct request *request)
{
    struct wire_reader reader = {.bytes = request->body, .left = request->head.body};
    return wire_take_u64(&reader);
}

static int allocated(struct request *request, struct vmdk_range **ranges, size_t *used)
{
    uint64_t chunk = chunk_of(request), start = request->head.start, count = request->head.count;
    size_t most = count / chunk / 2 + 1; /* every other chunk */
    size_t room = most < RANGES_AT_FIRST ? most : RANGES_AT_FIRST;
    int error;
    do {
        *ranges = memory_resized(*ranges, room, sizeof **ranges);
        error = vmdk_allocated(request->session->disk, start, count, chunk, *ranges, room, used);
    } while (error == VIX_E_OUT_OF_MEMORY && room < most && (room = most) > 0);
    return error;
}

static void query_now(struct request *request)
{
    struct vmdk_range *ranges = NULL;
    struct wire_body body = {0};
    size_t used = 0;
    int error = allocated(request, &ranges, &used);
    for (size_t i = 0; error == VIX_OK && i < used; i++) {
        struct wire_segment segment = {.offset = ranges[i].start, .length = ranges[i].count};
        wire_put_raw(&body, &segment, sizeof segment);
    }
    free(ranges);
    if (error == VIX_OK && !body.failed)
        request_done(request, body.bytes, body.used);
    else
        request_refuse(request, (uint32_t)(error != VIX_OK ? error : VIX_E_OUT_OF_MEMORY),
                       "the disk's tables cannot be read");
    wire_body_free(&body);
}

static void query_disk(struct request *request, const struct settings *settings)
{
    const struct wire_request *head = &request->head;
    uint64_t chunk = chunk_of(request);
    if (!query_fits(request->session, head->start, head->count, chunk)) {
        request_refuse(request, VIX_E_INVALID_ARG, "not whole chunks of this disk");
        return;
    }
    request_delay(request,
                  settings->profile.query_call_ns +
                      head->count / chunk * settings->profile.query_chunk_ns,
                  query_now);
}

/* ---- the map of a disk that is seen as a device ---- */

struct map_file {
    FILE *file;
    uint64_t segments;
};

static bool map_segments(void *target, const struct vmdk_segment *segments, size_t count)
{
    struct map_file *map = target;
    map->segments += count;
    return fwrite(segments, sizeof *segments, count, map->file) == count;
}

int map_disk(struct session *session, int *fd, uint64_t *segments)
{
    struct map_file map = {0};
    for (unsigned i = 0; i < session->device_count; i++)
        device_refresh(session->devices[i]);
    if (session->attachment != NULL)
        attachment_refresh(session->attachment);
    *fd = memfd_create("vixsim-map", MFD_CLOEXEC);
    int copy = *fd >= 0 ? dup(*fd) : -1;
    map.file = copy >= 0 ? fdopen(copy, "w") : NULL;
    int error = VIX_E_OUT_OF_MEMORY;
    if (map.file != NULL)
        error = each_segments(session->disk, 0, vmdk_capacity(session->disk), map_segments, &map);
    else if (copy >= 0)
        close(copy);
    if (map.file != NULL && fclose(map.file) != 0 && error == VIX_OK)
        error = VIX_E_OUT_OF_MEMORY;
    if (error != VIX_OK && *fd >= 0)
        close(*fd);
    *segments = map.segments;
    return error;
}

static void send_map(struct request *request)
{
    struct wire_body body = {0};
    uint64_t segments;
    int fd, error = map_disk(request->session, &fd, &segments);
    if (error != VIX_OK) {
        request_refuse(request, (uint32_t)error, "the disk cannot be mapped");
        return;
    }
    wire_put_u64(&body, segments);
    peer_reply_with(&request->session->peer, &request->head, &body, &fd, 1);
    wire_body_free(&body);
    request_end(request);
}

/* ---- all of them ---- */

static bool host_allows(struct session *session, const struct settings *settings,
                        const struct wire_request *head)
{
    int state = site_host_state(settings, session->host->name);
    if (state == HOST_LOST) {
        session_break(session, END_HOST_LOST);
        return false;
    }
    if (state == HOST_SHUTDOWN) {
        peer_refuse(&session->peer, head, VIX_E_HOST_SERVER_SHUTDOWN, "the host is shutting down");
        return false;
    }
    return true;
}

static void other_request(struct session *session, const struct settings *settings,
                          const struct wire_request *head, char *body)
{
    struct request *request = request_new(session, head, body);
    switch (head->op) {
    case WIRE_FLUSH:
        request_delay(request, round_trip_ns(session, settings), flush_now);
        break;
    case WIRE_METADATA:
        request_delay(request, round_trip_ns(session, settings), set_metadata_now);
        break;
    case WIRE_QUERY:
        query_disk(request, settings);
        break;
    case WIRE_MAP:
        request_delay(request, 0, send_map);
        break;
    default:
        request_refuse(request, VIX_E_NOT_SUPPORTED, "a session has no such operation");
    }
}

void disk_request(struct session *session, const struct wire_request *head, char *body)
{
    const struct settings *settings = site_settings(session->site);
    if (!session->open) {
        peer_refuse(&session->peer, head, VIX_E_INVALID_HANDLE, "no disk is open");
        free(body);
        return;
    }
    if (!host_allows(session, settings, head)) {
        free(body);
        return;
    }
    session_use_rates(session, settings);
    if (head->op == WIRE_READ)
        read_disk(session, settings, head, body);
    else if (head->op == WIRE_WRITE)
        write_disk(session, settings, head, body);
    else
        other_request(session, settings, head, body);
}
