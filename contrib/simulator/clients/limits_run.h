/* One workload on some disks: see limits_run.c. */
#ifndef SIMULATOR_LIMITS_RUN_H
#define SIMULATOR_LIMITS_RUN_H

#include "kit.h"

struct workload {
    const char *name;
    bool write, random;
    unsigned bytes, depth;
};

struct disk {
    const char *path;
    VixDiskLibHandle handle;
    uint64_t sectors;
    char transport[32];
};

struct outcome {
    double seconds;
    uint64_t requests;
    double bytes_per_s, requests_per_s;
    double mean_ms, median_ms, p99_ms; /* of one request */
};

/* Runs `workload` on all disks at once for `seconds`. Called by the thread that opened them. An error
 * of the library is returned; -1 is one of this process. */
long long limits_run(const struct kit *kit, struct disk *disks, unsigned count,
                     const struct workload *workload, double seconds, struct outcome *outcome);

#endif
