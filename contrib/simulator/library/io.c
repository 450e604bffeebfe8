/* Read, Write, ReadAsync, WriteAsync, Wait, Flush: requests from the call to the callback. */
#include <stdlib.h>
#include <stdio.h>
#include <string.h>

#include "library.h"

/* ---- the end of a request ---- */

static void finish(struct request *request, VixError error)
{
    handle_t *handle = request->handle;
    /* A client may act on the callback before it has returned: from here on the request is over for
     * the rules of use, yet Wait and Close still wait for the callback's end. */
    pthread_mutex_lock(&handle->lock);
    handle->outstanding--;
    handle->calling_back++;
    pthread_mutex_unlock(&handle->lock);
    request->callback(request->cb_data, error);
    free(request);
    pthread_mutex_lock(&handle->lock);
    handle->calling_back--;
    pthread_cond_broadcast(&handle->idle);
    pthread_mutex_unlock(&handle->lock);
}

struct late_end {
    struct request *request;
    VixError error;
};

static void *finish_late(void *argument)
{
    struct late_end late = *(struct late_end *)argument;
    free(argument);
    sleep_ns(late.request->late_ns);
    finish(late.request, late.error);
    return NULL;
}

static void count_bytes(const struct request *request)
{
    handle_t *handle = request->handle;
    pthread_mutex_lock(&handle->lock);
    if (request->op == WIRE_WRITE) {
        handle->writes++;
        handle->write_bytes += request->count * SECTOR;
    } else {
        handle->reads++;
        handle->read_bytes += request->count * SECTOR;
    }
    pthread_mutex_unlock(&handle->lock);
}

void complete(struct request *request, VixError error)
{
    if (!error)
        count_bytes(request);
    if (request->callback_error)
        error = request->callback_error;
    error = decorated(request->upper_bits, error);
    if (request->dropped) {
        free(request); /* it stays outstanding for ever */
        return;
    }
    if (request->late_ns) {
        struct late_end *late = malloc(sizeof *late);
        pthread_t thread;
        if (late) {
            *late = (struct late_end){request, error};
            start_thread_or_die(&thread, "vixsim-late", finish_late, late);
            pthread_detach(thread);
            return;
        }
    }
    finish(request, error);
}

void wait_until_idle(handle_t *handle)
{
    pthread_mutex_lock(&handle->lock);
    while (handle->outstanding || handle->calling_back)
        pthread_cond_wait(&handle->idle, &handle->lock);
    pthread_mutex_unlock(&handle->lock);
}

/* ---- a store into a buffer that is the client's again ---- */

struct late_store {
    uint8_t *buffer;
    size_t size;
    uint64_t delay_ns;
};

static void *store_late(void *argument)
{
    struct late_store store = *(struct late_store *)argument;
    free(argument);
    sleep_ns(store.delay_ns);
    memset(store.buffer, 0xEE, store.size);
    return NULL;
}

static void store_into_later(const struct fault *fault, uint8_t *buffer, uint64_t sectors)
{
    struct late_store *store = malloc(sizeof *store);
    pthread_t thread;
    if (!store)
        return;
    *store = (struct late_store){buffer, sectors * SECTOR, fault->late_store_ns};
    start_thread_or_die(&thread, "vixsim-store", store_late, store);
    pthread_detach(thread);
}

/* ---- the start ---- */

static VixError check_request(const struct call *call, const handle_t *handle, unsigned op,
                              uint64_t start, uint64_t count, const uint8_t *buffer)
{
    VixError error = required(call, buffer, "the buffer");
    if (error)
        return error;
    if (count == 0 || count > SIZE_MAX / SECTOR)
        return VIX_E_INVALID_ARG;
    if (start >= handle->facts.capacity || count > handle->facts.capacity - start)
        return VIX_E_DISK_OUTOFRANGE;
    if (op == WIRE_WRITE && handle->flags & VIXDISKLIB_FLAG_OPEN_READ_ONLY)
        return VIX_E_FILE_READ_ONLY;
    if (handle->transport == &transport_hotadd && handle->flags & VIXDISKLIB_FLAG_OPEN_UNBUFFERED &&
        (uintptr_t)buffer % SECTOR)
        return broken(call->settings->strict_alignment, call->name, VIX_E_INVALID_ARG,
                      "the buffer %p is not at a whole sector, as hotadd and UNBUFFERED want it",
                      (const void *)buffer);
    return VIX_OK;
}

static VixError submit(const struct fault *fault, bool upper_bits, handle_t *handle, unsigned op,
                       uint64_t start, uint64_t count, uint8_t *buffer,
                       VixDiskLibCompletionCB callback, void *cb_data)
{
    struct request *request = calloc(1, sizeof *request);
    if (!request)
        return VIX_E_OUT_OF_MEMORY;
    *request = (struct request){.handle = handle,
                                .op = op,
                                .start = start,
                                .count = count,
                                .buffer = buffer,
                                .callback = callback,
                                .cb_data = cb_data};
    request->upper_bits = upper_bits;
    if (fault) {
        request->callback_error = (VixError)fault->callback_error;
        request->late_ns = fault->actions & FAULT_LATE_CALLBACK ? fault->late_ns : 0;
        request->dropped = fault->actions & FAULT_DROP;
    }
    pthread_mutex_lock(&handle->lock);
    handle->outstanding++;
    pthread_mutex_unlock(&handle->lock);
    handle->transport->submit(request);
    return VIX_OK;
}

/* ---- synchronous: submitted, and waited for ---- */

struct waiting {
    pthread_mutex_t lock;
    pthread_cond_t over;
    bool is_over;
    VixError error;
};

static void wake(void *data, VixError error)
{
    struct waiting *waiting = data;
    pthread_mutex_lock(&waiting->lock);
    waiting->error = error;
    waiting->is_over = true;
    pthread_cond_signal(&waiting->over);
    pthread_mutex_unlock(&waiting->lock);
}

VixError transfer_and_wait(const struct fault *fault, handle_t *handle, unsigned op, uint64_t start,
                           uint64_t count, uint8_t *buffer)
{
    struct waiting waiting = {.is_over = false};
    VixError error;
    pthread_mutex_init(&waiting.lock, NULL);
    pthread_cond_init(&waiting.over, NULL);
    error = submit(fault, false, handle, op, start, count, buffer, wake, &waiting);
    if (!error) {
        pthread_mutex_lock(&waiting.lock);
        while (!waiting.is_over)
            pthread_cond_wait(&waiting.over, &waiting.lock);
        pthread_mutex_unlock(&waiting.lock);
        error = waiting.error;
    }
    pthread_cond_destroy(&waiting.over);
    pthread_mutex_destroy(&waiting.lock);
    return error;
}

static VixError refuse_mixed(const struct call *call, handle_t *handle)
{
    unsigned outstanding;
    pthread_mutex_lock(&handle->lock);
    outstanding = handle->outstanding;
    pthread_mutex_unlock(&handle->lock);
    return outstanding ? broken(call->settings->strict_mixed, call->name,
                                VIX_E_ASYNC_MIXEDMODE_UNSUPPORTED,
                                "%u asynchronous requests are outstanding on this handle", outstanding)
                       : VIX_OK;
}

static VixError synchronous(const char *name, handle_t *handle, unsigned op, uint64_t start,
                            uint64_t count, uint8_t *buffer)
{
    struct call call;
    VixError error = handle_begin(&call, name, handle, start, count);
    bool late_store = call.fault && call.fault->actions & FAULT_LATE_STORE;
    if (!error && !(error = check_request(&call, handle, op, start, count, buffer)) &&
        !(error = refuse_mixed(&call, handle)))
        error = transfer_and_wait(call.fault, handle, op, start, count, buffer);
    if (error && late_store && buffer && op == WIRE_READ)
        store_into_later(call.fault, buffer, count);
    return handle_end(&call, error);
}

VIX_EXPORT VixError VixDiskLib_Read(VixDiskLibHandle handle, VixDiskLibSectorType startSector,
                                    VixDiskLibSectorType numSectors, uint8_t *buffer)
{
    return synchronous("Read", handle, WIRE_READ, startSector, numSectors, buffer);
}

VIX_EXPORT VixError VixDiskLib_Write(VixDiskLibHandle handle, VixDiskLibSectorType startSector,
                                     VixDiskLibSectorType numSectors, const uint8_t *buffer)
{
    return synchronous("Write", handle, WIRE_WRITE, startSector, numSectors,
                       (uint8_t *)(uintptr_t)buffer);
}

/* ---- asynchronous ---- */

static VixError asynchronous(const char *name, handle_t *handle, unsigned op, uint64_t start,
                             uint64_t count, uint8_t *buffer, VixDiskLibCompletionCB callback,
                             void *cb_data)
{
    struct call call;
    VixError error = handle_begin(&call, name, handle, start, count);
    unsigned actions = call.fault ? call.fault->actions : 0;
    if (!error && !(error = check_request(&call, handle, op, start, count, buffer)) &&
        !(error = required(&call, (const void *)(uintptr_t)callback, "the callback"))) {
        if (actions & FAULT_INLINE)
            callback(cb_data,
                     decorated(call.settings->upper_bits,
                               transfer_and_wait(call.fault, handle, op, start, count, buffer)));
        else
            error = submit(call.fault, call.settings->upper_bits, handle, op, start, count, buffer,
                           callback, cb_data);
    }
    if (actions & FAULT_LATE_STORE && buffer && op == WIRE_READ)
        store_into_later(call.fault, buffer, count);
    return handle_end(&call, error ? error : VIX_ASYNC);
}

VIX_EXPORT VixError VixDiskLib_ReadAsync(VixDiskLibHandle handle, VixDiskLibSectorType startSector,
                                         VixDiskLibSectorType numSectors, uint8_t *buffer,
                                         VixDiskLibCompletionCB callback, void *cbData)
{
    return asynchronous("ReadAsync", handle, WIRE_READ, startSector, numSectors, buffer, callback,
                        cbData);
}

VIX_EXPORT VixError VixDiskLib_WriteAsync(VixDiskLibHandle handle, VixDiskLibSectorType startSector,
                                          VixDiskLibSectorType numSectors, const uint8_t *buffer,
                                          VixDiskLibCompletionCB callback, void *cbData)
{
    return asynchronous("WriteAsync", handle, WIRE_WRITE, startSector, numSectors,
                        (uint8_t *)(uintptr_t)buffer, callback, cbData);
}

VIX_EXPORT VixError VixDiskLib_Wait(VixDiskLibHandle handle)
{
    struct call call;
    VixError error = handle_begin(&call, "Wait", handle, 0, 0);
    if (!error)
        wait_until_idle(handle);
    return handle_end(&call, error);
}

/* What completed before this call is on stable storage when it returns. */
VIX_EXPORT VixError VixDiskLib_Flush(VixDiskLibHandle handle)
{
    struct call call;
    VixError error = handle_begin(&call, "Flush", handle, 0, 0);
    if (!error)
        error = handle->transport->flush(handle);
    return handle_end(&call, error);
}
