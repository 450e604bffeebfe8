/* Time, chance and threads. */
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "library.h"

uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

void sleep_ns(uint64_t duration_ns)
{
    struct timespec until;
    uint64_t end = now_ns() + duration_ns;
    if (duration_ns == 0)
        return;
    until.tv_sec = (time_t)(end / 1000000000u);
    until.tv_nsec = (long)(end % 1000000000u);
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL) == EINTR)
        ;
}

/* splitmix64: any state will do as a seed. */
uint64_t random_next(uint64_t *state)
{
    uint64_t value = *state += 0x9E3779B97F4A7C15u;
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9u;
    value = (value ^ (value >> 27)) * 0x94D049BB133111EBu;
    return value ^ (value >> 31);
}

uint64_t jittered(uint64_t duration_ns, double jitter, uint64_t *state)
{
    double unit = (double)(random_next(state) >> 11) / (double)(1ull << 53);
    return (uint64_t)((double)duration_ns * (1.0 + jitter * (2.0 * unit - 1.0)));
}

/* Threads of a library must not be the ones that the client's signal handlers run on. */
void start_thread_or_die(pthread_t *thread, const char *name, void *(*run)(void *), void *argument)
{
    sigset_t all, before;
    int error;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    error = pthread_create(thread, NULL, run, argument);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (error) {
        fprintf(stderr, "vixsim: cannot start the thread %s (error %d)\n", name, error);
        abort();
    }
    pthread_setname_np(*thread, name);
}
