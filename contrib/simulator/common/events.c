/* The log of what happened: see events.h. */
#include "events.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define LINE_MAX_BYTES 4096

struct events {
    int fd;
};

struct events *events_open(const char *state_folder)
{
    char path[PATH_MAX];
    int length = snprintf(path, sizeof path, "%s/events.log", state_folder);
    if (length < 0 || (size_t)length >= sizeof path)
        return NULL;
    if (mkdir(state_folder, 0777) < 0 && errno != EEXIST)
        return NULL;
    struct events *events = malloc(sizeof *events);
    if (!events)
        return NULL;
    /* O_APPEND and one write(2) for a line: those of several processes never mix. */
    events->fd = open(path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0666);
    if (events->fd < 0) {
        free(events);
        return NULL;
    }
    return events;
}

void events_close(struct events *events)
{
    if (!events)
        return;
    close(events->fd);
    free(events);
}

void events_note(struct events *events, const char *name, const char *format, ...)
{
    if (!events)
        return;
    int error = errno; /* a caller may note a failure before it looks at errno */
    char line[LINE_MAX_BYTES];
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    /* One byte is kept for the newline, whatever has to be cut. */
    size_t room = sizeof line - 1;
    int used = snprintf(line, room, "%lld.%06ld %d %s", (long long)now.tv_sec, now.tv_nsec / 1000,
                        (int)getpid(), name);
    size_t length = used < 0 ? 0 : (size_t)used < room ? (size_t)used : room - 1;
    if (format && *format && length + 1 < room) {
        line[length++] = ' ';
        va_list values;
        va_start(values, format);
        used = vsnprintf(line + length, room - length, format, values);
        va_end(values);
        length += used < 0 ? 0 : (size_t)used < room - length ? (size_t)used : room - length - 1;
    }
    /* A value may have come with a line end of its own, but an event is one line. */
    for (size_t i = 0; i < length; i++)
        if (line[i] == '\n' || line[i] == '\r')
            line[i] = ' ';
    line[length++] = '\n';
    ssize_t written = write(events->fd, line, length);
    (void)written; /* there is nobody to tell */
    errno = error;
}

const char *events_quote(const char *text, char *buffer, unsigned size)
{
    if (!size)
        return "";
    if (!text) {
        snprintf(buffer, size, "-");
        return buffer;
    }
    /* "-" itself is quoted, so that NULL can be told from it. */
    bool quoted =
        size > 2 && (!*text || !strcmp(text, "-") || strpbrk(text, " \t\r\n\"\\") != NULL);
    unsigned used = 0;
    if (quoted)
        buffer[used++] = '"';
    for (; *text; text++) {
        bool escaped = *text == '"' || *text == '\\';
        if (used + (unsigned)escaped + 1 + (unsigned)quoted + 1 > size)
            break;
        if (escaped)
            buffer[used++] = '\\';
        buffer[used++] = (unsigned char)*text < ' ' ? '?' : *text;
    }
    if (quoted && used + 1 < size)
        buffer[used++] = '"';
    buffer[used] = 0;
    return buffer;
}
