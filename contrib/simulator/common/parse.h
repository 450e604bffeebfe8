/* What the parser of sim.conf is made of; not for others. */
#ifndef SIMULATOR_PARSE_H
#define SIMULATOR_PARSE_H

#include "settings.h"

/* Whole and non-negative, times `scale`. False for anything else, too large included. */
bool parse_number(const char *text, uint64_t scale, uint64_t *value);
bool parse_part(const char *text, double *value); /* 0 to 1 */
bool parse_code(const char *text, int *value);    /* an error code: 1 or more */

/* Takes the next word off `*rest`, in place: blanks end it, double quotes keep them in it. Quotes are
 * taken away, with \ before " and \. False at the end; a quote that never ends sets `*bad`. */
bool parse_word(char **rest, char **word, bool *bad);

/* One `fault = ...`: its value in `text` (which is spoiled), the whole line's hash as `id`. */
bool parse_fault(char *text, uint64_t id, struct fault *fault, char *why, size_t size);

#endif
