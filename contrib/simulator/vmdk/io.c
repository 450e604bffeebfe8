/* Files, paths and error lines. */
#include "internal.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <unistd.h>

int fail(char why[VMDK_WHY], int code, const char *format, ...) {
    if (why != NULL) {
        va_list arguments;
        va_start(arguments, format);
        vsnprintf(why, VMDK_WHY, format, arguments);
        va_end(arguments);
        /* A name may hold a line break; the log's line may not. */
        for (char *c = why; *c != 0; c++)
            if ((unsigned char)*c < ' ')
                *c = '?';
    }
    return code;
}

int code_of_errno(int number) {
    switch (number) {
    case ENOENT:
    case ENOTDIR:
        return VIX_E_FILE_NOT_FOUND;
    case EACCES:
    case EPERM:
        return VIX_E_FILE_ACCESS_ERROR;
    case EROFS:
        return VIX_E_FILE_READ_ONLY;
    case EEXIST:
        return VIX_E_FILE_ALREADY_EXISTS;
    case ENOSPC:
    case EDQUOT:
    case EFBIG:
        return VIX_E_DISK_FULL;
    case ENOMEM:
        return VIX_E_OUT_OF_MEMORY;
    case ENAMETOOLONG:
        return VIX_E_FILE_NAME_INVALID;
    default:
        return VIX_E_FILE_ERROR;
    }
}

int fail_errno(char why[VMDK_WHY], const char *what, const char *path) {
    int number = errno;
    return fail(why, code_of_errno(number), "%s %.160s: %s", what, path, strerror(number));
}

int read_at(int fd, void *buffer, uint64_t bytes, uint64_t offset) {
    char *to = buffer;
    while (bytes > 0) {
        if (offset > INT64_MAX - bytes)
            return VIX_E_DISK_INVALIDDISK;
        ssize_t got = pread(fd, to, smaller(bytes, 1u << 30), (off_t)offset);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            return code_of_errno(errno);
        if (got == 0)
            return VIX_E_DISK_INVALIDDISK;
        to += got;
        offset += (uint64_t)got;
        bytes -= (uint64_t)got;
    }
    return VIX_OK;
}

int write_at(int fd, const void *buffer, uint64_t bytes, uint64_t offset) {
    const char *from = buffer;
    while (bytes > 0) {
        if (offset > INT64_MAX - bytes)
            return VIX_E_DISK_FULL;
        ssize_t put = pwrite(fd, from, smaller(bytes, 1u << 30), (off_t)offset);
        if (put < 0 && errno == EINTR)
            continue;
        if (put < 0)
            return code_of_errno(errno);
        from += put;
        offset += (uint64_t)put;
        bytes -= (uint64_t)put;
    }
    return VIX_OK;
}

int open_regular(const char *path, int flags, int *fd, struct stat *status, char why[VMDK_WHY]) {
    *fd = open(path, flags | O_CLOEXEC | O_NOCTTY | O_NONBLOCK);
    if (*fd < 0)
        return fail_errno(why, "cannot open", path);
    int code = VIX_OK;
    if (fstat(*fd, status) != 0)
        code = fail_errno(why, "cannot stat", path);
    else if (!S_ISREG(status->st_mode))
        code = fail(why, VIX_E_INCORRECT_FILE_TYPE, "%.200s is not a regular file", path);
    if (code != VIX_OK) {
        close(*fd);
        *fd = -1;
    }
    return code;
}

int create_file(const char *path, int *fd, char why[VMDK_WHY]) {
    *fd = open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC | O_NOCTTY, 0666);
    return *fd < 0 ? fail_errno(why, "cannot create", path) : VIX_OK;
}

const char *path_name(const char *path) {
    const char *slash = strrchr(path, '/');
    return slash == NULL ? path : slash + 1;
}

char *path_folder(const char *path) {
    const char *name = path_name(path);
    if (name == path)
        return strdup(".");
    return strndup(path, name == path + 1 ? 1 : (size_t)(name - path) - 1);
}

char *path_beside(const char *path, const char *name) {
    if (name[0] == '/')
        return strdup(name);
    size_t folder = (size_t)(path_name(path) - path);
    char *joined = malloc(folder + strlen(name) + 1);
    if (joined != NULL) {
        memcpy(joined, path, folder);
        strcpy(joined + folder, name);
    }
    return joined;
}

bool same_folder(const char *one, const char *other) {
    char *first = path_folder(one), *second = path_folder(other);
    struct stat here, there;
    bool same = first != NULL && second != NULL && stat(first, &here) == 0 && stat(second, &there) == 0 &&
                here.st_dev == there.st_dev && here.st_ino == there.st_ino;
    free(first);
    free(second);
    return same;
}

void random_bytes(void *buffer, size_t bytes) {
    if (getentropy(buffer, bytes) != 0)
        abort();
}

uint32_t random_cid(void) {
    uint32_t cid;
    do
        random_bytes(&cid, sizeof cid);
    while (cid >= 0xfffffffeu); /* the two that mean "none" */
    return cid;
}

bool all_zero(const void *buffer, size_t bytes) {
    const char *first = buffer;
    return bytes == 0 || (*first == 0 && memcmp(first, first + 1, bytes - 1) == 0);
}

void show_progress(vmdk_progress progress, void *data, uint64_t done, uint64_t total) {
    if (progress != NULL)
        progress(data, total == 0 ? 100 : (int)(100.0 * (double)done / (double)total));
}
