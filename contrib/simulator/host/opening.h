/* What is known while a disk is being opened: open.c, transports.c, answer.c. */
#ifndef SIMULATOR_HOST_OPENING_H
#define SIMULATOR_HOST_OPENING_H

#include "session.h"
#include "vim.h"

struct opening {
    struct session *session;
    struct site *site;
    const struct settings *settings;
    const struct login *login;
    const char *path, *transport_name, *thumbprint;
    uint64_t flags, port, buffer_bytes, buffers;
    enum transport transport;
    struct site_host *host;
    struct access access;
    struct vmdk *disk;
    struct lock *lock;
    struct attachment *attachment;
    struct device **devices;
    unsigned device_count;
    char why[WHY_MAX];
};

int opening_refuse(struct opening *opening, int code, const char *why); /* the code */

/* ---- transports.c; error codes, NOT_SUPPORTED where the transport is not to be had ---- */

int transport_check(struct opening *opening); /* what needs no look at the disk */
int transport_begin(struct opening *opening); /* the open disk as devices, where that is its way */

/* ---- answer.c ---- */

/* The path of the device or file that the client finds a file of the disk at. */
const char *answer_device(const struct session *session, unsigned file);
void answer_open(struct request *request);

#endif
