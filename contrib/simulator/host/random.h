/* The seeded random choices (splitmix64): the same seed makes the same ones in the same order. */
#ifndef SIMULATOR_HOST_RANDOM_H
#define SIMULATOR_HOST_RANDOM_H

#include <stdint.h>

static inline uint64_t random_next(uint64_t *state)
{
    uint64_t value = *state += 0x9E3779B97F4A7C15u;
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9u;
    value = (value ^ value >> 27) * 0x94D049BB133111EBu;
    return value ^ value >> 31;
}

/* In [0, 1). */
static inline double random_part(uint64_t *state)
{
    return (double)(random_next(state) >> 11) / (double)(UINT64_C(1) << 53);
}

/* In [0, limit); 0 of 0. */
static inline uint64_t random_below(uint64_t *state, uint64_t limit)
{
    return limit == 0 ? 0 : random_next(state) % limit;
}

#endif
