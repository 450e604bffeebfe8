/*
 * The event loop: one thread, epoll for descriptors and a timerfd for the heap of timers.
 *
 * One turn waits, calls what is ready, then the timers that are due, then what was left for the end
 * of the turn (answers of one turn leave in one send; what was closed is freed there, so that an
 * event of the same turn still finds it).
 */
#ifndef SIMULATOR_HOST_LOOP_H
#define SIMULATOR_HOST_LOOP_H

#include <stdbool.h>
#include <stdint.h>

#include "list.h"
#include "timers.h"

struct watch {
    int fd;
    uint32_t events; /* EPOLLIN ...; what is asked for now */
    void (*ready)(struct watch *watch, uint32_t events);
};

struct chore { /* for the end of the turn */
    struct list place;
    void (*run)(struct chore *chore);
};

struct loop {
    int epoll, timer_fd;
    struct timers timers;
    struct watch clock;
    struct list chores;
    uint64_t armed_ns; /* what the timerfd is set to; UINT64_MAX: nothing */
    bool stopping;
};

bool loop_init(struct loop *loop); /* false with errno */
void loop_free(struct loop *loop);
void loop_run(struct loop *loop); /* until loop_stop() */
void loop_stop(struct loop *loop);
void loop_finish(struct loop *loop); /* what is left for the end of a turn, after the last */
uint64_t loop_now_ns(void);

bool loop_watch(struct loop *loop, struct watch *watch, uint32_t events); /* false with errno */
void loop_change(struct loop *loop, struct watch *watch, uint32_t events);
void loop_forget(struct loop *loop, struct watch *watch); /* before its fd is closed */

void chore_init(struct chore *chore, void (*run)(struct chore *chore));
void loop_later(struct loop *loop, struct chore *chore); /* once, however often it is asked for */

#endif
