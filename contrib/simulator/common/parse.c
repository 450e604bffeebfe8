/* sim.conf as text -> struct settings. */
#include "parse.h"

#include <stdio.h>
#include <string.h>

#define LINE_ROOM 2048
#define US 1000ull
#define MS 1000000ull

/* ---- the keys ---- */

enum kind {
    TEXT,   /* an array of `size` characters */
    BOOL,   /* one of two words, the one for false first */
    CHOICE, /* one of several words; an int, their number from 0 */
    NUMBER, /* uint64_t, times `scale` */
    PART,   /* double, 0 to 1 */
    CODE,   /* int, an error code */
};

struct key {
    const char *name;
    enum kind kind;
    size_t offset, size;
    uint64_t scale;
    const char *words;
};

#define FIELD(f) offsetof(struct settings, f), sizeof(((struct settings *)0)->f)
#define TEXT_KEY(n, f) {n, TEXT, FIELD(f), 0, NULL}
#define BOOL_KEY(n, f, w) {n, BOOL, FIELD(f), 0, w}
#define CHOICE_KEY(n, f, w) {n, CHOICE, FIELD(f), 0, w}
#define NUMBER_KEY(n, f, s) {n, NUMBER, FIELD(f), s, NULL}
#define YES_NO "no|yes"
#define STRICT_KEY(n) CHOICE_KEY("strict." #n, strict_##n, "off|error|abort")

static const struct key keys[] = {
    NUMBER_KEY("net.latency_us", profile.net_latency_ns, US),
    {"net.jitter", PART, FIELD(profile.net_jitter), 0, NULL},
    NUMBER_KEY("net.buffers", profile.net_buffers, 1),
    NUMBER_KEY("net.buffer_bytes", profile.net_buffer_bytes, 1),
    BOOL_KEY("net.tunable", profile.net_tunable, YES_NO),
    NUMBER_KEY("net.handle_bytes_per_s", profile.net_handle_rate, 1),
    NUMBER_KEY("net.host_bytes_per_s", profile.net_host_rate, 1),
    NUMBER_KEY("net.open_round_trips", profile.net_open_trips, 1),
    NUMBER_KEY("device.read_us", profile.device_read_ns, US),
    NUMBER_KEY("device.write_us", profile.device_write_ns, US),
    NUMBER_KEY("device.bytes_per_s", profile.device_rate, 1),
    NUMBER_KEY("query.call_us", profile.query_call_ns, US),
    NUMBER_KEY("query.chunk_ns", profile.query_chunk_ns, 1),
    NUMBER_KEY("exit_ms", profile.exit_ns, MS),
    NUMBER_KEY("seed", seed, 1),
    BOOL_KEY("license", license, YES_NO),
    BOOL_KEY("unavailable", fallback, "fail|fallback"),
    BOOL_KEY("san.available", san_available, YES_NO),
    BOOL_KEY("san.device", san_loop, "file|loop"),
    CHOICE_KEY("san.cache", san_cache, "flag|buffered|direct"),
    BOOL_KEY("san.keep_open", san_keep_open, YES_NO),
    BOOL_KEY("san.probe_crash", san_probe_crash, YES_NO),
    TEXT_KEY("san.scsi_disk", san_scsi_disk),
    BOOL_KEY("hotadd.available", hotadd_available, YES_NO),
    NUMBER_KEY("hotadd.slots", hotadd_slots, 1),
    TEXT_KEY("hotadd.proxy", hotadd_proxy),
    BOOL_KEY("hotadd.spoils_tracking", hotadd_spoils_ctk, YES_NO),
    BOOL_KEY("hotadd.refusal", hotadd_fails, "fallback|error"),
    STRICT_KEY(concurrency),
    STRICT_KEY(close),
    STRICT_KEY(threads),
    STRICT_KEY(fork),
    STRICT_KEY(alignment),
    STRICT_KEY(null),
    STRICT_KEY(init),
    STRICT_KEY(mixed),
    TEXT_KEY("user", user),
    TEXT_KEY("password", password),
    TEXT_KEY("cookie", cookie),
    TEXT_KEY("thumbprint", thumbprint),
    {"login_error", CODE, FIELD(login_error), 0, NULL},
    NUMBER_KEY("sessions.limit", session_limit, 1),
    NUMBER_KEY("sessions.memory_bytes", memory_limit, 1),
    NUMBER_KEY("sessions.idle_ms", idle_ns, MS),
    NUMBER_KEY("lock_linger_ms", lock_linger_ns, MS),
    NUMBER_KEY("late_write_ms", late_write_ns, MS),
    BOOL_KEY("chatter.stdout", chatter_stdout, YES_NO),
    BOOL_KEY("chatter.stderr", chatter_stderr, YES_NO),
    BOOL_KEY("chatter.split", chatter_split, YES_NO),
    BOOL_KEY("chatter.secrets", chatter_secrets, YES_NO),
    BOOL_KEY("chatter.phone_home", chatter_phone_home, YES_NO),
    BOOL_KEY("chatter.log", chatter_log, YES_NO),
    NUMBER_KEY("chatter.every", chatter_every, 1),
    BOOL_KEY("errors.upper_bits", upper_bits, YES_NO),
    TEXT_KEY("log_directory", log_directory),
};

_Static_assert(sizeof(enum strictness) == sizeof(int) && STRICT_ERROR == 1 && STRICT_ABORT == 2 &&
                   sizeof(((struct settings *)0)->san_cache) == sizeof(int) && SAN_BUFFERED == 1 &&
                   SAN_DIRECT == 2,
               "a CHOICE is an int, in the order of its words");

void settings_defaults(struct settings *settings)
{
    *settings = (struct settings){
        .profile = *profile_named("lan"),
        .transports = "file:san:hotadd:nbdssl:nbd",
        .license = true,
        .fallback = true,
        .san_available = true,
        .san_loop = true,
        .san_cache = SAN_FLAG,
        .san_keep_open = true,
        .san_scsi_disk = "/sys/class/scsi_disk",
        .hotadd_available = true,
        .hotadd_slots = 15,
        .hotadd_spoils_ctk = true,
        .hotadd_fails = true,
        .strict_concurrency = STRICT_ABORT,
        .strict_close = STRICT_ABORT,
        .strict_threads = STRICT_ABORT,
        .strict_fork = STRICT_ABORT,
        .strict_alignment = STRICT_ABORT,
        .strict_null = STRICT_ABORT,
        .strict_init = STRICT_ABORT,
        .strict_mixed = STRICT_ERROR,
        .login_error = 35,
        .session_limit = 52,
        .memory_limit = 50331648,
        .chatter_every = 1,
    };
}

/* ---- values ---- */

/* The number of `value` among the `words` "a|b|c", or -1. */
static int word_index(const char *words, const char *value)
{
    size_t length = strlen(value);
    for (int index = 0;; index++) {
        size_t word = strcspn(words, "|");
        if (word == length && !memcmp(words, value, length))
            return index;
        if (!words[word])
            return -1;
        words += word + 1;
    }
}

static bool set_key(const struct key *key, const char *value, struct settings *settings)
{
    void *field = (char *)settings + key->offset;
    int index;
    switch (key->kind) {
    case TEXT:
        if (strlen(value) >= key->size)
            return false;
        strcpy(field, value);
        return true;
    case BOOL:
        index = word_index(key->words, value);
        *(bool *)field = index == 1;
        return index >= 0;
    case CHOICE:
        index = word_index(key->words, value);
        *(int *)field = index;
        return index >= 0;
    case NUMBER:
        return parse_number(value, key->scale, field);
    case PART:
        return parse_part(value, field);
    case CODE:
        return parse_code(value, field);
    }
    return false;
}

static bool set_profile(const char *value, struct settings *settings)
{
    const struct profile *profile = profile_named(value);
    if (profile)
        settings->profile = *profile;
    return profile != NULL;
}

static bool set_transports(const char *value, struct settings *settings)
{
    for (const char *from = value; *from || from == value;) {
        char name[16] = "";
        size_t length = strcspn(from, ":");
        if (length >= sizeof name)
            return false;
        memcpy(name, from, length);
        if (word_index("file|san|hotadd|nbdssl|nbd", name) < 0)
            return false;
        from += length + (from[length] == ':');
        if (!*from && from[-1] == ':')
            return false;
    }
    if (strlen(value) >= sizeof settings->transports)
        return false;
    strcpy(settings->transports, value);
    return true;
}

static bool set_host(const char *name, const char *value, struct settings *settings)
{
    int state = word_index("up|shutdown|maintenance|lost|down", value);
    if (state < 0 || !*name || strlen(name) >= sizeof settings->hosts->name)
        return false;
    size_t i = 0;
    while (i < settings->host_count && strcmp(settings->hosts[i].name, name))
        i++;
    if (i == sizeof settings->hosts / sizeof *settings->hosts)
        return false;
    if (i == settings->host_count)
        settings->host_count++;
    strcpy(settings->hosts[i].name, name);
    settings->hosts[i].state = state;
    return true;
}

_Static_assert(HOST_UP == 0 && HOST_DOWN == 4, "the order of the words of host.NAME");

/* ---- lines ---- */

/* A value in quotes without them, with \ before " and \; in place. */
static bool unquote(char *value)
{
    size_t length = strlen(value);
    if (*value != '"')
        return true;
    char *to = value;
    for (char *from = value + 1; *from; from++) {
        if (*from == '"') {
            *to = 0;
            return from == value + length - 1;
        }
        if (*from == '\\' && (from[1] == '"' || from[1] == '\\'))
            from++;
        *to++ = *from;
    }
    return false;
}

/* Cuts a comment off: # at the beginning or after a blank, but not in quotes. */
static void cut_comment(char *line)
{
    bool quoted = false;
    for (char *at = line; *at; at++) {
        if (quoted && *at == '\\' && at[1])
            at++;
        else if (*at == '"')
            quoted = !quoted;
        else if (*at == '#' && !quoted && (at == line || at[-1] == ' ' || at[-1] == '\t')) {
            *at = 0;
            return;
        }
    }
}

static char *trimmed(char *text)
{
    text += strspn(text, " \t");
    size_t length = strlen(text);
    while (length && strchr(" \t\r", text[length - 1]))
        length--;
    text[length] = 0;
    return text;
}

/* FNV-1a, of the line with its comment: to add one is a way to let a rule count anew. A line that is
 * there several times has as many counters. */
static uint64_t line_id(const char *line, const struct settings *settings)
{
    uint64_t hash = 0xcbf29ce484222325;
    for (; *line; line++)
        hash = (hash ^ (unsigned char)*line) * 0x100000001b3;
    hash += !hash; /* 0 is no id */
    for (size_t i = 0; i < settings->fault_count; i++)
        if (settings->faults[i].id == hash)
            hash = hash * 0x100000001b3 + 1, i = (size_t)-1;
    return hash;
}

static bool add_fault(char *value, uint64_t id, struct settings *settings, char *why, size_t size)
{
    if (settings->fault_count == sizeof settings->faults / sizeof *settings->faults) {
        snprintf(why, size, "too many faults");
        return false;
    }
    if (!parse_fault(value, id, &settings->faults[settings->fault_count], why, size))
        return false;
    settings->fault_count++;
    return true;
}

/* Values are not repeated in `why`: some are secrets. */
static bool parse_line(char *line, struct settings *settings, char *why, size_t size)
{
    line = trimmed(line);
    uint64_t id = line_id(line, settings);
    cut_comment(line);
    line = trimmed(line);
    if (!*line)
        return true;
    char *value = strchr(line, '=');
    if (!value) {
        snprintf(why, size, "not of the form key = value");
        return false;
    }
    *value++ = 0;
    char *name = trimmed(line);
    value = trimmed(value);
    if (!strcmp(name, "fault"))
        return add_fault(value, id, settings, why, size);
    bool ok = unquote(value);
    const struct key *key = keys, *end = keys + sizeof keys / sizeof *keys;
    if (!strcmp(name, "profile"))
        ok = ok && set_profile(value, settings);
    else if (!strcmp(name, "transports"))
        ok = ok && set_transports(value, settings);
    else if (!strncmp(name, "host.", 5))
        ok = ok && set_host(name + 5, value, settings);
    else {
        while (key < end && strcmp(key->name, name))
            key++;
        ok = ok && key < end && set_key(key, value, settings);
    }
    if (!ok)
        snprintf(why, size, key < end ? "not a usable value for %s" : "unknown key %s", name);
    return ok;
}

bool settings_parse(const char *text, struct settings *settings, char *why, size_t size)
{
    settings_defaults(settings);
    for (unsigned number = 1; *text; number++) {
        char line[LINE_ROOM], reason[256];
        size_t length = strcspn(text, "\n");
        bool ok = length < sizeof line;
        if (ok) {
            memcpy(line, text, length);
            line[length] = 0;
            ok = parse_line(line, settings, reason, sizeof reason);
        } else
            snprintf(reason, sizeof reason, "longer than %d characters", LINE_ROOM - 1);
        if (!ok) {
            snprintf(why, size, "line %u: %s", number, reason);
            return false;
        }
        text += length + (text[length] == '\n');
    }
    return true;
}
