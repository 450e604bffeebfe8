/*
 * The advanced transports san and hotadd: this machine sees the disk's storage as block devices and
 * reads them itself, synchronously. The host is asked once, at Open, how the disk is laid out on them;
 * what somebody else allocates later is not known until the next Open.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "library.h"

#define ALIGNED(value) ((uint64_t)(value) % SECTOR == 0)

/* ---- the map ---- */

static VixError load_map(handle_t *handle, int fd, uint64_t segments)
{
    uint64_t start = 0;
    struct wire_segment *from;
    struct mapped *map;
    if (segments > SIZE_MAX / sizeof *map / 2)
        return VIX_E_HOST_TCP_SOCKET_ERROR;
    map = calloc(segments + 1, sizeof *map);
    from = segments ? mmap(NULL, segments * sizeof *from, PROT_READ, MAP_SHARED, fd, 0) : NULL;
    if (!map || from == MAP_FAILED) {
        free(map);
        return VIX_E_OUT_OF_MEMORY;
    }
    for (uint64_t i = 0; i < segments; i++) {
        map[i] = (struct mapped){start, from[i]};
        start += from[i].length;
    }
    if (from)
        munmap(from, segments * sizeof *from);
    pthread_mutex_lock(&handle->map_lock);
    free(handle->map);
    handle->map = map;
    handle->map_count = segments;
    pthread_mutex_unlock(&handle->map_lock);
    return start == handle->facts.capacity * SECTOR ? VIX_OK : VIX_E_HOST_TCP_SOCKET_ERROR;
}

static VixError renew_map(handle_t *handle)
{
    struct nfc_answer answer = {0};
    VixError error = nfc_call(handle, WIRE_MAP, 0, 0, NULL, &answer);
    if (!error) {
        struct wire_reader reader = {answer.body, answer.size, false};
        uint64_t segments = wire_take_u64(&reader);
        error = answer.fd_count == 1 && !reader.failed ? load_map(handle, answer.fds[0], segments)
                                                       : VIX_E_HOST_TCP_SOCKET_ERROR;
    }
    nfc_answer_free(&answer);
    return error;
}

/* The last entry that starts at or before `byte`. */
static size_t find(const handle_t *handle, uint64_t byte)
{
    size_t low = 0, high = handle->map_count;
    while (high - low > 1) {
        size_t middle = (low + high) / 2;
        if (handle->map[middle].start <= byte)
            low = middle;
        else
            high = middle;
    }
    return low;
}

/* ---- the devices ---- */

static bool wants_direct(const handle_t *handle, const struct settings *settings)
{
    bool unbuffered = handle->flags & VIXDISKLIB_FLAG_OPEN_UNBUFFERED;
    if (handle->transport != &transport_san || settings->san_cache == SAN_FLAG)
        return unbuffered;
    return settings->san_cache == SAN_DIRECT;
}

static VixError open_device(handle_t *handle, struct device *device, bool direct)
{
    bool writable = !(handle->flags & VIXDISKLIB_FLAG_OPEN_READ_ONLY);
    char path[700];
    device->direct = direct;
    device->read_fd = open(device->path, O_RDONLY | O_CLOEXEC | (direct ? O_DIRECT : 0));
    if (device->read_fd < 0 && direct && errno == EINVAL) {
        device->direct = false; /* a file on a file system without O_DIRECT stands for the device */
        device->read_fd = open(device->path, O_RDONLY | O_CLOEXEC);
    }
    if (device->read_fd < 0)
        return VIX_E_DISK_NODEVICE;
    if (writable)
        device->write_fd = open(device->path, O_WRONLY | O_CLOEXEC | O_DIRECT);
    events_note(handle->connection->events, "device-open", "transport=%s device=%s direct=%s path=%s",
                handle->transport->name, device->path, device->direct ? "yes" : "no",
                events_quote(handle->path, path, sizeof path));
    return VIX_OK;
}

static void *writer(void *argument);

VixError device_open(handle_t *handle, struct wire_reader *files, struct nfc_answer *answer)
{
    const struct settings *settings = settings_get(handle->connection->settings);
    bool direct = wants_direct(handle, settings);
    uint64_t count = wire_take_u64(files);
    VixError error = VIX_OK;
    handle->random = settings->seed ? settings->seed : now_ns();
    settings_release(settings);
    handle->devices = calloc(count < 4096 ? count + 1 : 0, sizeof *handle->devices);
    if (!handle->devices || count >= 4096)
        return VIX_E_OUT_OF_MEMORY;
    for (uint64_t i = 0; i < count && !error; i++) {
        const char *path = wire_take_str(files);
        struct device *device = &handle->devices[handle->device_count++];
        *device = (struct device){.read_fd = -1, .write_fd = -1};
        wire_take_u64(files); /* whether the extent is flat does not matter here */
        if (!path)
            return VIX_E_HOST_TCP_SOCKET_ERROR;
        snprintf(device->path, sizeof device->path, "%s", path);
        error = open_device(handle, device, direct);
    }
    if (error || answer->fd_count != 1)
        return error ? error : VIX_E_HOST_TCP_SOCKET_ERROR;
    error = load_map(handle, answer->fds[0], wire_take_u64(files));
    if (error)
        return error;
    pthread_cond_init(&handle->write_wanted, NULL);
    start_thread_or_die(&handle->writer, "vixsim-writer", writer, handle);
    handle->writer_running = true;
    return VIX_OK;
}

/* ---- bytes ---- */

static VixError transfer(int fd, bool writes, uint8_t *bytes, uint64_t length, uint64_t offset)
{
    uint64_t done = 0;
    while (done < length) {
        ssize_t got = writes ? pwrite(fd, bytes + done, length - done, (off_t)(offset + done))
                             : pread(fd, bytes + done, length - done, (off_t)(offset + done));
        if (got < 0)
            return errno == ENOSPC ? VIX_E_DISK_FULL : VIX_E_FILE_ERROR;
        if (got == 0 && writes)
            return VIX_E_FILE_ERROR;
        if (got == 0) {
            memset(bytes + done, 0, length - done);
            return VIX_OK;
        }
        done += (uint64_t)got;
    }
    return VIX_OK;
}

/* O_DIRECT wants memory at whole sectors: a client's buffer elsewhere is gone round. */
static VixError transfer_aligned(int fd, bool writes, uint8_t *bytes, uint64_t length, uint64_t offset)
{
    void *aligned;
    VixError error;
    if (ALIGNED((uintptr_t)bytes))
        return transfer(fd, writes, bytes, length, offset);
    if (posix_memalign(&aligned, 4096, length))
        return VIX_E_OUT_OF_MEMORY;
    if (writes)
        memcpy(aligned, bytes, length);
    error = transfer(fd, writes, aligned, length, offset);
    if (!writes && !error)
        memcpy(bytes, aligned, length);
    free(aligned);
    return error;
}

typedef VixError (*piece_done)(handle_t *handle, const struct wire_segment *segment, uint64_t within,
                               uint8_t *bytes, uint64_t length);

static VixError each_piece(const struct request *request, piece_done act)
{
    handle_t *handle = request->handle;
    uint64_t at = request->start * SECTOR, left = request->count * SECTOR;
    uint8_t *bytes = request->buffer;
    for (size_t i = find(handle, at); left && i < handle->map_count; i++) {
        uint64_t within = at - handle->map[i].start;
        uint64_t length = handle->map[i].segment.length - within;
        VixError error;
        length = length < left ? length : left;
        error = act(handle, &handle->map[i].segment, within, bytes, length);
        if (error)
            return error;
        at += length;
        bytes += length;
        left -= length;
    }
    return left ? VIX_E_DISK_OUTOFRANGE : VIX_OK;
}

static VixError read_piece(handle_t *handle, const struct wire_segment *segment, uint64_t within,
                           uint8_t *bytes, uint64_t length)
{
    struct device *device;
    if (segment->file == WIRE_HOLE) {
        memset(bytes, 0, length);
        return VIX_OK;
    }
    if (segment->file >= handle->device_count)
        return VIX_E_DISK_NODEVICE;
    device = &handle->devices[segment->file];
    return device->direct
               ? transfer_aligned(device->read_fd, false, bytes, length, segment->offset + within)
               : transfer(device->read_fd, false, bytes, length, segment->offset + within);
}

static VixError write_piece(handle_t *handle, const struct wire_segment *segment, uint64_t within,
                            uint8_t *bytes, uint64_t length)
{
    struct device *device;
    if (segment->file >= handle->device_count) /* or a hole, that the host did not fill after all */
        return VIX_E_DISK_NODEVICE;
    device = &handle->devices[segment->file];
    if (device->write_fd < 0)
        return VIX_E_FILE_READ_ONLY;
    return transfer_aligned(device->write_fd, true, bytes, length, segment->offset + within);
}

/* Is there storage of the leaf's own under all of it? */
static VixError allocated_piece(handle_t *handle, const struct wire_segment *segment, uint64_t within,
                                uint8_t *bytes, uint64_t length)
{
    (void)within;
    (void)bytes;
    (void)length;
    return segment->file == WIRE_HOLE || segment->file >= handle->device_count ||
                   segment->link + 1 != handle->facts.links
               ? VIX_E_OBJECT_NOT_FOUND
               : VIX_OK;
}

/* ---- requests ---- */

static void take_time(handle_t *handle, uint64_t latency_ns, uint64_t bytes)
{
    const struct settings *settings = settings_get(handle->connection->settings);
    const struct profile *profile = &settings->profile;
    uint64_t duration;
    pthread_mutex_lock(&handle->lock);
    duration = jittered(latency_ns, profile->net_jitter, &handle->random);
    pthread_mutex_unlock(&handle->lock);
    if (profile->device_rate)
        duration += (uint64_t)((double)bytes * 1e9 / (double)profile->device_rate);
    settings_release(settings);
    sleep_ns(duration);
}

static uint64_t latency(const handle_t *handle, bool writes)
{
    const struct settings *settings = settings_get(handle->connection->settings);
    uint64_t result = writes ? settings->profile.device_write_ns : settings->profile.device_read_ns;
    settings_release(settings);
    return result;
}

static VixError device_read(struct request *request)
{
    handle_t *handle = request->handle;
    VixError error;
    if (handle->transport == &transport_san && handle->facts.local_store)
        return VIX_E_DISK_NOIO;
    take_time(handle, latency(handle, false), request->count * SECTOR);
    pthread_mutex_lock(&handle->map_lock);
    error = each_piece(request, read_piece);
    pthread_mutex_unlock(&handle->map_lock);
    return error;
}

/* Storage must be allocated first: that is the host's to do, and it writes the bytes as it does. */
static VixError write_through_host(struct request *request)
{
    handle_t *handle = request->handle;
    struct wire_body body = {0};
    struct nfc_answer answer = {0};
    VixError error;
    wire_put_raw(&body, request->buffer, request->count * SECTOR);
    error = nfc_call(handle, WIRE_WRITE, request->start, request->count, &body, &answer);
    wire_body_free(&body);
    nfc_answer_free(&answer);
    pthread_mutex_lock(&handle->lock);
    handle->wire_bytes += request->count * SECTOR;
    pthread_mutex_unlock(&handle->lock);
    return error;
}

static VixError device_write(struct request *request)
{
    handle_t *handle = request->handle;
    bool san = handle->transport == &transport_san;
    VixError error;
    if (san && handle->facts.local_store)
        return VIX_E_DISK_NOIO;
    if (san && handle->facts.redo) {
        say(SAY_ERROR, "SAN: %s is a redo log, only base disks can be written", handle->path);
        return VIX_E_DISK_NOTSUPPORTED;
    }
    /* This thread alone changes the map: it may look at it without the lock. */
    if (each_piece(request, allocated_piece) == VIX_OK) {
        take_time(handle, latency(handle, true), request->count * SECTOR);
        return each_piece(request, write_piece);
    }
    /* The device's cached pages do not know of what the host wrote: the bytes go there once more. */
    error = write_through_host(request);
    error = error ? error : renew_map(handle);
    return error ? error : each_piece(request, write_piece);
}

/* ---- writes wait in a queue and are done one at a time ---- */

static void *writer(void *argument)
{
    handle_t *handle = argument;
    pthread_mutex_lock(&handle->lock);
    for (;;) {
        struct request *request = handle->write_first;
        if (request) {
            handle->write_first = request->queued;
            pthread_mutex_unlock(&handle->lock);
            complete(request, device_write(request));
            pthread_mutex_lock(&handle->lock);
        } else if (handle->writer_stop) {
            break;
        } else {
            pthread_cond_wait(&handle->write_wanted, &handle->lock);
        }
    }
    pthread_mutex_unlock(&handle->lock);
    return NULL;
}

static void device_submit(struct request *request)
{
    handle_t *handle = request->handle;
    if (request->op == WIRE_READ) {
        complete(request, device_read(request));
        return;
    }
    pthread_mutex_lock(&handle->lock);
    request->queued = NULL;
    if (handle->write_first)
        handle->write_last->queued = request;
    else
        handle->write_first = request;
    handle->write_last = request;
    pthread_cond_signal(&handle->write_wanted);
    pthread_mutex_unlock(&handle->lock);
}

static VixError device_flush(handle_t *handle)
{
    for (unsigned i = 0; i < handle->device_count; i++)
        if (handle->devices[i].write_fd >= 0 && fdatasync(handle->devices[i].write_fd) < 0)
            return VIX_E_FILE_ERROR;
    return net_flush(handle);
}

static void device_close(handle_t *handle)
{
    if (handle->writer_running) {
        pthread_mutex_lock(&handle->lock);
        handle->writer_stop = true;
        pthread_cond_signal(&handle->write_wanted);
        pthread_mutex_unlock(&handle->lock);
        pthread_join(handle->writer, NULL);
        pthread_cond_destroy(&handle->write_wanted);
        handle->writer_running = false;
    }
    for (unsigned i = 0; i < handle->device_count; i++) {
        if (handle->devices[i].read_fd >= 0)
            close(handle->devices[i].read_fd);
        if (handle->devices[i].write_fd >= 0)
            close(handle->devices[i].write_fd);
    }
    free(handle->devices);
    free(handle->map);
    handle->devices = NULL;
    handle->map = NULL;
    handle->device_count = 0;
    nfc_close(handle); /* only now: a hot-added disk is detached by it */
}

const struct transport transport_san = {"san", device_submit, device_flush, net_query,
                                        net_set_metadata, device_close};
const struct transport transport_hotadd = {"hotadd", device_submit, device_flush, net_query,
                                           net_set_metadata, device_close};
