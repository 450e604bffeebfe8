#include "loop.h"

#include <errno.h>
#include <sys/epoll.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#define NS_PER_S UINT64_C(1000000000)
#define EVENTS_OF_A_TURN 128

uint64_t loop_now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * NS_PER_S + (uint64_t)now.tv_nsec;
}

static void clock_ready(struct watch *watch, uint32_t events)
{
    (void)events;
    struct loop *loop = LIST_OF(watch, struct loop, clock);
    uint64_t expirations;
    if (read(loop->timer_fd, &expirations, sizeof expirations) == (ssize_t)sizeof expirations)
        loop->armed_ns = UINT64_MAX;
}

bool loop_init(struct loop *loop)
{
    *loop = (struct loop){.epoll = -1, .timer_fd = -1, .armed_ns = UINT64_MAX};
    list_init(&loop->chores);
    loop->epoll = epoll_create1(EPOLL_CLOEXEC);
    loop->timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
    loop->clock = (struct watch){.fd = loop->timer_fd, .ready = clock_ready};
    if (loop->epoll >= 0 && loop->timer_fd >= 0 && loop_watch(loop, &loop->clock, EPOLLIN))
        return true;
    loop_free(loop);
    return false;
}

void loop_free(struct loop *loop)
{
    if (loop->timer_fd >= 0)
        close(loop->timer_fd);
    if (loop->epoll >= 0)
        close(loop->epoll);
    timers_free(&loop->timers);
}

bool loop_watch(struct loop *loop, struct watch *watch, uint32_t events)
{
    struct epoll_event event = {.events = events, .data.ptr = watch};
    watch->events = events;
    return epoll_ctl(loop->epoll, EPOLL_CTL_ADD, watch->fd, &event) == 0;
}

void loop_change(struct loop *loop, struct watch *watch, uint32_t events)
{
    if (watch->events == events)
        return;
    struct epoll_event event = {.events = events, .data.ptr = watch};
    watch->events = events;
    epoll_ctl(loop->epoll, EPOLL_CTL_MOD, watch->fd, &event);
}

void loop_forget(struct loop *loop, struct watch *watch)
{
    epoll_ctl(loop->epoll, EPOLL_CTL_DEL, watch->fd, NULL);
}

void chore_init(struct chore *chore, void (*run)(struct chore *chore))
{
    chore->run = run;
    list_init(&chore->place);
}

void loop_later(struct loop *loop, struct chore *chore)
{
    if (list_empty(&chore->place))
        list_append(&loop->chores, &chore->place);
}

static void run_chores(struct loop *loop)
{
    while (!list_empty(&loop->chores)) {
        struct chore *chore = LIST_OF(loop->chores.next, struct chore, place);
        list_remove(&chore->place);
        chore->run(chore);
    }
}

static void arm(struct loop *loop)
{
    uint64_t next_ns = timers_next(&loop->timers);
    if (next_ns >= loop->armed_ns)
        return; /* an early wake-up costs less than setting the clock at each change */
    struct itimerspec setting = {
        .it_value = {.tv_sec = (time_t)(next_ns / NS_PER_S), .tv_nsec = (long)(next_ns % NS_PER_S)},
    };
    if (timerfd_settime(loop->timer_fd, TFD_TIMER_ABSTIME, &setting, NULL) == 0)
        loop->armed_ns = next_ns;
}

void loop_run(struct loop *loop)
{
    struct epoll_event events[EVENTS_OF_A_TURN];
    while (!loop->stopping) {
        arm(loop);
        int count = epoll_wait(loop->epoll, events, EVENTS_OF_A_TURN, -1);
        if (count < 0 && errno != EINTR)
            break;
        for (int i = 0; i < count; i++) {
            struct watch *watch = events[i].data.ptr;
            watch->ready(watch, events[i].events);
        }
        timers_run(&loop->timers, loop_now_ns());
        run_chores(loop);
    }
}

void loop_finish(struct loop *loop)
{
    run_chores(loop);
}

void loop_stop(struct loop *loop)
{
    loop->stopping = true;
}
