#include "devices.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/loop.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "memory.h"

#define SECTOR_BYTES 512
#define ATTEMPTS 64 /* others may take the free device that was found: then the next one */

/* ---- loop devices ---- */

static int configure_free(int control, int file, const char *tag, uint32_t flags,
                          char path[DEVICE_PATH_MAX])
{
    struct loop_config config = {.fd = (uint32_t)file, .block_size = SECTOR_BYTES};
    config.info.lo_flags = flags;
    snprintf((char *)config.info.lo_file_name, LO_NAME_SIZE, "%s", tag);
    for (int attempt = 0; attempt < ATTEMPTS; attempt++) {
        int number = ioctl(control, LOOP_CTL_GET_FREE);
        if (number < 0)
            return -1;
        snprintf(path, DEVICE_PATH_MAX, "/dev/loop%d", number);
        int device = open(path, O_RDWR | O_CLOEXEC);
        if (device < 0)
            return -1;
        if (ioctl(device, LOOP_CONFIGURE, &config) == 0)
            return device;
        int error = errno;
        close(device);
        errno = error;
        if (error != EBUSY)
            return -1;
    }
    return -1;
}

int loop_attach(const char *file, const char *tag, uint32_t flags, char path[DEVICE_PATH_MAX])
{
    int control = open("/dev/loop-control", O_RDWR | O_CLOEXEC);
    if (control < 0)
        return -1;
    int backing = open(file, O_RDWR | O_CLOEXEC);
    if (backing < 0 && (errno == EACCES || errno == EROFS || errno == EPERM)) {
        backing = open(file, O_RDONLY | O_CLOEXEC);
        flags |= LO_FLAGS_READ_ONLY;
    }
    int device = backing < 0 ? -1 : configure_free(control, backing, tag, flags, path);
    int error = errno;
    if (backing >= 0)
        close(backing);
    close(control);
    errno = error;
    return device;
}

static bool has_tag(int device, const char *tag)
{
    struct loop_info64 info;
    return ioctl(device, LOOP_GET_STATUS64, &info) == 0 &&
           strncmp((const char *)info.lo_file_name, tag, LO_NAME_SIZE) == 0;
}

void loop_refresh(const char *path)
{
    int device = open(path, O_RDONLY | O_CLOEXEC);
    if (device < 0)
        return;
    ioctl(device, LOOP_SET_CAPACITY, 0);
    close(device);
}

bool loop_detach(const char *path, const char *tag)
{
    int device = open(path, O_RDONLY | O_CLOEXEC);
    if (device < 0)
        return false;
    bool detached = has_tag(device, tag) && ioctl(device, LOOP_CLR_FD, 0) == 0;
    close(device);
    return detached;
}

/* ---- shared devices ---- */

struct device {
    struct list place;
    dev_t file_device;
    ino_t file_inode;
    char path[DEVICE_PATH_MAX];
    int fd; /* as long as that is open the kernel keeps the device and its pages */
    unsigned users;
};

static void forget(struct site *site, struct device *device)
{
    events_note(site->events, "device-detached", "device=%s", device->path);
    list_remove(&device->place);
    close(device->fd);
    free(device);
}

const char *device_path(const struct device *device)
{
    return device->path;
}

void device_refresh(struct device *device)
{
    ioctl(device->fd, LOOP_SET_CAPACITY, 0);
}

static struct device *find(struct site *site, const struct stat *file)
{
    LIST_EACH(link, after, &site->devices) {
        struct device *device = LIST_OF(link, struct device, place);
        if (device->file_device == file->st_dev && device->file_inode == file->st_ino)
            return device;
    }
    return NULL;
}

struct device *device_acquire(struct site *site, const char *file)
{
    struct stat status;
    char path[DEVICE_PATH_MAX], quoted[SITE_PATH_MAX];
    if (stat(file, &status) < 0)
        return NULL;
    struct device *device = find(site, &status);
    if (device != NULL) {
        device->users++;
        device_refresh(device);
        return device;
    }
    int fd = loop_attach(file, "vixsim-host", LO_FLAGS_AUTOCLEAR, path);
    if (fd < 0)
        return NULL;
    device = memory_zeroed(1, sizeof *device);
    device->file_device = status.st_dev;
    device->file_inode = status.st_ino;
    device->fd = fd;
    device->users = 1;
    memcpy(device->path, path, sizeof path);
    list_append(&site->devices, &device->place);
    events_note(site->events, "device-attached", "device=%s file=%s", path,
                events_quote(file, quoted, sizeof quoted));
    return device;
}

void device_release(struct site *site, struct device *device)
{
    device->users--;
    if (device->users == 0 && !site_settings(site)->san_keep_open)
        forget(site, device);
}

void devices_tick(struct site *site)
{
    bool keep = site_settings(site)->san_keep_open;
    LIST_EACH(link, after, &site->devices) {
        struct device *device = LIST_OF(link, struct device, place);
        if (device->users == 0 && !keep)
            forget(site, device);
    }
}

void devices_free(struct site *site)
{
    LIST_EACH(link, after, &site->devices)
        forget(site, LIST_OF(link, struct device, place));
}
