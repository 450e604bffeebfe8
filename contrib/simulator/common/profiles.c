/* The named profiles. Where the figures come from: public measurements of the real library, see the
 * simulator's README. */
#include <string.h>

#include "settings.h"

#define US 1000ull
#define MS 1000000ull
#define KIB 1024ull
#define MIB 1048576ull

/* 25 GiB in chunks of 64 KiB took 2.5 s. */
#define QUERY .query_call_ns = 1000 * US, .query_chunk_ns = 6000
/* What an ESXi host gives by its own protocol, with the given fragments in flight. */
#define NFC(BUFFERS, BYTES)                                                                        \
    .net_latency_ns = 1 * MS, .net_jitter = 0.1, .net_buffers = (BUFFERS),                         \
    .net_buffer_bytes = (BYTES), .net_tunable = true, .net_handle_rate = 150000000,                \
    .net_host_rate = 400000000, .net_open_trips = 30
#define DEVICE .device_read_ns = 500 * US, .device_write_ns = 500 * US

static const struct profile profiles[] = {
    {.name = "lan", .net_latency_ns = 1 * MS, .net_jitter = 0.1, .net_host_rate = 1250000000,
     .net_open_trips = 1, DEVICE, QUERY, .exit_ns = 1000 * MS},
    {.name = "nbdssl", NFC(4, 64 * KIB), DEVICE, QUERY, .exit_ns = 1000 * MS},
    {.name = "nbdssl-tuned", NFC(4, 1 * MIB), DEVICE, QUERY, .exit_ns = 1000 * MS},
    {.name = "san", NFC(4, 64 * KIB), DEVICE, QUERY, .exit_ns = 1000 * MS},
    {.name = "hotadd", NFC(4, 64 * KIB), DEVICE, QUERY, .exit_ns = 1000 * MS},
    {.name = "instant"},
};

#define PROFILES (sizeof profiles / sizeof *profiles)

const struct profile *profile_named(const char *name)
{
    for (size_t i = 0; i < PROFILES; i++)
        if (!strcmp(profiles[i].name, name))
            return &profiles[i];
    return NULL;
}

const char *profile_name(unsigned index)
{
    return index < PROFILES ? profiles[index].name : NULL;
}
