/*
 * One workload: a thread for each disk keeps `depth` asynchronous requests outstanding on its handle.
 *
 * The thread is the only one that calls the library for that handle. A callback may come from any
 * thread, inside the call that started the request too: it takes no lock, puts its request on a
 * stack that the thread empties, and posts a semaphore.
 */
#include "limits_run.h"

#include <pthread.h>
#include <semaphore.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define SAMPLES_MAX 200000u /* of latencies, for one disk */
#define ALIGNMENT 4096

struct runner;

struct slot {
    struct runner *runner;
    struct slot *next;
    uint8_t *buffer;
    double started, ended;
    VixError error;
};

struct runner {
    const struct kit *kit;
    const struct workload *workload;
    struct disk *disk;
    double seconds;
    _Atomic(struct slot *) completed;
    sem_t ready;
    struct slot *slots;
    uint64_t position, dice;
    /* what came out */
    float *samples;
    uint64_t requests;
    double sum, began, finished;
    long long failed;
    pthread_t thread;
};

static void on_completion(void *data, VixError error)
{
    struct slot *slot = data;
    struct runner *runner = slot->runner;
    slot->ended = kit_seconds();
    slot->error = error;
    slot->next = atomic_load(&runner->completed);
    while (!atomic_compare_exchange_weak(&runner->completed, &slot->next, slot))
        continue;
    sem_post(&runner->ready);
}

/* The next place of this workload, in sectors. */
static uint64_t next_start(struct runner *runner)
{
    uint64_t length = runner->workload->bytes / VIXDISKLIB_SECTOR_SIZE;
    uint64_t places = runner->disk->sectors / length;
    if (!runner->workload->random)
        return runner->position++ % places * length;
    runner->dice ^= runner->dice << 13;
    runner->dice ^= runner->dice >> 7;
    runner->dice ^= runner->dice << 17;
    return runner->dice % places * length;
}

/* The library calls back for a request that it took, and for no other. */
static void submit(struct runner *runner, struct slot *slot)
{
    uint64_t start = next_start(runner), count = runner->workload->bytes / VIXDISKLIB_SECTOR_SIZE;
    slot->started = kit_seconds();
    VixError error =
        runner->workload->write
            ? runner->kit->WriteAsync(runner->disk->handle, start, count, slot->buffer,
                                      on_completion, slot)
            : runner->kit->ReadAsync(runner->disk->handle, start, count, slot->buffer,
                                     on_completion, slot);
    if (VIX_ERROR_CODE(error) != VIX_ASYNC)
        on_completion(slot, error ? error : VIX_E_FAIL);
}

static void account(struct runner *runner, const struct slot *slot)
{
    double latency = slot->ended - slot->started;
    if (slot->error && !runner->failed)
        runner->failed = (long long)VIX_ERROR_CODE(slot->error);
    if (runner->requests < SAMPLES_MAX)
        runner->samples[runner->requests] = (float)latency;
    runner->sum += latency;
    runner->requests++;
    if (slot->ended > runner->finished)
        runner->finished = slot->ended;
}

static void *run(void *data)
{
    struct runner *runner = data;
    struct slot *taken = NULL;
    unsigned outstanding = 0;
    runner->began = kit_seconds();
    for (unsigned i = 0; i < runner->workload->depth; i++, outstanding++)
        submit(runner, &runner->slots[i]);
    while (outstanding) {
        while (sem_wait(&runner->ready))
            continue;
        if (!taken)
            taken = atomic_exchange(&runner->completed, NULL);
        struct slot *slot = taken;
        taken = slot->next;
        account(runner, slot);
        if (runner->failed || kit_seconds() - runner->began >= runner->seconds)
            outstanding--;
        else
            submit(runner, slot);
    }
    return NULL;
}

static bool prepare(struct runner *runner, const struct kit *kit, struct disk *disk,
                    const struct workload *workload, double seconds, unsigned number)
{
    *runner = (struct runner){.kit = kit, .workload = workload, .disk = disk, .seconds = seconds,
                              .dice = 88172645463325252u + number};
    sem_init(&runner->ready, 0, 0);
    runner->samples = malloc(SAMPLES_MAX * sizeof *runner->samples);
    runner->slots = calloc(workload->depth, sizeof *runner->slots);
    if (!runner->samples || !runner->slots)
        return false;
    for (unsigned i = 0; i < workload->depth; i++) {
        struct slot *slot = &runner->slots[i];
        void *buffer;
        if (posix_memalign(&buffer, ALIGNMENT, workload->bytes))
            return false;
        /* Touched before the clock runs; and zeros would be no honest thing to write. */
        memset(buffer, (int)(0xa0 + i), workload->bytes);
        *slot = (struct slot){.runner = runner, .buffer = buffer};
    }
    return true;
}

static void clear(struct runner *runner)
{
    for (unsigned i = 0; runner->slots && i < runner->workload->depth; i++)
        free(runner->slots[i].buffer);
    free(runner->slots);
    free(runner->samples);
    if (runner->kit)
        sem_destroy(&runner->ready);
}

static int by_size(const void *one, const void *other)
{
    float a = *(const float *)one, b = *(const float *)other;
    return (a > b) - (a < b);
}

/* All runners into one figure: what they did together, from the first start to the last end. */
static long long summarize(const struct runner *runners, unsigned count, struct outcome *outcome)
{
    double began = runners->began, finished = runners->finished, sum = 0;
    size_t samples = 0;
    long long failed = 0;
    float *all = malloc(count * SAMPLES_MAX * sizeof *all);
    if (!all)
        return -1;
    *outcome = (struct outcome){0};
    for (unsigned i = 0; i < count; i++) {
        const struct runner *runner = &runners[i];
        size_t own = runner->requests < SAMPLES_MAX ? runner->requests : SAMPLES_MAX;
        memcpy(all + samples, runner->samples, own * sizeof *all);
        samples += own;
        sum += runner->sum;
        outcome->requests += runner->requests;
        began = runner->began < began ? runner->began : began;
        finished = runner->finished > finished ? runner->finished : finished;
        failed = failed ? failed : runner->failed;
    }
    qsort(all, samples, sizeof *all, by_size);
    outcome->seconds = finished - began;
    outcome->requests_per_s = (double)outcome->requests / outcome->seconds;
    outcome->bytes_per_s = outcome->requests_per_s * runners->workload->bytes;
    outcome->mean_ms = sum / (double)outcome->requests * 1e3;
    outcome->median_ms = all[samples / 2] * 1e3;
    outcome->p99_ms = all[samples * 99 / 100] * 1e3;
    free(all);
    return failed;
}

long long limits_run(const struct kit *kit, struct disk *disks, unsigned count,
                     const struct workload *workload, double seconds, struct outcome *outcome)
{
    struct runner *runners = calloc(count, sizeof *runners);
    bool ready = runners != NULL;
    unsigned started = 0;
    for (unsigned i = 0; ready && i < count; i++)
        ready = prepare(&runners[i], kit, &disks[i], workload, seconds, i);
    while (ready && started < count) {
        ready = !pthread_create(&runners[started].thread, NULL, run, &runners[started]);
        started += ready;
    }
    for (unsigned i = 0; i < started; i++)
        pthread_join(runners[i].thread, NULL);
    long long failed = ready ? summarize(runners, count, outcome) : -1;
    for (unsigned i = 0; runners && i < count; i++)
        clear(&runners[i]);
    free(runners);
    return failed;
}
