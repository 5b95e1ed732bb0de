/* Stands between a server and its disk: while the file named by SYNC_CONTROL
 * exists, fdatasync and fsync do what SYNC_MODE says:
 *
 *   hold  wait until the file is gone, then sync;
 *   lie   return success at once without syncing;
 *   fail  return EIO.
 *
 * With the mode `full`, they do what they should, and writes to files with
 * SYNC_PATH in their path return ENOSPC.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static int is_full(int file)
{
    const char *control = getenv("SYNC_CONTROL");
    const char *mode = getenv("SYNC_MODE");
    const char *part = getenv("SYNC_PATH");
    char link[32], path[4096];
    ssize_t length;

    if (!control || !mode || !part || strcmp(mode, "full") != 0 || access(control, F_OK) != 0)
        return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    length = readlink(link, path, sizeof path - 1);
    if (length < 0)
        return 0;
    path[length] = 0;
    return strstr(path, part) != NULL;
}

ssize_t write(int file, const void *bytes, size_t length)
{
    if (is_full(file)) {
        errno = ENOSPC;
        return -1;
    }
    return syscall(SYS_write, file, bytes, length);
}

ssize_t pwrite64(int file, const void *bytes, size_t length, off64_t offset)
{
    if (is_full(file)) {
        errno = ENOSPC;
        return -1;
    }
    return syscall(SYS_pwrite64, file, bytes, length, offset);
}

static int synced(long call, int file)
{
    const struct timespec pause = { 0, 10 * 1000 * 1000 };
    const char *control = getenv("SYNC_CONTROL");
    const char *mode = getenv("SYNC_MODE");

    while (control && mode && strcmp(mode, "full") != 0 && access(control, F_OK) == 0) {
        if (strcmp(mode, "lie") == 0)
            return 0;
        if (strcmp(mode, "fail") == 0) {
            errno = EIO;
            return -1;
        }
        nanosleep(&pause, NULL);
    }
    return (int)syscall(call, file);
}

int fdatasync(int file)
{
    return synced(SYS_fdatasync, file);
}

int fsync(int file)
{
    return synced(SYS_fsync, file);
}
