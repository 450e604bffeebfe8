/* The timing model of the host process, in made-up time: each test prints nothing and returns 0. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "timing.h"

#define MS UINT64_C(1000000)
#define KIB UINT64_C(1024)

#define CHECK(condition)                                                            \
    do {                                                                            \
        if (!(condition)) {                                                         \
            fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
            exit(1);                                                                \
        }                                                                           \
    } while (0)

struct item {
    struct job job;
    uint64_t done_ns; /* 0: not yet */
};

static struct timers timers;
static struct trunk trunk;
static uint64_t choices = 1;

static void done(struct job *job, uint64_t at_ns)
{
    struct item *item = LIST_OF(job, struct item, job);
    CHECK(item->done_ns == 0);
    item->done_ns = at_ns;
}

static void begin(struct channel *channel, struct timing_rates rates)
{
    channel_init(channel, &timers, &choices, &trunk);
    channel->rates = rates;
}

/* From time 1 on, since 0 stands for what is not done. */
static void start(struct item *items, unsigned count, struct channel *channel, uint64_t bytes)
{
    for (unsigned i = 0; i < count; i++) {
        items[i].done_ns = 0;
        job_start(&items[i].job, channel, bytes, done, 1);
    }
}

/* The clock goes by ticks that are coarser than what happens: that must not add up. */
static void run(uint64_t until_ns)
{
    for (uint64_t now = 1; now <= until_ns; now += 70000)
        timers_run(&timers, now);
    timers_run(&timers, until_ns);
}

static bool close_to(uint64_t at_ns, uint64_t wanted_ns)
{
    uint64_t slack = wanted_ns / 100 + 1000;
    return at_ns >= wanted_ns - slack && at_ns <= wanted_ns + slack;
}

static void test_nothing_takes_time(void)
{
    struct channel channel;
    struct item items[3];
    begin(&channel, (struct timing_rates){0});
    start(items, 3, &channel, 1 << 20);
    for (int i = 0; i < 3; i++)
        CHECK(items[i].done_ns == 1);
}

static void test_latencies_overlap(void)
{
    struct channel channel;
    struct item items[64];
    begin(&channel, (struct timing_rates){.latency_ns = MS});
    start(items, 64, &channel, 4 * KIB);
    run(2 * MS);
    for (int i = 0; i < 64; i++)
        CHECK(close_to(items[i].done_ns, MS));
}

static void test_jitter_goes_either_way(void)
{
    uint64_t least = UINT64_MAX, most = 0;
    for (int i = 0; i < 1000; i++) {
        uint64_t latency = timing_latency(MS, 0.1, &choices);
        least = latency < least ? latency : least;
        most = latency > most ? latency : most;
    }
    CHECK(least >= 900000 && least < 905000);
    CHECK(most <= 1100000 && most > 1095000);
}

static void test_fragments_wait_for_buffers(void)
{
    struct channel channel;
    struct item items[2];
    begin(&channel, (struct timing_rates){.latency_ns = MS, .buffers = 4, .buffer_bytes = 64 * KIB});
    start(items, 2, &channel, 512 * KIB); /* 8 fragments each: four turns of four */
    run(10 * MS);
    CHECK(close_to(items[0].done_ns, 2 * MS));
    CHECK(close_to(items[1].done_ns, 4 * MS));
}

static void test_a_handle_has_its_rate(void)
{
    struct channel channel;
    struct item items[16];
    begin(&channel, (struct timing_rates){.latency_ns = MS,
                                          .buffers = 4,
                                          .buffer_bytes = 64 * KIB,
                                          .handle_rate = 65536000}); /* a fragment a millisecond */
    start(items, 16, &channel, 64 * KIB);
    run(30 * MS);
    for (int i = 0; i < 16; i++)
        CHECK(close_to(items[i].done_ns, (uint64_t)(i + 2) * MS));
}

static void test_links_stream(void)
{
    struct channel channel;
    struct item item;
    begin(&channel, (struct timing_rates){.latency_ns = MS,
                                          .handle_rate = 131072000,
                                          .host_rate = 262144000});
    start(&item, 1, &channel, 1024 * KIB);
    run(20 * MS);
    CHECK(close_to(item.done_ns, 9 * MS)); /* not 13: it does not wait to be whole */
}

static void test_handles_share_their_host(void)
{
    struct channel many, few;
    struct item large[32], small;
    struct timing_rates rates = {.host_rate = 131072000}; /* 128 KiB a millisecond */
    begin(&many, rates);
    begin(&few, rates);
    start(large, 32, &many, 1024 * KIB);
    start(&small, 1, &few, 128 * KIB);
    run(300 * MS);
    CHECK(small.done_ns <= 3 * MS); /* though 32 MiB were there before */
    CHECK(close_to(large[0].done_ns, 9 * MS));
    CHECK(close_to(large[31].done_ns, 257 * MS));
}

static void test_what_is_cancelled_is_not_done(void)
{
    struct channel channel;
    struct item items[3];
    begin(&channel, (struct timing_rates){.latency_ns = MS,
                                          .buffers = 2,
                                          .buffer_bytes = 64 * KIB,
                                          .handle_rate = 655360000,
                                          .host_rate = 131072000});
    start(items, 3, &channel, 256 * KIB);
    for (uint64_t now = 1; now < 3 * MS; now += 70000)
        timers_run(&timers, now);
    job_cancel(&items[0].job, 3 * MS);
    job_cancel(&items[2].job, 3 * MS);
    run(50 * MS);
    CHECK(items[0].done_ns == 0 && items[2].done_ns == 0);
    CHECK(items[1].done_ns > 3 * MS && items[1].done_ns < 20 * MS);
    CHECK(channel.in_flight == 0 && timers.used == 0);
}

static void test_a_stopped_host_does_not_catch_up(void)
{
    struct channel channel;
    struct item items[8];
    begin(&channel, (struct timing_rates){.latency_ns = MS, .buffers = 1});
    start(items, 8, &channel, 512);
    timers_run(&timers, 1000 * MS); /* the first tick after a second */
    CHECK(items[0].done_ns >= 998 * MS);
    CHECK(items[7].done_ns == 0);
    run(2000 * MS);
    CHECK(items[7].done_ns >= 1004 * MS);
}

static void test_rates_may_change(void)
{
    struct channel channel;
    struct item item;
    begin(&channel, (struct timing_rates){.latency_ns = MS, .buffers = 1, .buffer_bytes = KIB});
    start(&item, 1, &channel, 64 * KIB);
    for (uint64_t now = 1; now < 10 * MS; now += 70000)
        timers_run(&timers, now);
    CHECK(item.done_ns == 0);
    channel.rates = (struct timing_rates){0};
    run(12 * MS);
    CHECK(item.done_ns > 0 && item.done_ns <= 12 * MS);
}

static const struct {
    const char *name;
    void (*run)(void);
} tests[] = {
    {"nothing_takes_time", test_nothing_takes_time},
    {"latencies_overlap", test_latencies_overlap},
    {"jitter_goes_either_way", test_jitter_goes_either_way},
    {"fragments_wait_for_buffers", test_fragments_wait_for_buffers},
    {"a_handle_has_its_rate", test_a_handle_has_its_rate},
    {"links_stream", test_links_stream},
    {"handles_share_their_host", test_handles_share_their_host},
    {"what_is_cancelled_is_not_done", test_what_is_cancelled_is_not_done},
    {"a_stopped_host_does_not_catch_up", test_a_stopped_host_does_not_catch_up},
    {"rates_may_change", test_rates_may_change},
};

int main(int argc, char **argv)
{
    for (size_t i = 0; i < sizeof tests / sizeof *tests; i++) {
        if (argc == 2 && strcmp(argv[1], tests[i].name) == 0) {
            trunk_init(&trunk, &timers);
            tests[i].run();
            timers_free(&timers);
            return 0;
        }
    }
    fprintf(stderr, "there is no such test\n");
    return 2;
}
