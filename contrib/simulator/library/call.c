/* What happens around every function of the interface: rules of use, noise, and faults. */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "library.h"

VixError broken(enum strictness strictness, const char *name, VixError error, const char *format, ...)
{
    char text[512];
    va_list arguments;
    if (strictness == STRICT_OFF)
        return VIX_OK;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    if (strictness == STRICT_ABORT) {
        fprintf(stderr, "vixsim: VixDiskLib_%s: %s\n", name, text);
        fflush(stderr);
        abort();
    }
    say(SAY_ERROR, "VixDiskLib_%s: %s", name, text);
    return error;
}

VixError session_thread_only(const struct call *call)
{
    if ((pid_t)syscall(SYS_gettid) == library.session_thread)
        return VIX_OK;
    return broken(call->settings->strict_threads, call->name, VIX_E_FAIL,
                  "WrongThreadException: this thread is not the one that called InitEx");
}

VixError required(const struct call *call, const void *pointer, const char *what)
{
    if (pointer)
        return VIX_OK;
    if (call->settings->strict_null == STRICT_OFF)
        raise(SIGSEGV); /* what reading the string would do */
    return broken(call->settings->strict_null, call->name, VIX_E_INVALID_ARG, "%s is NULL", what);
}

/* ---- faults ---- */

/* Writes over the head of the heap block behind one of our own, as an overrun does; the allocator
 * notices when that block is freed. Two blocks asked for in turn need not lie side by side in a heap
 * that was used: blocks are asked for (and left, the process is to die) until two of them do. */
__attribute__((noinline)) static void scribble(void)
{
    enum { SIZE = 40, HEAD = 8, TRIES = 100000 };
    volatile size_t behind = SIZE; /* or the compiler sees what is done here, and refuses */
    char *block = malloc(SIZE), *neighbour = malloc(SIZE);
    for (int i = 0; i < TRIES && block && neighbour && neighbour != block + SIZE + HEAD; i++) {
        block = neighbour;
        neighbour = malloc(SIZE);
    }
    if (!block || !neighbour)
        return;
    for (size_t i = behind; i < behind + 32; i++)
        ((volatile char *)block)[i] = 0x5a;
    free(block);
    free(neighbour);
}

static VixError act_out(const struct call *call)
{
    const struct fault *fault = call->fault;
    if (fault->actions & FAULT_DELAY)
        sleep_ns(fault->delay_ns);
    if (fault->actions & FAULT_SEGV) {
        signal(SIGSEGV, SIG_DFL);
        raise(SIGSEGV);
    }
    if (fault->actions & FAULT_ABORT)
        abort();
    if (fault->actions & FAULT_SCRIBBLE)
        scribble();
    while (fault->actions & FAULT_HANG)
        pause();
    if (fault->actions & FAULT_ERROR)
        return (VixError)fault->error;
    return VIX_OK;
}

/* ---- begin and end ---- */

/* In a fork the settings may be locked for ever, by a thread that is not there: what is done about it
 * is known from the last call before. */
static VixError fit_for_use(const char *name)
{
    if (library.state != LIBRARY_READY)
        return VIX_E_DISK_NOINIT;
    if (getpid() != library.pid)
        return broken((enum strictness)library.strict_fork, name, VIX_E_DISK_NOINIT,
                      "called in process %d, a fork of %d that called InitEx", (int)getpid(),
                      (int)library.pid);
    return VIX_OK;
}

static VixError prepare(struct call *call, const char *name, const struct subject *subject)
{
    char complaint[256];
    VixError error;
    *call = (struct call){.name = name};
    if (!library.settings)
        return VIX_E_DISK_NOINIT;
    error = fit_for_use(name);
    if (error)
        return error;
    call->source = subject->source ? subject->source : library.settings;
    call->settings = settings_get(call->source);
    library.strict_fork = (int)call->settings->strict_fork;
    if (settings_error(call->source, complaint, sizeof complaint))
        fprintf(stderr, "vixsim: sim.conf: %s\n", complaint);
    chatter_call(call->settings, name);
    call->fault = settings_strike(call->source, call->settings, name, subject->path,
                                  subject->transport, subject->start, subject->count);
    return VIX_OK;
}

VixError call_begin(struct call *call, const char *name, const struct subject *subject)
{
    static const struct subject nothing;
    VixError error = prepare(call, name, subject ? subject : &nothing);
    return !error && call->fault ? act_out(call) : error;
}

VixError decorated(bool upper_bits, VixError error)
{
    return upper_bits && error != VIX_OK && error != VIX_ASYNC ? error | 0x5AFEull << 32 | 3ull << 16 : error;
}

VixError call_end(struct call *call, VixError error)
{
    error = decorated(call->settings && call->settings->upper_bits, error);
    if (call->settings)
        settings_release(call->settings);
    call->settings = NULL;
    return error;
}

/* One call at a time: with that rule off the second waits, which is the least it can do. */
static VixError enter(struct call *call, handle_t *handle)
{
    VixError error = VIX_OK;
    if (pthread_mutex_trylock(&handle->call)) {
        error = broken(call->settings->strict_concurrency, call->name, VIX_E_OBJECT_IS_BUSY,
                       "another call is using this handle");
        if (error)
            return error;
        pthread_mutex_lock(&handle->call);
    }
    call->entered = handle;
    return VIX_OK;
}

VixError handle_begin(struct call *call, const char *name, handle_t *handle, uint64_t start,
                      uint64_t count)
{
    struct subject subject = {0};
    VixError error;
    if (handle)
        subject = (struct subject){handle->connection->settings, handle->path,
                                   handle->transport->name, start, count};
    error = prepare(call, name, &subject);
    error = error ? error : required(call, handle, "the handle");
    error = error ? error : enter(call, handle);
    if (error || !call->fault)
        return error;
    if (call->fault->actions & FAULT_STOP_HOST)
        nfc_stop_host(handle);
    if (call->fault->actions & FAULT_LOSE)
        nfc_lose(handle);
    return act_out(call);
}

VixError handle_end(struct call *call, VixError error)
{
    if (call->entered)
        pthread_mutex_unlock(&call->entered->call);
    call->entered = NULL;
    return call_end(call, error);
}
