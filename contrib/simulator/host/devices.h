/*
 * Files as block devices, as a machine sees a LUN: loop devices.
 *
 * Over san all sessions share one device for each extent file, and its page cache with it. The
 * devices detach themselves when the last descriptor is closed, so that none is left behind by a
 * host that was killed. HotAdd's devices are others, each attachment has its own: attachments.c.
 */
#ifndef SIMULATOR_HOST_DEVICES_H
#define SIMULATOR_HOST_DEVICES_H

#include <stdbool.h>
#include <stdint.h>

#include "site.h"

#define DEVICE_PATH_MAX 32

/* ---- loop devices ---- */

/* Makes a loop device of 512-byte sectors over the whole file, writable when the file is. `tag`
 * (less than 64 characters) can be asked for later. Returns a descriptor of the device, -1 with
 * errno. `flags` are LO_FLAGS_*. */
int loop_attach(const char *file, const char *tag, uint32_t flags, char path[DEVICE_PATH_MAX]);
bool loop_detach(const char *path, const char *tag); /* false: it is not ours any more */
void loop_refresh(const char *path); /* its size is the file's again */

/* ---- shared devices (san) ---- */

struct device;

struct device *device_acquire(struct site *site, const char *file); /* NULL with errno */
void device_release(struct site *site, struct device *device);
const char *device_path(const struct device *device);
void device_refresh(struct device *device); /* its size is the file's again */

void devices_tick(struct site *site); /* lets go what need not be kept */
void devices_free(struct site *site);

#endif
