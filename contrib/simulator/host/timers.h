/* Timers in a heap. Time is given from outside, so that tests can make it. */
#ifndef SIMULATOR_HOST_TIMERS_H
#define SIMULATOR_HOST_TIMERS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct timer {
    uint64_t at_ns;
    uint64_t turn; /* of those that are due at the same time, the one that was set first */
    size_t place; /* 1 + its index in the heap; 0: not set */
    /* `at_ns` is when it was due, not when it was noticed: what follows from it starts then. A
     * model that waits is so not slowed down by the scheduler of the machine it runs on. */
    void (*fire)(struct timer *timer, uint64_t at_ns);
};

struct timers {
    struct timer **heap;
    size_t used, room;
    uint64_t turns;
};

/* Who was stopped for longer than that (SIGSTOP) does not make up for the time it has lost. */
#define TIMERS_SLIP_NS UINT64_C(2000000)

void timers_set(struct timers *timers, struct timer *timer, uint64_t at_ns); /* or again */
void timers_clear(struct timers *timers, struct timer *timer);               /* set or not */
/* When the first is due; UINT64_MAX when there is none. */
uint64_t timers_next(const struct timers *timers);
void timers_run(struct timers *timers, uint64_t now_ns); /* fires all that are due, in order */
void timers_free(struct timers *timers);

static inline bool timer_is_set(const struct timer *timer)
{
    return timer->place != 0;
}

#endif
