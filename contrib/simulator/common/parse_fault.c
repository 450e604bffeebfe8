/* `fault = FUNCTION [path=GLOB] ... ACTION...` and the words that all of sim.conf is made of. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "parse.h"

#define MS 1000000ull

/* ---- words and numbers ---- */

bool parse_number(const char *text, uint64_t scale, uint64_t *value)
{
    /* strtoull would take a sign and blanks too. */
    if (!*text || strspn(text, "0123456789") != strlen(text))
        return false;
    errno = 0;
    uint64_t number = strtoull(text, NULL, 10);
    return !errno && !__builtin_mul_overflow(number, scale, value);
}

bool parse_part(const char *text, double *value)
{
    if (!*text || strspn(text, "0123456789.") != strlen(text))
        return false;
    char *end;
    *value = strtod(text, &end);
    return !*end && *value >= 0 && *value <= 1;
}

bool parse_code(const char *text, int *value)
{
    uint64_t number;
    if (!parse_number(text, 1, &number) || number < 1 || number > INT32_MAX)
        return false;
    *value = (int)number;
    return true;
}

bool parse_word(char **rest, char **word, bool *bad)
{
    char *from = *rest + strspn(*rest, " \t");
    char *to = from;
    bool quoted = false;
    *word = from;
    *bad = false;
    if (!*from)
        return false;
    for (; *from && (quoted || (*from != ' ' && *from != '\t')); from++) {
        if (*from == '"') {
            quoted = !quoted;
            continue;
        }
        if (quoted && *from == '\\' && (from[1] == '"' || from[1] == '\\'))
            from++;
        *to++ = *from;
    }
    *rest = *from ? from + 1 : from;
    *to = 0;
    *bad = quoted;
    return true;
}

/* ---- faults ---- */

/* Init is InitEx here. What only allocates, frees or tells an error's text never fails: a rule for it
 * would never strike. */
static const char *const of_handles[] = {
    "*", "Close", "GetInfo", "GetTransportMode", "Read", "Write", "ReadAsync", "WriteAsync", "Wait",
    "Flush", "QueryAllocatedBlocks", "ReadMetadata", "GetMetadataKeys", "WriteMetadata",
    "CreateChild", "Shrink", "Defragment", "Attach", "IsAttachPossible", "SpaceNeededForClone", NULL,
};
static const char *const others[] = {
    "InitEx", "Exit", "ListTransportModes", "Cleanup", "GetConnectParams", "Connect", "ConnectEx",
    "Disconnect", "PrepareForAccess", "EndAccess", "Open", "Create", "Unlink", "Grow", "Rename",
    "Clone", "CheckRepair", NULL,
};

static bool is_one_of(const char *const *names, const char *name)
{
    while (*names && strcmp(*names, name))
        names++;
    return *names != NULL;
}

static bool copy_text(char *to, size_t size, const char *from)
{
    size_t length = strlen(from);
    if (!length || length >= size)
        return false;
    memcpy(to, from, length + 1);
    return true;
}

/* Which calls a rule is about. */
static bool parse_condition(const char *key, const char *value, struct fault *fault, bool *known)
{
    *known = true;
    if (!strcmp(key, "path"))
        return copy_text(fault->path, sizeof fault->path, value);
    if (!strcmp(key, "transport"))
        return copy_text(fault->transport, sizeof fault->transport, value);
    if (!strcmp(key, "trigger"))
        return copy_text(fault->trigger, sizeof fault->trigger, value);
    if (!strcmp(key, "after"))
        return parse_number(value, 1, &fault->after);
    if (!strcmp(key, "count"))
        return parse_number(value, 1, &fault->count);
    if (!strcmp(key, "probability"))
        return parse_part(value, &fault->probability);
    if (!strcmp(key, "at"))
        return parse_number(value, 1, &fault->at);
    *known = false;
    return false;
}

/* What it does, where that takes a value. */
static bool parse_action(const char *key, const char *value, struct fault *fault, bool *known)
{
    static const struct {
        const char *name;
        enum fault_action action;
        bool is_code;
        size_t offset;
    } actions[] = {
        {"error", FAULT_ERROR, true, offsetof(struct fault, error)},
        {"callback_error", FAULT_CALLBACK_ERROR, true, offsetof(struct fault, callback_error)},
        {"delay_ms", FAULT_DELAY, false, offsetof(struct fault, delay_ns)},
        {"late_store_ms", FAULT_LATE_STORE, false, offsetof(struct fault, late_store_ns)},
        {"late_ms", FAULT_LATE_CALLBACK, false, offsetof(struct fault, late_ns)},
    };
    for (size_t i = 0; i < sizeof actions / sizeof *actions; i++) {
        if (strcmp(key, actions[i].name))
            continue;
        *known = true;
        fault->actions |= actions[i].action;
        void *field = (char *)fault + actions[i].offset;
        return actions[i].is_code ? parse_code(value, field) : parse_number(value, MS, field);
    }
    *known = false;
    return false;
}

static bool parse_flag(const char *word, struct fault *fault)
{
    static const struct {
        const char *name;
        enum fault_action action;
    } flags[] = {
        {"hang", FAULT_HANG},         {"segv", FAULT_SEGV},     {"abort", FAULT_ABORT},
        {"scribble", FAULT_SCRIBBLE}, {"inline", FAULT_INLINE}, {"drop", FAULT_DROP},
        {"stop_host", FAULT_STOP_HOST}, {"lose", FAULT_LOSE},
    };
    for (size_t i = 0; i < sizeof flags / sizeof *flags; i++)
        if (!strcmp(word, flags[i].name)) {
            fault->actions |= flags[i].action;
            return true;
        }
    return false;
}

/* Combinations that could only be a slip. */
static const char *nonsense(const struct fault *fault)
{
    unsigned asynchronous =
        FAULT_CALLBACK_ERROR | FAULT_INLINE | FAULT_LATE_CALLBACK | FAULT_DROP;
    bool takes_callback = !strcmp(fault->function, "*") || !strcmp(fault->function, "ReadAsync") ||
                          !strcmp(fault->function, "WriteAsync");
    if (!fault->actions)
        return "a fault that does nothing";
    if ((fault->actions & asynchronous) && !takes_callback)
        return "callback_error, inline, late_ms and drop are for ReadAsync and WriteAsync";
    if ((fault->actions & FAULT_LATE_STORE) &&
        !(fault->actions & (FAULT_ERROR | FAULT_CALLBACK_ERROR)))
        return "late_store_ms goes with error= or callback_error=";
    if ((fault->actions & (FAULT_STOP_HOST | FAULT_LOSE)) &&
        !is_one_of(of_handles, fault->function))
        return "stop_host and lose are for calls on an open disk";
    return NULL;
}

static bool refuse(char *why, size_t size, const char *what, const char *text)
{
    snprintf(why, size, "%s: %s", what, text);
    return false;
}

bool parse_fault(char *text, uint64_t id, struct fault *fault, char *why, size_t size)
{
    *fault = (struct fault){.count = UINT64_MAX, .probability = 1, .at = UINT64_MAX, .id = id};
    char *word;
    bool bad;
    for (unsigned n = 0; parse_word(&text, &word, &bad); n++) {
        if (bad)
            return refuse(why, size, "a quote that does not end", word);
        if (n == 0) {
            if (!is_one_of(of_handles, word) && !is_one_of(others, word))
                return refuse(why, size, "unknown function", word);
            copy_text(fault->function, sizeof fault->function, word);
            continue;
        }
        char *equals = strchr(word, '=');
        if (!equals) {
            if (!parse_flag(word, fault))
                return refuse(why, size, "unknown action", word);
            continue;
        }
        *equals = 0;
        bool known, ok = parse_condition(word, equals + 1, fault, &known);
        if (!known)
            ok = parse_action(word, equals + 1, fault, &known);
        if (!ok) {
            *equals = '=';
            return refuse(why, size, known ? "not a usable value" : "unknown word", word);
        }
    }
    const char *slip = nonsense(fault);
    if (!*fault->function)
        slip = "a fault without a function";
    if (slip)
        snprintf(why, size, "%s", slip);
    return !slip;
}
