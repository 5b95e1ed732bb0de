/* Stands between a server and its disk: while the file named by SYNC_CONTROL
 * exists, fdatasync and fsync do what SYNC_MODE says:
 *
 *   hold  wait until the file is gone, then sync;
 *   lie   return success at once without syncing;
 *   fail  return EIO.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static int synced(long call, int file)
{
    const struct timespec pause = { 0, 10 * 1000 * 1000 };
    const char *control = getenv("SYNC_CONTROL");
    const char *mode = getenv("SYNC_MODE");

    while (control && mode && access(control, F_OK) == 0) {
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
