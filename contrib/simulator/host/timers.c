#include "timers.h"

#include <stdlib.h>

#include "memory.h"

static bool before(const struct timer *a, const struct timer *b)
{
    return a->at_ns != b->at_ns ? a->at_ns < b->at_ns : a->turn < b->turn;
}

static void put(struct timers *timers, size_t index, struct timer *timer)
{
    timers->heap[index] = timer;
    timer->place = index + 1;
}

static void rise(struct timers *timers, size_t index)
{
    struct timer *timer = timers->heap[index];
    while (index > 0 && before(timer, timers->heap[(index - 1) / 2])) {
        put(timers, index, timers->heap[(index - 1) / 2]);
        index = (index - 1) / 2;
    }
    put(timers, index, timer);
}

static void sink(struct timers *timers, size_t index)
{
    struct timer *timer = timers->heap[index];
    for (;;) {
        size_t child = 2 * index + 1;
        if (child + 1 < timers->used && before(timers->heap[child + 1], timers->heap[child]))
            child++;
        if (child >= timers->used || !before(timers->heap[child], timer))
            break;
        put(timers, index, timers->heap[child]);
        index = child;
    }
    put(timers, index, timer);
}

void timers_clear(struct timers *timers, struct timer *timer)
{
    if (timer->place == 0)
        return;
    size_t index = timer->place - 1;
    struct timer *last = timers->heap[--timers->used];
    timer->place = 0;
    if (last == timer)
        return;
    put(timers, index, last);
    rise(timers, index);
    sink(timers, last->place - 1);
}

void timers_set(struct timers *timers, struct timer *timer, uint64_t at_ns)
{
    timers_clear(timers, timer);
    if (timers->used == timers->room) {
        timers->room = timers->room > 0 ? 2 * timers->room : 64;
        timers->heap = memory_resized(timers->heap, timers->room, sizeof *timers->heap);
    }
    timer->at_ns = at_ns;
    timer->turn = timers->turns++;
    put(timers, timers->used++, timer);
    rise(timers, timer->place - 1);
}

uint64_t timers_next(const struct timers *timers)
{
    return timers->used > 0 ? timers->heap[0]->at_ns : UINT64_MAX;
}

void timers_run(struct timers *timers, uint64_t now_ns)
{
    uint64_t earliest = now_ns > TIMERS_SLIP_NS ? now_ns - TIMERS_SLIP_NS : 0;
    while (timers_next(timers) <= now_ns) {
        struct timer *timer = timers->heap[0];
        timers_clear(timers, timer);
        timer->fire(timer, timer->at_ns > earliest ? timer->at_ns : earliest);
    }
}

void timers_free(struct timers *timers)
{
    free(timers->heap);
    *timers = (struct timers){0};
}
