/*
 * The simulator's own account of what happened: SITE/.sim/events.log.
 *
 * The host process and every client's library append whole lines to one file, so that it tells in
 * which order things happened and, above all, by which path the bytes of a disk went (`wire`, or a
 * device that was opened). One line is
 *
 *     SECONDS.MICROSECONDS PID NAME key=value key=value ...
 *
 * A value with blanks or quotes is in double quotes, \ before " and \. Secrets are never written.
 */
#ifndef SIMULATOR_EVENTS_H
#define SIMULATOR_EVENTS_H

struct events; /* NULL is a log that goes nowhere */

struct events *events_open(const char *state_folder); /* NULL when it cannot be opened */
void events_close(struct events *events);

/* `format` is printf's and makes the whole of "key=value ..."; quote strings with events_quote(). */
void events_note(struct events *events, const char *name, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/* `text` ready to be a value, in `buffer` (cut to fit); NULL becomes -. */
const char *events_quote(const char *text, char *buffer, unsigned size);

#endif
