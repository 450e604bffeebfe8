/* Checks of a test program: the first that fails says where, and ends it. */
#ifndef CHECK_H
#define CHECK_H

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CHECK(condition)                                                                           \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "%s:%d: not true: %s (errno: %s)\n", __FILE__, __LINE__, #condition,   \
                    strerror(errno));                                                              \
            exit(1);                                                                               \
        }                                                                                          \
    } while (0)

#define CHECK_NUMBER(found, expected)                                                              \
    do {                                                                                           \
        long long found_ = (long long)(found), expected_ = (long long)(expected);                  \
        if (found_ != expected_) {                                                                 \
            fprintf(stderr, "%s:%d: %s is %lld and not %lld\n", __FILE__, __LINE__, #found, found_,\
                    expected_);                                                                    \
            exit(1);                                                                               \
        }                                                                                          \
    } while (0)

#define CHECK_TEXT(found, expected)                                                                \
    do {                                                                                           \
        const char *found_ = (found), *expected_ = (expected);                                     \
        if (strcmp(found_, expected_)) {                                                           \
            fprintf(stderr, "%s:%d: %s is \"%s\" and not \"%s\"\n", __FILE__, __LINE__, #found,    \
                    found_, expected_);                                                            \
            exit(1);                                                                               \
        }                                                                                          \
    } while (0)

#endif
