#include "timing.h"

#include <stdlib.h>

#include "memory.h"
#include "random.h"

/* What a handle may send on the host's link before it is another one's turn. */
#define TURN_BYTES (UINT64_C(128) << 10)

struct fragment {
    struct job *job;
    struct list of_job;
    struct list queued; /* in channel->at_trunk */
    struct timer timer;
    uint64_t bytes, left;
    uint64_t ready_ns;   /* for the trunk */
    uint64_t through_ns; /* when the handle's link has passed it on */
    enum { FRAGMENT_LATENCY, FRAGMENT_WAITS, FRAGMENT_STREAMS } stage; /* what its timer is for */
};

static void channel_pump(struct channel *channel, uint64_t at_ns);

static uint64_t later(uint64_t a_ns, uint64_t b_ns)
{
    return a_ns > b_ns ? a_ns : b_ns;
}

static uint64_t transfer_ns(uint64_t bytes, uint64_t rate)
{
    return (uint64_t)((double)bytes * 1e9 / (double)rate);
}

uint64_t timing_latency(uint64_t latency_ns, double jitter, uint64_t *random)
{
    if (latency_ns == 0 || jitter <= 0)
        return latency_ns;
    double factor = 1 + jitter * (2 * random_part(random) - 1);
    return factor > 0 ? (uint64_t)((double)latency_ns * factor) : 0;
}

/* ---- fragments ---- */

static void fragment_free(struct fragment *fragment)
{
    struct channel *channel = fragment->job->channel;
    timers_clear(channel->timers, &fragment->timer);
    list_remove(&fragment->of_job);
    list_remove(&fragment->queued);
    if (list_empty(&channel->at_trunk))
        list_remove(&channel->turn);
    if (channel->trunk != NULL && channel->trunk->serving == fragment)
        channel->trunk->serving = NULL;
    channel->in_flight--;
    free(fragment);
}

static void fragment_finish(struct fragment *fragment, uint64_t at_ns)
{
    struct job *job = fragment->job;
    struct channel *channel = job->channel;
    fragment_free(fragment);
    if (!job->cut || !list_empty(&job->fragments)) {
        channel_pump(channel, at_ns);
        return;
    }
    /* Before `done`: that may end the session, and the channel with it. */
    channel_pump(channel, at_ns);
    job->done(job, at_ns);
}

/* ---- the host's link ---- */

/* What is faster than the handle's link still has that one's pace. */
static void fragment_left_trunk(struct fragment *fragment, uint64_t at_ns)
{
    if (fragment->through_ns <= at_ns) {
        fragment_finish(fragment, at_ns);
        return;
    }
    fragment->stage = FRAGMENT_STREAMS;
    timers_set(fragment->job->channel->timers, &fragment->timer, fragment->through_ns);
}

static void trunk_serve(struct trunk *trunk)
{
    struct channel *channel = LIST_OF(trunk->waiting.next, struct channel, turn);
    struct fragment *fragment = LIST_OF(channel->at_trunk.next, struct fragment, queued);
    list_remove(&channel->turn);
    list_remove(&fragment->queued);
    if (!list_empty(&channel->at_trunk))
        list_append(&trunk->waiting, &channel->turn);
    uint64_t bytes = fragment->left < TURN_BYTES ? fragment->left : TURN_BYTES;
    uint64_t rate = channel->rates.host_rate;
    fragment->left -= bytes;
    trunk->free_ns = later(trunk->free_ns, fragment->ready_ns);
    if (rate > 0)
        trunk->free_ns += transfer_ns(bytes, rate);
    trunk->serving = fragment;
}

static void trunk_served(struct trunk *trunk)
{
    struct fragment *fragment = trunk->serving;
    struct channel *channel = fragment->job->channel;
    trunk->serving = NULL;
    if (fragment->left == 0) {
        fragment_left_trunk(fragment, trunk->free_ns);
        return;
    }
    list_prepend(&channel->at_trunk, &fragment->queued);
    list_remove(&channel->turn);
    list_append(&trunk->waiting, &channel->turn);
}

static void trunk_pump(struct trunk *trunk, uint64_t at_ns)
{
    if (trunk->pumping)
        return;
    trunk->pumping = true;
    if (at_ns > TIMERS_SLIP_NS)
        trunk->free_ns = later(trunk->free_ns, at_ns - TIMERS_SLIP_NS);
    for (;;) {
        if (trunk->serving != NULL && trunk->free_ns > at_ns)
            break;
        if (trunk->serving != NULL)
            trunk_served(trunk);
        else if (trunk->free_ns <= at_ns && !list_empty(&trunk->waiting))
            trunk_serve(trunk);
        else
            break;
    }
    trunk->pumping = false;
    if (trunk->serving != NULL || !list_empty(&trunk->waiting))
        timers_set(trunk->timers, &trunk->timer, trunk->free_ns);
}

static void trunk_fired(struct timer *timer, uint64_t at_ns)
{
    trunk_pump(LIST_OF(timer, struct trunk, timer), at_ns);
}

void trunk_init(struct trunk *trunk, struct timers *timers)
{
    *trunk = (struct trunk){.timers = timers, .timer.fire = trunk_fired};
    list_init(&trunk->waiting);
}

/* ---- the handle's link ---- */

static void fragment_to_trunk(struct fragment *fragment, uint64_t at_ns)
{
    struct channel *channel = fragment->job->channel;
    if (channel->trunk == NULL || channel->rates.host_rate == 0) {
        fragment_left_trunk(fragment, at_ns);
        return;
    }
    fragment->ready_ns = at_ns;
    list_append(&channel->at_trunk, &fragment->queued);
    if (list_empty(&channel->turn))
        list_append(&channel->trunk->waiting, &channel->turn);
    trunk_pump(channel->trunk, at_ns);
}

static void fragment_arrived(struct fragment *fragment, uint64_t at_ns)
{
    struct channel *channel = fragment->job->channel;
    uint64_t begins_ns = at_ns;
    if (channel->rates.handle_rate > 0) {
        begins_ns = later(channel->free_ns, at_ns);
        channel->free_ns = begins_ns + transfer_ns(fragment->bytes, channel->rates.handle_rate);
        fragment->through_ns = channel->free_ns;
    }
    if (begins_ns == at_ns) {
        fragment_to_trunk(fragment, at_ns);
        return;
    }
    fragment->stage = FRAGMENT_WAITS;
    timers_set(channel->timers, &fragment->timer, begins_ns);
}

static void fragment_fired(struct timer *timer, uint64_t at_ns)
{
    struct fragment *fragment = LIST_OF(timer, struct fragment, timer);
    if (fragment->stage == FRAGMENT_LATENCY)
        fragment_arrived(fragment, at_ns);
    else if (fragment->stage == FRAGMENT_WAITS)
        fragment_to_trunk(fragment, at_ns);
    else
        fragment_finish(fragment, at_ns);
}

static struct fragment *fragment_cut(struct channel *channel)
{
    struct job *job = LIST_OF(channel->jobs.next, struct job, place);
    uint64_t most = channel->rates.buffer_bytes;
    struct fragment *fragment = memory_zeroed(1, sizeof *fragment);
    fragment->job = job;
    fragment->bytes = most > 0 && job->uncut > most ? most : job->uncut;
    fragment->left = fragment->bytes;
    fragment->timer.fire = fragment_fired;
    list_init(&fragment->queued);
    list_append(&job->fragments, &fragment->of_job);
    job->uncut -= fragment->bytes;
    if (job->uncut == 0) {
        job->cut = true;
        list_remove(&job->place);
    }
    channel->in_flight++;
    return fragment;
}

static void channel_pump(struct channel *channel, uint64_t at_ns)
{
    if (channel->pumping)
        return;
    channel->pumping = true;
    const struct timing_rates *rates = &channel->rates;
    while (!list_empty(&channel->jobs) &&
           (rates->buffers == 0 || channel->in_flight < rates->buffers)) {
        struct fragment *fragment = fragment_cut(channel);
        uint64_t latency = timing_latency(rates->latency_ns, rates->jitter, channel->random);
        /* A timer even for no latency at all: what is done may end the channel, which this loop
         * still needs. The heap fires it in the same turn. */
        timers_set(channel->timers, &fragment->timer, at_ns + latency);
    }
    channel->pumping = false;
}

void channel_init(struct channel *channel, struct timers *timers, uint64_t *random,
                  struct trunk *trunk)
{
    *channel = (struct channel){.timers = timers, .random = random, .trunk = trunk};
    list_init(&channel->jobs);
    list_init(&channel->at_trunk);
    list_init(&channel->turn);
}

bool channel_is_instant(const struct channel *channel)
{
    return channel->rates.latency_ns == 0 && channel->rates.handle_rate == 0 &&
           channel->rates.host_rate == 0 && channel->in_flight == 0 && list_empty(&channel->jobs);
}

void job_start(struct job *job, struct channel *channel, uint64_t bytes,
               void (*done)(struct job *job, uint64_t at_ns), uint64_t now_ns)
{
    *job = (struct job){.channel = channel, .uncut = bytes, .done = done};
    list_init(&job->fragments);
    list_init(&job->place);
    if (channel_is_instant(channel)) {
        job->cut = true;
        done(job, now_ns);
        return;
    }
    list_append(&channel->jobs, &job->place);
    channel_pump(channel, now_ns);
}

void job_cancel(struct job *job, uint64_t now_ns)
{
    list_remove(&job->place);
    LIST_EACH(link, after, &job->fragments)
        fragment_free(LIST_OF(link, struct fragment, of_job));
    channel_pump(job->channel, now_ns);
}
