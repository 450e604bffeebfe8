/*
 * How long requests take: fragments, latencies, the link of a handle and the link of a host.
 *
 * A request (a job) is cut into fragments; a handle (a channel) has so many of them in flight. A
 * fragment first takes its latency, then its bytes stream through the handle's link and the host's
 * (the trunk), which serves the handles that wait in turn: one that is saturated does not starve
 * the others. The request is done with its last fragment.
 *
 * Nothing here knows of sockets or clocks: tests run it in made-up time.
 */
#ifndef SIMULATOR_HOST_TIMING_H
#define SIMULATOR_HOST_TIMING_H

#include <stdbool.h>
#include <stdint.h>

#include "list.h"
#include "timers.h"

/* 0 means: at once, whole, no limit. Rates are bytes per second. */
struct timing_rates {
    uint64_t latency_ns;
    double jitter; /* a latency varies by up to this part, either way */
    uint64_t buffers, buffer_bytes;
    uint64_t handle_rate, host_rate;
};

struct fragment;

struct trunk {
    struct timers *timers;
    struct list waiting; /* channels with fragments that wait for this link */
    struct fragment *serving;
    uint64_t free_ns; /* when what is being served is through */
    struct timer timer;
    bool pumping;
};

struct channel {
    struct timers *timers;
    uint64_t *random;
    struct trunk *trunk; /* NULL: only the handle's own link */
    struct timing_rates rates;
    struct list jobs;     /* those that are not all cut up yet, in order */
    struct list at_trunk; /* fragments */
    struct list turn;     /* in trunk->waiting */
    uint64_t in_flight;   /* fragments */
    uint64_t free_ns;
    bool pumping;
};

struct job {
    struct channel *channel;
    uint64_t uncut; /* bytes */
    bool cut;       /* all of it */
    struct list place;
    struct list fragments; /* in flight */
    void (*done)(struct job *job, uint64_t at_ns);
};

void trunk_init(struct trunk *trunk, struct timers *timers);
void channel_init(struct channel *channel, struct timers *timers, uint64_t *random,
                  struct trunk *trunk);

/* Whether a job would be done before job_start() returned. */
bool channel_is_instant(const struct channel *channel);
/* A latency of the channel, with its jitter. */
uint64_t timing_latency(uint64_t latency_ns, double jitter, uint64_t *random);

/* `done` is called once, possibly from inside; the job may be freed there. */
void job_start(struct job *job, struct channel *channel, uint64_t bytes,
               void (*done)(struct job *job, uint64_t at_ns), uint64_t now_ns);
void job_cancel(struct job *job, uint64_t now_ns); /* `done` will not be called */

#endif
