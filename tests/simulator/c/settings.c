/* sim.conf, its faults and their counters. `settings TEST FOLDER` runs one test in a folder of its
 * own. */
#include "settings.h"

#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"

static char folder[3000], state[3100];

/* ---- the parser ---- */

static struct settings parsed(const char *text)
{
    struct settings settings;
    char why[256] = "";
    if (!settings_parse(text, &settings, why, sizeof why)) {
        fprintf(stderr, "%s: %s\n", text, why);
        exit(1);
    }
    return settings;
}

static void check_refused(const char *text, const char *expected)
{
    struct settings settings;
    char why[256] = "";
    CHECK(!settings_parse(text, &settings, why, sizeof why));
    CHECK_TEXT(why, expected);
}

static void test_defaults(void)
{
    struct settings s = parsed("");
    CHECK_TEXT(s.profile.name, "lan");
    CHECK_TEXT(s.transports, "file:san:hotadd:nbdssl:nbd");
    CHECK(s.license && s.fallback && s.san_available && s.san_loop && s.san_keep_open);
    CHECK(!s.san_probe_crash && s.san_cache == SAN_FLAG && s.hotadd_available);
    CHECK(s.hotadd_slots == 15 && s.hotadd_spoils_ctk && s.hotadd_fails && !*s.hotadd_proxy);
    CHECK(s.strict_concurrency == STRICT_ABORT && s.strict_null == STRICT_ABORT);
    CHECK(s.strict_mixed == STRICT_ERROR && s.login_error == 35);
    CHECK(s.session_limit == 52 && s.memory_limit == 50331648 && !s.idle_ns && !s.late_write_ns);
    CHECK(!*s.user && !*s.password && !*s.thumbprint && !s.host_count && !s.fault_count);
    CHECK(!s.chatter_stdout && !s.chatter_stderr && !s.chatter_secrets && !s.seed);
}

#define SETS(text, condition)                                                                      \
    do {                                                                                           \
        struct settings s = parsed(text);                                                          \
        CHECK(condition);                                                                          \
    } while (0)

static void test_keys(void)
{
    SETS("net.latency_us = 5", s.profile.net_latency_ns == 5000);
    SETS("net.jitter=0.25", s.profile.net_jitter == 0.25);
    SETS("net.buffers = 7", s.profile.net_buffers == 7);
    SETS("net.buffer_bytes = 65536", s.profile.net_buffer_bytes == 65536);
    SETS("net.tunable = yes", s.profile.net_tunable);
    SETS("net.handle_bytes_per_s = 9", s.profile.net_handle_rate == 9);
    SETS("net.host_bytes_per_s = 9", s.profile.net_host_rate == 9);
    SETS("net.open_round_trips = 9", s.profile.net_open_trips == 9);
    SETS("device.read_us = 9", s.profile.device_read_ns == 9000);
    SETS("device.write_us = 9", s.profile.device_write_ns == 9000);
    SETS("device.bytes_per_s = 9", s.profile.device_rate == 9);
    SETS("query.call_us = 9", s.profile.query_call_ns == 9000);
    SETS("query.chunk_ns = 9", s.profile.query_chunk_ns == 9);
    SETS("exit_ms = 9", s.profile.exit_ns == 9000000);
    SETS("seed = 18446744073709551615", s.seed == UINT64_MAX);
    SETS("transports = file:nbdssl", !strcmp(s.transports, "file:nbdssl"));
    SETS("license = no", !s.license);
    SETS("unavailable = fail", !s.fallback);
    SETS("san.available = no", !s.san_available);
    SETS("san.device = file", !s.san_loop);
    SETS("san.cache = buffered", s.san_cache == SAN_BUFFERED);
    SETS("san.cache = direct", s.san_cache == SAN_DIRECT);
    SETS("san.keep_open = no", !s.san_keep_open);
    SETS("san.probe_crash = yes", s.san_probe_crash);
    SETS("san.scsi_disk = /nowhere", !strcmp(s.san_scsi_disk, "/nowhere"));
    SETS("hotadd.available = no", !s.hotadd_available);
    SETS("hotadd.slots = 0", s.hotadd_slots == 0);
    SETS("hotadd.proxy = vm-1", !strcmp(s.hotadd_proxy, "vm-1"));
    SETS("hotadd.spoils_tracking = no", !s.hotadd_spoils_ctk);
    SETS("hotadd.refusal = fallback", !s.hotadd_fails);
    SETS("strict.concurrency = error", s.strict_concurrency == STRICT_ERROR);
    SETS("strict.close = off", s.strict_close == STRICT_OFF);
    SETS("strict.threads = error", s.strict_threads == STRICT_ERROR);
    SETS("strict.fork = error", s.strict_fork == STRICT_ERROR);
    SETS("strict.alignment = error", s.strict_alignment == STRICT_ERROR);
    SETS("strict.null = error", s.strict_null == STRICT_ERROR);
    SETS("strict.init = error", s.strict_init == STRICT_ERROR);
    SETS("strict.mixed = abort", s.strict_mixed == STRICT_ABORT);
    SETS("user = backup@vsphere.local", !strcmp(s.user, "backup@vsphere.local"));
    SETS("cookie = 52ab", !strcmp(s.cookie, "52ab"));
    SETS("thumbprint = AA:BB", !strcmp(s.thumbprint, "AA:BB"));
    SETS("login_error = 3014", s.login_error == 3014);
    SETS("sessions.limit = 9", s.session_limit == 9);
    SETS("sessions.memory_bytes = 9", s.memory_limit == 9);
    SETS("sessions.idle_ms = 9", s.idle_ns == 9000000);
    SETS("lock_linger_ms = 9", s.lock_linger_ns == 9000000);
    SETS("late_write_ms = 9", s.late_write_ns == 9000000);
    SETS("chatter.stdout = yes", s.chatter_stdout);
    SETS("chatter.stderr = yes", s.chatter_stderr);
    SETS("chatter.split = yes", s.chatter_split);
    SETS("chatter.secrets = yes", s.chatter_secrets);
    SETS("chatter.phone_home = yes", s.chatter_phone_home);
    SETS("chatter.every = 9", s.chatter_every == 9);
    SETS("log_directory = /tmp/x", !strcmp(s.log_directory, "/tmp/x"));
    SETS("host.esx1 = maintenance\nhost.esx2=down\nhost.esx1=lost",
         s.host_count == 2 && s.hosts[0].state == HOST_LOST && s.hosts[1].state == HOST_DOWN);
}

static void test_lines(void)
{
    SETS("# a comment\n\n  # another\r\n\tuser\t=  me  # not them\r\n", !strcmp(s.user, "me"));
    SETS("password = a#b", !strcmp(s.password, "a#b"));
    SETS("password = \"a #b\\\"\\\\ \"  # c", !strcmp(s.password, "a #b\"\\ "));
    SETS("password =", !*s.password);
    SETS("seed = 1\nseed = 2", s.seed == 2);
    /* A profile sets all of its keys, and what follows changes it. */
    SETS("net.latency_us = 5\nprofile = nbdssl\nnet.buffers = 9",
         s.profile.net_latency_ns == 1000000 && s.profile.net_buffers == 9 &&
             s.profile.net_buffer_bytes == 65536 && s.profile.net_open_trips == 30);
    CHECK(profile_named("nbdssl-tuned")->net_buffer_bytes == 1048576);
    CHECK(profile_named("instant")->exit_ns == 0 && !profile_named("wan"));
    unsigned profiles = 0;
    while (profile_name(profiles))
        CHECK(profile_named(profile_name(profiles++)));
    CHECK_NUMBER(profiles, 6);
}

static void test_refusals(void)
{
    check_refused("seed = 1\nsead = 2\n", "line 2: unknown key sead");
    check_refused("seed", "line 1: not of the form key = value");
    check_refused("\n\nseed = -1", "line 3: not a usable value for seed");
    check_refused("seed = 18446744073709551616", "line 1: not a usable value for seed");
    check_refused("seed =", "line 1: not a usable value for seed");
    check_refused("seed = 1 2", "line 1: not a usable value for seed");
    check_refused("exit_ms = 18446744073709551615", "line 1: not a usable value for exit_ms");
    check_refused("net.jitter = 1.5", "line 1: not a usable value for net.jitter");
    check_refused("license = maybe", "line 1: not a usable value for license");
    check_refused("license = ye", "line 1: not a usable value for license");
    check_refused("strict.null = yes", "line 1: not a usable value for strict.null");
    check_refused("profile = wan", "line 1: not a usable value for profile");
    check_refused("transports = san:tape", "line 1: not a usable value for transports");
    check_refused("transports = san:", "line 1: not a usable value for transports");
    check_refused("login_error = 0", "line 1: not a usable value for login_error");
    check_refused("host.esx1 = gone", "line 1: not a usable value for host.esx1");
    check_refused("host. = up", "line 1: not a usable value for host.");
    /* Never the value: it may be the secret. */
    check_refused("password = \"secret", "line 1: not a usable value for password");
    check_refused("fault =", "line 1: a fault without a function");
    check_refused("fault = Read", "line 1: a fault that does nothing");
    check_refused("fault = Reed error=1", "line 1: unknown function: Reed");
    check_refused("fault = Read explode", "line 1: unknown action: explode");
    check_refused("fault = Read eror=1", "line 1: unknown word: eror=1");
    check_refused("fault = Read error=x", "line 1: not a usable value: error=x");
    check_refused("fault = Read path= hang", "line 1: not a usable value: path=");
    check_refused("fault = Read path=\"x hang", "line 1: a quote that does not end: path=x hang");
    check_refused("fault = Read late_store_ms=1",
                  "line 1: late_store_ms goes with error= or callback_error=");
    check_refused("fault = Read drop",
                  "line 1: callback_error, inline, late_ms and drop are for ReadAsync and WriteAsync");
    check_refused("fault = Open lose",
                  "line 1: stop_host and lose are for calls on an open disk");
    check_refused("fault = FreeInfo segv", "line 1: unknown function: FreeInfo");
    char text[4096];
    memset(text, 'x', sizeof text - 1);
    text[sizeof text - 1] = 0;
    check_refused(text, "line 1: longer than 2047 characters");
}

static void test_faults_parsed(void)
{
    struct settings s = parsed(
        "fault = ReadAsync path=\"[[]ds 1] a/*.vmdk\" transport=nbd after=3 count=2 "
        "probability=0.5 trigger=now at=128 callback_error=14009 late_ms=7 # why\n"
        "fault = * delay_ms=2 hang segv abort scribble lose stop_host\n"
        "fault = Open error=13 late_store_ms=4\n"
        "fault = Open error=13 late_store_ms=4\n");
    const struct fault *fault = s.faults;
    CHECK_NUMBER(s.fault_count, 4);
    CHECK_TEXT(fault->function, "ReadAsync");
    CHECK_TEXT(fault->path, "[[]ds 1] a/*.vmdk");
    CHECK_TEXT(fault->transport, "nbd");
    CHECK_TEXT(fault->trigger, "now");
    CHECK(fault->after == 3 && fault->count == 2 && fault->probability == 0.5 && fault->at == 128);
    CHECK(fault->actions == (FAULT_CALLBACK_ERROR | FAULT_LATE_CALLBACK));
    CHECK(fault->callback_error == 14009 && fault->late_ns == 7000000);
    CHECK(fault[1].actions == (FAULT_DELAY | FAULT_HANG | FAULT_SEGV | FAULT_ABORT |
                               FAULT_SCRIBBLE | FAULT_LOSE | FAULT_STOP_HOST));
    CHECK(fault[1].delay_ns == 2000000 && fault[1].count == UINT64_MAX && fault[1].at == UINT64_MAX);
    CHECK(fault[2].error == 13 && fault[2].late_store_ns == 4000000);
    CHECK(fault[2].id != fault[3].id && fault[2].id != 0);
    CHECK(parsed("fault = * hang # a").faults[0].id != parsed("fault = * hang # b").faults[0].id);
}

/* ---- the file ---- */

static void write_conf(const char *text)
{
    char path[3200], temporary[3200];
    snprintf(path, sizeof path, "%s/sim.conf", folder);
    snprintf(temporary, sizeof temporary, "%s/sim.conf.new", folder);
    FILE *file = fopen(temporary, "w");
    CHECK(file && fputs(text, file) >= 0 && fclose(file) == 0);
    CHECK(rename(temporary, path) == 0);
}

static uint64_t seed_now(struct settings_source *source)
{
    const struct settings *settings = settings_get(source);
    uint64_t seed = settings->seed;
    settings_release(settings);
    return seed;
}

static void test_follows_file(void)
{
    char text[8192], path[3200];
    struct settings_source *source = settings_source_open(folder, state);
    CHECK(source && seed_now(source) == 0 && !settings_error(source, text, sizeof text));
    write_conf("seed = 1\n");
    const struct settings *old = settings_get(source);
    CHECK(old->seed == 1);
    write_conf("seed = 2\n");
    CHECK(seed_now(source) == 2 && old->seed == 1); /* a reference keeps what it was */
    settings_release(old);
    write_conf("seed = 3\nsead = 4\n");
    CHECK(seed_now(source) == 2 && seed_now(source) == 2);
    CHECK(settings_error(source, text, sizeof text));
    CHECK(strstr(text, "/sim.conf: line 2: unknown key sead"));
    CHECK(seed_now(source) == 2 && !settings_error(source, text, sizeof text));
    write_conf("seed = 5\n");
    CHECK(seed_now(source) == 5 && !settings_error(source, text, sizeof text));
    snprintf(path, sizeof path, "%s/sim.conf", folder);
    CHECK(unlink(path) == 0 && seed_now(source) == 0); /* no file: by default */
    CHECK(mkdir(path, 0700) == 0 && seed_now(source) == 0 && settings_error(source, text, sizeof text));
    settings_source_close(source);
    /* Counters that cannot be kept are told about; those of this process take their place. */
    CHECK(rmdir(path) == 0 && (source = settings_source_open(folder, "/proc/nowhere")));
    CHECK(settings_error(source, text, sizeof text) && strstr(text, "by each process alone"));
    settings_source_close(source);
}

/* ---- strikes ---- */

static const struct fault *strike(struct settings_source *source, const char *function,
                                  const char *path, const char *transport, uint64_t start,
                                  uint64_t count)
{
    const struct settings *settings = settings_get(source);
    const struct fault *fault =
        settings_strike(source, settings, function, path, transport, start, count);
    settings_release(settings);
    return fault; /* the source still has these settings */
}

static bool reads(struct settings_source *source)
{
    return strike(source, "Read", "[ds1] a/a.vmdk", "nbd", 0, 8) != NULL;
}

static void test_matching(void)
{
    struct settings_source *source = settings_source_open(folder, state);
    write_conf("fault = Read path=b*.vmdk error=1\nfault = Read transport=san error=2\n"
               "fault = Read at=100 error=3\nfault = Write path=\"[ds1] a/a.vmdk\" error=4\n"
               "fault = Open path=\"?ds1? a/*\" error=5\nfault = Exit delay_ms=1\n");
    CHECK(!strike(source, "Read", "[ds1] b/a.vmdk", "nbd", 0, 8));
    CHECK(strike(source, "Read", "[ds1] a/b1.vmdk", "nbd", 0, 8)->error == 1);
    CHECK(strike(source, "Read", "[ds1] b1.vmdk", "nbd", 0, 8)->error == 1);
    CHECK(strike(source, "Read", "/tmp/b1.vmdk", NULL, 0, 8)->error == 1);
    CHECK(strike(source, "Read", "x", "san", 0, 8)->error == 2);
    CHECK(strike(source, "Read", "x", "nbd", 100, 1)->error == 3);
    CHECK(strike(source, "Read", "x", "nbd", 93, 8)->error == 3);
    CHECK(!strike(source, "Read", "x", "nbd", 92, 8) && !strike(source, "Read", "x", "nbd", 101, 8));
    CHECK(!strike(source, "Read", NULL, NULL, 100, 0));
    CHECK(strike(source, "Write", "[ds1] a/a.vmdk", "nbd", 0, 8)->error == 4);
    CHECK(strike(source, "Open", "[ds1] a/a.vmdk", NULL, 0, 0)->error == 5);
    CHECK(!strike(source, "Open", "[ds2] a/a.vmdk", NULL, 0, 0));
    CHECK(strike(source, "Exit", NULL, NULL, 0, 0)->actions == FAULT_DELAY);
    CHECK(!strike(source, "Close", NULL, NULL, 0, 0));
    settings_source_close(source);
}

/* Children that each call `times` times; how many calls were struck in all. */
static unsigned struck_by_children(unsigned children, unsigned times)
{
    int ends[2];
    unsigned total = 0;
    CHECK(pipe(ends) == 0);
    for (unsigned i = 0; i < children; i++) {
        pid_t child = fork();
        CHECK(child >= 0);
        if (child)
            continue;
        struct settings_source *source = settings_source_open(folder, state);
        unsigned mine = 0;
        for (unsigned n = 0; n < times; n++)
            mine += reads(source);
        CHECK(write(ends[1], &mine, sizeof mine) == sizeof mine);
        settings_source_close(source);
        _exit(0);
    }
    for (unsigned i = 0; i < children; i++) {
        unsigned mine;
        int status;
        CHECK(read(ends[0], &mine, sizeof mine) == sizeof mine);
        CHECK(wait(&status) > 0 && status == 0);
        total += mine;
    }
    close(ends[0]);
    close(ends[1]);
    return total;
}

static void test_counts(void)
{
    write_conf("fault = Read after=100 count=50 error=1\n");
    CHECK_NUMBER(struck_by_children(1, 100), 0); /* what passes is counted over the processes */
    CHECK_NUMBER(struck_by_children(1, 1), 1);
    CHECK_NUMBER(struck_by_children(4, 500), 49);
    CHECK_NUMBER(struck_by_children(1, 500), 0);
    write_conf("fault = Read after=100 count=50 error=2\n"); /* another rule: anew */
    CHECK_NUMBER(struck_by_children(4, 500), 50);
    write_conf("fault = Read after=100 count=50 error=1\n"); /* and this one goes on */
    CHECK_NUMBER(struck_by_children(1, 500), 0);
    write_conf("fault = Read count=2 error=1\nfault = Read count=2 error=1\n");
    CHECK_NUMBER(struck_by_children(2, 100), 4);
    write_conf("fault = Read count=0 error=1\n");
    CHECK_NUMBER(struck_by_children(1, 10), 0);
}

static void test_trigger(void)
{
    char path[3200];
    snprintf(path, sizeof path, "%s/now", folder);
    write_conf("fault = Read trigger=now error=1\n");
    CHECK_NUMBER(struck_by_children(1, 10), 0);
    for (int round = 0; round < 3; round++) {
        int fd = open(path, O_CREAT | O_WRONLY, 0600);
        CHECK(fd >= 0 && close(fd) == 0);
        CHECK_NUMBER(struck_by_children(4, 50), 1);
        CHECK(access(path, F_OK) < 0);
    }
}

static void pattern(const char *where, char *bits, unsigned count)
{
    struct settings_source *source = settings_source_open(folder, where);
    for (unsigned i = 0; i < count; i++)
        bits[i] = reads(source);
    settings_source_close(source);
}

static void test_probability(void)
{
    char one[1000], two[1000], three[1000];
    unsigned struck = 0;
    write_conf("seed = 7\nfault = Read probability=0.25 error=1\n");
    pattern(NULL, one, sizeof one);
    pattern(NULL, two, sizeof two);
    CHECK(!memcmp(one, two, sizeof one)); /* a seed, a sequence */
    pattern(state, three, 500);
    pattern(state, three + 500, 500); /* that goes on in the next process */
    CHECK(!memcmp(one, three, sizeof one));
    write_conf("seed = 8\nfault = Read probability=0.25 error=1\n");
    pattern(NULL, two, sizeof two);
    CHECK(memcmp(one, two, sizeof one));
    for (unsigned i = 0; i < sizeof one; i++)
        struck += (unsigned)one[i];
    CHECK(struck > 190 && struck < 310);
}

/* ---- threads ---- */

static struct settings_source *shared;
static atomic_bool enough;
static atomic_uint struck_in_all;

static void *caller(void *unused)
{
    char text[8192];
    (void)unused;
    while (!enough) {
        const struct settings *settings = settings_get(shared);
        CHECK(settings->seed == settings->session_limit); /* never half of one, half of another */
        if (settings_strike(shared, settings, "Read", NULL, NULL, 0, 1))
            struck_in_all++;
        settings_error(shared, text, sizeof text);
        settings_release(settings);
    }
    return NULL;
}

static void test_threads(void)
{
    pthread_t threads[4];
    write_conf("seed = 1\nsessions.limit = 1\n");
    shared = settings_source_open(folder, state);
    for (int i = 0; i < 4; i++)
        CHECK(pthread_create(&threads[i], NULL, caller, NULL) == 0);
    for (unsigned n = 2; n < 150; n++) {
        char text[256];
        snprintf(text, sizeof text, "seed = %u\nsessions.limit = %u\nfault = Read count=5 error=%u\n%s",
                 n, n, n, n % 10 ? "" : "wrong\n");
        write_conf(text);
        usleep(500);
    }
    unsigned before = struck_in_all;
    write_conf("seed = 1\nsessions.limit = 1\nfault = Read count=5 delay_ms=1\n");
    while (struck_in_all < before + 5)
        usleep(100);
    enough = true;
    for (int i = 0; i < 4; i++)
        CHECK(pthread_join(threads[i], NULL) == 0);
    settings_source_close(shared);
}

int main(int argc, char **argv)
{
    static const struct {
        const char *name;
        void (*run)(void);
    } tests[] = {
        {"defaults", test_defaults},         {"keys", test_keys},
        {"lines", test_lines},               {"refusals", test_refusals},
        {"faults_parsed", test_faults_parsed}, {"follows_file", test_follows_file},
        {"matching", test_matching},         {"counts", test_counts},
        {"trigger", test_trigger},           {"probability", test_probability},
        {"threads", test_threads},
    };
    CHECK(argc == 3);
    snprintf(folder, sizeof folder, "%s", argv[2]);
    snprintf(state, sizeof state, "%s/.sim", argv[2]);
    for (size_t i = 0; i < sizeof tests / sizeof *tests; i++)
        if (!strcmp(tests[i].name, argv[1])) {
            tests[i].run();
            return 0;
        }
    CHECK(!"a known test");
}
