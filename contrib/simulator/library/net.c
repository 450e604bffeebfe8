/* The network transports nbd and nbdssl, and what san and hotadd also ask of the host. */
#include <stdlib.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "library.h"

/* ---- reads and writes ---- */

/* A file that ends before its extent does reads as zeros there. */
static VixError copy_segment(const handle_t *handle, const struct wire_segment *segment, uint8_t *to)
{
    uint64_t done = 0;
    if (segment->file == WIRE_HOLE) {
        memset(to, 0, segment->length);
        return VIX_OK;
    }
    if (segment->file >= handle->fd_count)
        return VIX_E_HOST_TCP_SOCKET_ERROR;
    while (done < segment->length) {
        ssize_t got = pread(handle->fds[segment->file], to + done, segment->length - done,
                            (off_t)(segment->offset + done));
        if (got < 0)
            return VIX_E_FILE_ERROR;
        if (got == 0) {
            memset(to + done, 0, segment->length - done);
            break;
        }
        done += (uint64_t)got;
    }
    return VIX_OK;
}

static VixError copy_segments(const struct request *request, const char *body, size_t size)
{
    uint64_t done = 0, wanted = request->count * SECTOR;
    struct wire_segment segment;
    for (; size >= sizeof segment; body += sizeof segment, size -= sizeof segment) {
        VixError error;
        memcpy(&segment, body, sizeof segment);
        if (segment.length > wanted - done)
            return VIX_E_HOST_TCP_SOCKET_ERROR;
        error = copy_segment(request->handle, &segment, request->buffer + done);
        if (error)
            return error;
        done += segment.length;
    }
    return done == wanted ? VIX_OK : VIX_E_HOST_TCP_SOCKET_ERROR;
}

static void read_arrived(struct request *request, VixError error, char *body, size_t size, int *fds,
                         unsigned fd_count)
{
    (void)fds;
    (void)fd_count;
    complete(request, error ? error : copy_segments(request, body, size));
}

static void write_landed(struct request *request, VixError error, char *body, size_t size, int *fds,
                         unsigned fd_count)
{
    (void)body;
    (void)size;
    (void)fds;
    (void)fd_count;
    complete(request, error);
}

static void net_submit(struct request *request)
{
    bool writes = request->op == WIRE_WRITE;
    pthread_mutex_lock(&request->handle->lock);
    request->handle->wire_bytes += request->count * SECTOR;
    pthread_mutex_unlock(&request->handle->lock);
    request->done = writes ? write_landed : read_arrived;
    nfc_submit(request, writes ? request->buffer : NULL, writes ? request->count * SECTOR : 0);
}

/* ---- what is asked of the host ---- */

VixError net_flush(handle_t *handle)
{
    struct nfc_answer answer = {0};
    VixError error = nfc_call(handle, WIRE_FLUSH, 0, 0, NULL, &answer);
    nfc_answer_free(&answer);
    return error;
}

VixError net_query(handle_t *handle, uint64_t start, uint64_t count, uint64_t chunk,
                   struct vmdk_range **ranges, size_t *used)
{
    struct nfc_answer answer = {0};
    struct wire_body body = {0};
    struct wire_segment segment;
    VixError error;
    wire_put_u64(&body, chunk);
    error = nfc_call(handle, WIRE_QUERY, start, count, &body, &answer);
    wire_body_free(&body);
    *used = answer.size / sizeof segment;
    *ranges = error ? NULL : calloc(*used + 1, sizeof **ranges);
    if (!error && !*ranges)
        error = VIX_E_OUT_OF_MEMORY;
    for (size_t i = 0; !error && i < *used; i++) {
        memcpy(&segment, answer.body + i * sizeof segment, sizeof segment);
        (*ranges)[i] = (struct vmdk_range){segment.offset, segment.length};
    }
    nfc_answer_free(&answer);
    return error;
}

VixError net_set_metadata(handle_t *handle, const char *key, const char *value)
{
    struct nfc_answer answer = {0};
    struct wire_body body = {0};
    VixError error;
    wire_put_str(&body, key);
    wire_put_str(&body, value);
    error = nfc_call(handle, WIRE_METADATA, 0, 0, &body, &answer);
    wire_body_free(&body);
    nfc_answer_free(&answer);
    return error;
}

/* ---- opening ---- */

static void put_open(struct wire_body *body, const handle_t *handle, const char *transport)
{
    const struct VixDiskLibConnectionStruct *connection = handle->connection;
    wire_put_u64(body, connection->session);
    wire_put_str(body, handle->path);
    wire_put_u64(body, handle->flags);
    wire_put_str(body, transport);
    wire_put_str(body, connection->params.thumbPrint);
    wire_put_u64(body, connection->params.nfcHostPort ? connection->params.nfcHostPort : 902);
    wire_put_u64(body, library.config.buffer_bytes);
    wire_put_u64(body, library.config.buffers);
}

static VixError take_open(handle_t *handle, struct nfc_answer *answer)
{
    struct wire_reader reader = {answer->body, answer->size, false};
    VixError error = facts_take(&handle->facts, &reader);
    if (error)
        return error;
    if (handle->transport == &transport_san || handle->transport == &transport_hotadd)
        return device_open(handle, &reader, answer);
    handle->fds = answer->fds; /* they are the handle's from here on */
    handle->fd_count = answer->fd_count;
    answer->fds = NULL;
    answer->fd_count = 0;
    return VIX_OK;
}

VixError net_open(handle_t *handle, const struct transport *transport)
{
    struct nfc_answer answer = {0};
    struct wire_body body = {0};
    VixError error = nfc_open(handle);
    if (error)
        return error;
    handle->transport = transport;
    say(SAY_INFO, "VixDiskLib: opening file %s (vpxa-nfc://%s@%s:%u)", handle->path, handle->path,
        handle->connection->params.serverName,
        handle->connection->params.nfcHostPort ? handle->connection->params.nfcHostPort : 902);
    put_open(&body, handle, transport->name);
    error = nfc_call(handle, WIRE_OPEN, 0, 0, &body, &answer);
    wire_body_free(&body);
    if (!error)
        error = take_open(handle, &answer);
    nfc_answer_free(&answer);
    if (error) {
        transport->close(handle);
        facts_clear(&handle->facts);
    }
    return error;
}

static void net_close(handle_t *handle)
{
    nfc_close(handle);
    for (unsigned i = 0; i < handle->fd_count; i++)
        close(handle->fds[i]);
    free(handle->fds);
    handle->fds = NULL;
    handle->fd_count = 0;
}

const struct transport transport_nbd = {"nbd", net_submit, net_flush, net_query, net_set_metadata,
                                        net_close};
const struct transport transport_nbdssl = {"nbdssl", net_submit, net_flush, net_query,
                                           net_set_metadata, net_close};
