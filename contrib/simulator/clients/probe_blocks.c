/* Questions about QueryAllocatedBlocks and about the disk database. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "probe.h"

#define MIB_SECTORS 2048u

static void query(const struct session *session, const char *key, uint64_t start, uint64_t count,
                  uint64_t chunk)
{
    char name[64];
    VixDiskLibBlockList *blocks = NULL;
    double began = kit_seconds();
    VixError error = vix.QueryAllocatedBlocks(session->handle, start, count, chunk, &blocks);
    answer_error(key, error);
    if (VIX_FAILED(error) || !blocks)
        return;
    snprintf(name, sizeof name, "%s_seconds", key);
    answer_real(name, kit_seconds() - began);
    snprintf(name, sizeof name, "%s_blocks", key);
    answer_number(name, blocks->numBlocks);
    if (blocks->numBlocks) {
        snprintf(name, sizeof name, "%s_first", key);
        answer_number(name, (long long)blocks->blocks[0].offset);
        snprintf(name, sizeof name, "%s_end", key);
        const VixDiskLibBlock *last = &blocks->blocks[blocks->numBlocks - 1];
        answer_number(name, (long long)(last->offset + last->length));
    }
    vix.FreeBlockList(blocks);
}

/* An open disk of a library that can be queried. */
static bool query_session(struct session *session)
{
    if (!usual_session(session))
        return false;
    if (!vix.QueryAllocatedBlocks)
        answer_text("not_asked", "this release has no QueryAllocatedBlocks");
    return vix.QueryAllocatedBlocks != NULL;
}

/* As many whole chunks as the disk has, but not more than a query may ask for. */
static uint64_t whole_chunks(const struct session *session, uint64_t chunk)
{
    uint64_t chunks = session->sectors / chunk;
    return (chunks < VIXDISKLIB_MAX_CHUNK_NUMBER ? chunks : VIXDISKLIB_MAX_CHUNK_NUMBER) * chunk;
}

static void ask_chunk(const char *sectors)
{
    struct session session;
    uint64_t chunk = strtoull(sectors, NULL, 10);
    if (!query_session(&session))
        return;
    if (session.sectors < chunk)
        answer_text("not_asked", "the disk is smaller than that");
    else
        query(&session, "query", 0, whole_chunks(&session, chunk), chunk);
    close_session(&session, true);
}

static void ask_query_bounds(const char *unused)
{
    struct session session;
    const uint64_t chunk = VIXDISKLIB_MIN_CHUNK_SIZE;
    (void)unused;
    if (!query_session(&session))
        return;
    uint64_t tail = session.sectors % chunk;
    query(&session, "unaligned_start", 1, chunk, chunk);
    query(&session, "unaligned_count", 0, chunk + 1, chunk);
    query(&session, "no_sectors", 0, 0, chunk);
    query(&session, "past_end", session.sectors - tail, chunk, chunk);
    if (tail) {
        query(&session, "tail", session.sectors - tail, tail, chunk);
        query(&session, "whole_with_tail", 0, session.sectors, chunk);
    }
    answer_number("tail_sectors", (long long)tail);
    close_session(&session, true);
}

static void ask_too_many_chunks(const char *unused)
{
    struct session session;
    uint64_t chunk = VIXDISKLIB_MIN_CHUNK_SIZE, most = VIXDISKLIB_MAX_CHUNK_NUMBER;
    (void)unused;
    if (!query_session(&session))
        return;
    if (session.sectors / chunk <= most) {
        answer_text("not_asked", "the disk has no more chunks than a query may ask for");
    } else {
        query(&session, "most", 0, most * chunk, chunk);
        query(&session, "one_more", 0, (most + 1) * chunk, chunk);
    }
    close_session(&session, true);
}

static double time_of(const struct session *session, uint64_t start, uint8_t *buffer)
{
    double began = kit_seconds();
    for (unsigned i = 0; i < 8; i++)
        vix.Read(session->handle, start, MIB_SECTORS, buffer);
    return (kit_seconds() - began) / 8;
}

/* Whether a hole is read faster than data: then it does not travel as zeros. */
static void ask_holes(const char *unused)
{
    struct session session;
    VixDiskLibBlockList *blocks = NULL;
    uint64_t hole = UINT64_MAX, data = UINT64_MAX, at = 0;
    (void)unused;
    if (!query_session(&session))
        return;
    uint64_t end = whole_chunks(&session, MIB_SECTORS);
    VixError error = vix.QueryAllocatedBlocks(session.handle, 0, end, MIB_SECTORS, &blocks);
    if (VIX_FAILED(error)) {
        answer_error("query_failed", error);
        return;
    }
    for (uint32_t i = 0; i < blocks->numBlocks; i++) {
        data = blocks->blocks[i].offset;
        if (data > at)
            hole = at;
        at = data + blocks->blocks[i].length;
    }
    if (at < end)
        hole = at;
    vix.FreeBlockList(blocks);
    uint8_t *buffer = aligned_buffer(MIB_SECTORS * VIXDISKLIB_SECTOR_SIZE);
    if (hole == UINT64_MAX || data == UINT64_MAX)
        answer_text("not_asked", "the disk has not both data and a hole of 1 MiB");
    else {
        answer_real("data_seconds", time_of(&session, data, buffer));
        answer_real("hole_seconds", time_of(&session, hole, buffer));
    }
    close_session(&session, true);
}

const struct question block_questions[] = {
    {"query-64", NEEDS_DISK, "Chunks of 64 sectors (below the minimum)?", ask_chunk, "64"},
    {"query-128", NEEDS_DISK, "Chunks of 128 sectors?", ask_chunk, "128"},
    {"query-192", NEEDS_DISK, "Chunks of 192 sectors (no power of two)?", ask_chunk, "192"},
    {"query-2048", NEEDS_DISK, "Chunks of 1 MiB?", ask_chunk, "2048"},
    {"query-131072", NEEDS_DISK, "Chunks of 131072 sectors (the maximum?)", ask_chunk, "131072"},
    {"query-262144", NEEDS_DISK, "Chunks of 262144 sectors?", ask_chunk, "262144"},
    {"query-bounds", NEEDS_DISK, "Unaligned, empty, past the end, the tail?", ask_query_bounds, NULL},
    {"query-many", NEEDS_DISK, "More chunks than a query may ask for?", ask_too_many_chunks,
     NULL},
    {"holes", NEEDS_DISK, "Is a hole read faster than data?", ask_holes, NULL},
    {0},
};

/* ---- the disk database ---- */

static void ask_metadata_keys(const char *unused)
{
    struct session session;
    size_t required = 0, again = 0;
    char small[4] = "";
    (void)unused;
    if (!usual_session(&session))
        return;
    answer_error("length_only", vix.GetMetadataKeys(session.handle, NULL, 0, &required));
    answer_number("required", (long long)required);
    answer_error("too_small", vix.GetMetadataKeys(session.handle, small, sizeof small, &again));
    answer_number("too_small_required", (long long)again);
    char *keys = calloc(1, required + 64);
    if (!keys)
        return;
    memset(keys, 'x', required + 64);
    answer_error("keys", vix.GetMetadataKeys(session.handle, keys, required, NULL));
    if (required >= 2) {
        answer_bool("ends_with_two_nuls", !keys[required - 1] && !keys[required - 2]);
        answer_bool("nothing_after", keys[required] == 'x');
        keys[required - 1] = keys[required - 2] = 0;
        for (size_t at = 0, n = 0; at + 1 < required && keys[at]; at += strlen(keys + at) + 1, n++) {
            char name[32];
            snprintf(name, sizeof name, "key_%zu", n);
            answer_text(name, keys + at);
        }
    }
    free(keys);
    close_session(&session, true);
}

static void ask_metadata_read(const char *key)
{
    struct session session;
    size_t required = 0;
    char value[1024];
    if (!usual_session(&session))
        return;
    answer_error("length_only", vix.ReadMetadata(session.handle, key, NULL, 0, &required));
    answer_number("required", (long long)required);
    if (required > 1 && required < sizeof value) {
        memset(value, 'x', sizeof value);
        answer_error("one_less",
                     vix.ReadMetadata(session.handle, key, value, required - 1, &required));
        answer_bool("one_less_wrote", value[0] != 'x');
        memset(value, 'x', sizeof value);
        answer_error("exact", vix.ReadMetadata(session.handle, key, value, required, &required));
        value[sizeof value - 1] = 0;
        answer_bool("required_counts_the_nul", strlen(value) + 1 == required);
    }
    close_session(&session, true);
}

const struct question metadata_questions[] = {
    {"metadata-keys", NEEDS_DISK, "How long is the list of keys said to be, and how does it end?",
     ask_metadata_keys, NULL},
    {"metadata-read", NEEDS_DISK, "Does a value's required length count its NUL?",
     ask_metadata_read, "adapterType"},
    {"metadata-read-ddb", NEEDS_DISK, "The same with the prefix `ddb.`?", ask_metadata_read,
     "ddb.adapterType"},
    {"metadata-unknown", NEEDS_DISK, "A key that is not there?", ask_metadata_read,
     "vixsim.probe.absent"},
    {0},
};
