/* The counters of fault rules: a file that all processes of a site map; not for others. */
#ifndef SIMULATOR_FAULTS_H
#define SIMULATOR_FAULTS_H

#include "settings.h"

struct fault_counters;

/* The counters in STATE/faults (made if missing). Where that cannot be had, and for NULL, counters
 * of this process alone; then `why` says what was wrong, else it is "". NULL without memory. */
struct fault_counters *fault_counters_open(const char *state, char *why, size_t size);
void fault_counters_close(struct fault_counters *counters);

/* Counts the call for `fault`, which it matches, and says whether it is struck. `folder` is where
 * its trigger file is; `seed` makes the dice. */
bool fault_counters_strike(struct fault_counters *counters, const struct fault *fault,
                           const char *folder, uint64_t seed);

/* Whether the rule is about this call at all (its trigger and counts aside). */
bool fault_matches(const struct fault *fault, const char *function, const char *path,
                   const char *transport, uint64_t start, uint64_t count);

#endif
