/* Questions about an open disk: its description, reads, completions. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "probe.h"

#define READS 16u
#define MIB_SECTORS 2048u

static void ask_info(const char *unused)
{
    struct session session;
    VixDiskLibInfo *info = NULL;
    (void)unused;
    if (!usual_session(&session))
        return;
    VixError error = vix.GetInfo(session.handle, &info);
    answer_error("info", error);
    if (VIX_SUCCEEDED(error) && info) {
        answer_number("capacity", (long long)info->capacity);
        answer_number("adapter", info->adapterType);
        answer_number("links", info->numLinks);
        answer_number("bios_cylinders", info->biosGeo.cylinders);
        answer_number("bios_heads", info->biosGeo.heads);
        answer_number("bios_sectors", info->biosGeo.sectors);
        answer_number("phys_cylinders", info->physGeo.cylinders);
        answer_number("phys_heads", info->physGeo.heads);
        answer_number("phys_sectors", info->physGeo.sectors);
        answer_text("parent_hint", info->parentFileNameHint);
        answer_text("uuid", info->uuid);
        if (vix.release >= 70) { /* older ones end before */
            answer_number("logical_sector", info->logicalSectorSize);
            answer_number("physical_sector", info->physicalSectorSize);
        }
        vix.FreeInfo(info);
    }
    close_session(&session, true);
}

static void ask_read_async(const char *sectors)
{
    struct session session;
    struct read read = {0};
    uint64_t count = strtoull(sectors, NULL, 10);
    if (!usual_session(&session))
        return;
    read.buffer = aligned_buffer(count * VIXDISKLIB_SECTOR_SIZE);
    read_async(&session, &read, 0, count);
    answer_error("returned", read.returned);
    answer_bool("called", wait_for_callbacks(1));
    if (read.called) {
        answer_error("completed", read.completed);
        answer_bool("inside_the_call", read.inside);
        answer_bool("on_the_callers_thread", read.thread == this_thread());
        answer_real("read_seconds", read.ended - read.started);
    }
    answer_error("wait", vix.Wait(session.handle));
    close_session(&session, true);
}

/* Large and small in turn, all at once. */
static void ask_order(const char *unused)
{
    struct session session;
    struct read reads[READS] = {0};
    char order[256] = "";
    unsigned threads = 0;
    (void)unused;
    if (!usual_session(&session))
        return;
    for (unsigned i = 0; i < READS; i++) {
        uint64_t count = i % 2 ? 8 : MIB_SECTORS;
        reads[i].buffer = aligned_buffer(count * VIXDISKLIB_SECTOR_SIZE);
        if ((i + 1) * MIB_SECTORS <= session.sectors)
            read_async(&session, &reads[i], i * MIB_SECTORS, count);
    }
    wait_for_callbacks(READS);
    for (unsigned i = 0; i < READS; i++) {
        bool known = false;
        snprintf(order + strlen(order), sizeof order - strlen(order), "%s%u", i ? " " : "",
                 reads[i].order);
        for (unsigned k = 0; k < i; k++)
            known |= reads[k].thread == reads[i].thread;
        threads += !known;
    }
    answer_text("order", order);
    answer_number("threads", threads);
    close_session(&session, true);
}

static void ask_mixed(const char *unused)
{
    struct session session;
    struct read read = {.buffer = aligned_buffer(MIB_SECTORS * VIXDISKLIB_SECTOR_SIZE)};
    uint8_t *buffer = aligned_buffer(VIXDISKLIB_SECTOR_SIZE);
    (void)unused;
    if (!usual_session(&session))
        return;
    read_async(&session, &read, 0, MIB_SECTORS);
    answer_error("returned", read.returned);
    answer_bool("outstanding", callbacks_seen() == 0);
    answer_error("read", vix.Read(session.handle, 0, 1, buffer));
    answer_bool("called_before_read_returned", callbacks_seen() == 1);
    wait_for_callbacks(1);
    answer_error("read_after", vix.Read(session.handle, 0, 1, buffer));
    close_session(&session, true);
}

static void ask_wait(const char *unused)
{
    struct session session;
    struct read reads[READS] = {0};
    (void)unused;
    if (!usual_session(&session))
        return;
    answer_error("wait_for_nothing", vix.Wait(session.handle));
    for (unsigned i = 0; i < READS; i++) {
        reads[i].buffer = aligned_buffer(MIB_SECTORS * VIXDISKLIB_SECTOR_SIZE);
        read_async(&session, &reads[i], 0, MIB_SECTORS);
    }
    answer_number("called_before", callbacks_seen());
    answer_error("wait", vix.Wait(session.handle));
    answer_number("called_after", callbacks_seen());
    answer_number("of", READS);
    wait_for_callbacks(READS);
    close_session(&session, true);
}

/* What became of the only asynchronous read. */
static void answer_async(const struct read *read)
{
    answer_error("async_returned", read->returned);
    /* A call that was refused should have no callback; it would show after a moment. */
    if (VIX_ERROR_CODE(read->returned) == VIX_ASYNC)
        wait_for_callbacks(1);
    else
        usleep(100000);
    answer_bool("async_called", callbacks_seen() == 1);
    if (callbacks_seen() == 1)
        answer_error("async_completed", read->completed);
}

static void ask_past_end(const char *unused)
{
    struct session session;
    uint8_t *buffer = aligned_buffer(16 * VIXDISKLIB_SECTOR_SIZE);
    struct read read = {.buffer = buffer};
    (void)unused;
    if (!usual_session(&session))
        return;
    answer_error("read_at_end", vix.Read(session.handle, session.sectors, 1, buffer));
    answer_error("read_across_end", vix.Read(session.handle, session.sectors - 1, 2, buffer));
    answer_error("read_far", vix.Read(session.handle, session.sectors * 1024, 1, buffer));
    answer_error("read_overflow", vix.Read(session.handle, UINT64_MAX - 1, 2, buffer));
    answer_error("last_sector", vix.Read(session.handle, session.sectors - 1, 1, buffer));
    read_async(&session, &read, session.sectors, 1);
    answer_async(&read);
    close_session(&session, true);
}

static void ask_zero_sectors(const char *unused)
{
    struct session session;
    struct read read = {.buffer = aligned_buffer(VIXDISKLIB_SECTOR_SIZE)};
    (void)unused;
    if (!usual_session(&session))
        return;
    answer_error("read", vix.Read(session.handle, 0, 0, read.buffer));
    read_async(&session, &read, 0, 0);
    answer_async(&read);
    close_session(&session, true);
}

static void ask_unaligned(const char *flags)
{
    struct session session;
    struct access access = usual_access();
    uint8_t *buffer = aligned_buffer(16 * VIXDISKLIB_SECTOR_SIZE);
    access.flags |= (uint32_t)strtoul(flags, NULL, 0);
    if (!initialise(NULL) || !connect_as(&access, &session) || !open_as(&access, &session))
        return;
    answer_text("transport", vix.GetTransportMode(session.handle));
    answer_error("aligned", vix.Read(session.handle, 0, 8, buffer));
    answer_error("by_512", vix.Read(session.handle, 0, 8, buffer + 512));
    answer_error("by_8", vix.Read(session.handle, 0, 8, buffer + 8));
    answer_error("by_1", vix.Read(session.handle, 0, 8, buffer + 1));
    close_session(&session, true);
}

static void ask_large(const char *mib)
{
    struct session session;
    uint64_t count = strtoull(mib, NULL, 10) * MIB_SECTORS;
    if (!usual_session(&session))
        return;
    if (count > session.sectors) {
        answer_text("not_asked", "the disk is smaller than that");
        return;
    }
    uint8_t *buffer = aligned_buffer(count * VIXDISKLIB_SECTOR_SIZE);
    double began = kit_seconds();
    answer_error("read", vix.Read(session.handle, 0, count, buffer));
    answer_real("read_seconds", kit_seconds() - began);
    close_session(&session, true);
}

/* Single sectors, one after the other: with one handle, then with a second one open as well. */
static void ask_two_handles(const char *unused)
{
    struct session session, other;
    struct access access = usual_access();
    uint8_t *buffer = aligned_buffer(VIXDISKLIB_SECTOR_SIZE);
    (void)unused;
    if (!usual_session(&session))
        return;
    double began = kit_seconds();
    for (unsigned i = 0; i < 64; i++)
        vix.Read(session.handle, i % session.sectors, 1, buffer);
    answer_real("one_handle_seconds", (kit_seconds() - began) / 64);
    other = session;
    if (!open_as(&access, &other))
        return;
    began = kit_seconds();
    for (unsigned i = 0; i < 64; i++)
        vix.Read(i % 2 ? other.handle : session.handle, i % session.sectors, 1, buffer);
    answer_real("two_handles_seconds", (kit_seconds() - began) / 64);
    vix.Close(other.handle);
    close_session(&session, true);
}

/* A session that nobody used for a while. */
static void ask_idle(const char *unused)
{
    struct session session;
    uint8_t *buffer = aligned_buffer(VIXDISKLIB_SECTOR_SIZE);
    (void)unused;
    if (!target.idle_seconds) {
        answer_text("not_asked", "needs --idle");
        return;
    }
    if (!usual_session(&session))
        return;
    answer_error("before", vix.Read(session.handle, 0, 1, buffer));
    sleep(target.idle_seconds);
    answer_error("after", vix.Read(session.handle, 0, 1, buffer));
    close_session(&session, true);
}

static void ask_flush(const char *unused)
{
    struct session session;
    (void)unused;
    if (!usual_session(&session) || !vix.Flush)
        return;
    answer_error("flush", vix.Flush(session.handle));
    close_session(&session, true);
}

const struct question reading_questions[] = {
    {"info", NEEDS_DISK, "What does GetInfo tell?", ask_info, NULL},
    {"read-async", NEEDS_DISK, "ReadAsync of a sector: what returns, where does the callback run?",
     ask_read_async, "1"},
    {"read-async-1m", NEEDS_DISK, "The same for 1 MiB?", ask_read_async, "2048"},
    {"completion-order", NEEDS_DISK, "In which order do 16 reads complete, and on how many threads?", ask_order,
     NULL},
    {"mixed-mode", NEEDS_DISK, "Read while a ReadAsync is outstanding (26000)?", ask_mixed, NULL},
    {"wait", NEEDS_DISK, "Have all callbacks run when Wait returns?", ask_wait, NULL},
    {"past-the-end", NEEDS_DISK, "Reads past the end of the disk?", ask_past_end, NULL},
    {"zero-sectors", NEEDS_DISK, "Reads of no sectors?", ask_zero_sectors, NULL},
    {"unaligned-buffer", NEEDS_DISK, "Buffers at odd addresses?", ask_unaligned, "0"},
    {"unaligned-unbuffered", NEEDS_DISK, "The same with UNBUFFERED?", ask_unaligned, "1"},
    {"read-2m", NEEDS_DISK, "One read of 2 MiB?", ask_large, "2"},
    {"read-8m", NEEDS_DISK, "One read of 8 MiB?", ask_large, "8"},
    {"read-24m", NEEDS_DISK, "One read of 24 MiB?", ask_large, "24"},
    {"read-64m", NEEDS_DISK, "One read of 64 MiB?", ask_large, "64"},
    {"two-handles", NEEDS_DISK, "Is a disk with two handles slower?", ask_two_handles, NULL},
    {"idle", NEEDS_DISK, "A read after so many seconds (--idle) without one?", ask_idle, NULL},
    {"flush-read-only", NEEDS_DISK, "Flush on a read-only handle?", ask_flush, NULL},
    {0},
};
