/* Stands between a server and what its machine gives it: the disk and the clocks.
 *
 * The harness writes what shall happen into the file named by SHIM_CONTROL, which
 * is mapped here, and reads there what did happen.
 *
 * fsync and pwrite are taken over by name. The clock is not asked by name but
 * through the vDSO, so the first instructions of its clock_gettime are replaced
 * by a jump to ours. CLOCK_MONOTONIC stays as it is: absolute timeouts of futexes
 * are in it, and the kernel would not know of our drift.
 */

#define _GNU_SOURCE
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define SECOND 1000000000LL
#define MILLION 1000000LL

enum { SYNC_AS_USUAL, SYNC_SLOW, SYNC_FAILS };

/* The same layout as in shim.rs. */
struct control {
    volatile uint64_t version;        /* odd while the clock is being changed */
    volatile int64_t anchor_ns;       /* since when, by the true boot clock, */
    volatile int64_t ahead_ns;        /* it was ahead by this much */
    volatile int64_t rate_ppm;        /* and has run faster by this much */
    volatile int64_t date_ahead_ns;
    volatile int64_t sync_mode;
    volatile int64_t sync_delay_ms;
    volatile int64_t disk_is_full;
    uint64_t slow_syncs, failed_syncs, refused_writes, drifted_reads, shifted_dates;
};

static struct control *control;

static void count(uint64_t *counter)
{
    __atomic_fetch_add(counter, 1, __ATOMIC_RELAXED);
}

static int64_t boot_ahead(int64_t now)
{
    int64_t ahead, anchor, rate;
    uint64_t version;

    do {
        version = __atomic_load_n(&control->version, __ATOMIC_ACQUIRE);
        ahead = control->ahead_ns;
        anchor = control->anchor_ns;
        rate = control->rate_ppm;
        __atomic_thread_fence(__ATOMIC_ACQUIRE);
    } while (version % 2 || version != control->version);
    if (rate)
        count(&control->drifted_reads);
    return ahead + (now - anchor) / MILLION * rate + (now - anchor) % MILLION * rate / MILLION;
}

static int our_clock_gettime(clockid_t clock, struct timespec *time)
{
    long failed = syscall(SYS_clock_gettime, clock, time);
    int64_t now, ahead = 0;

    if (failed)
        return -errno;
    if (!time || (clock != CLOCK_BOOTTIME && clock != CLOCK_REALTIME))
        return 0;
    now = time->tv_sec * SECOND + time->tv_nsec;
    if (clock == CLOCK_BOOTTIME) {
        ahead = boot_ahead(now);
    } else if (control->date_ahead_ns) {
        ahead = control->date_ahead_ns;
        count(&control->shifted_dates);
    }
    time->tv_sec = (now + ahead) / SECOND;
    time->tv_nsec = (now + ahead) % SECOND;
    return 0;
}

static void *in_vdso(const char *name, const char *other_name)
{
    char *image = (char *)getauxval(AT_SYSINFO_EHDR);
    const Elf64_Ehdr *header = (const Elf64_Ehdr *)image;
    const Elf64_Shdr *sections;

    if (!image || !header->e_shoff)
        return NULL;
    sections = (const Elf64_Shdr *)(image + header->e_shoff);
    for (int s = 0; s < header->e_shnum; s++) {
        const Elf64_Sym *symbols = (const Elf64_Sym *)(image + sections[s].sh_offset);
        const char *names = image + sections[sections[s].sh_link].sh_offset;

        if (sections[s].sh_type != SHT_DYNSYM)
            continue;
        for (size_t i = 0; i < sections[s].sh_size / sizeof *symbols; i++) {
            const char *found = names + symbols[i].st_name;

            if (!strcmp(found, name) || !strcmp(found, other_name))
                return image + symbols[i].st_value;
        }
    }
    return NULL;
}

static void take_over_clock(void)
{
#if defined(__x86_64__)
    /* movabs $target, %rax; jmp *%rax */
    unsigned char jump[] = { 0x48, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xe0 };
    const size_t target = 2;
#elif defined(__aarch64__)
    /* ldr x16, #8; br x16; target */
    unsigned char jump[] = { 0x50, 0, 0, 0x58, 0, 2, 0x1f, 0xd6, 0, 0, 0, 0, 0, 0, 0, 0 };
    const size_t target = 8;
#else
#error "no way to take over the clock of this machine"
#endif
    char *place = in_vdso("__vdso_clock_gettime", "__kernel_clock_gettime");
    int (*ours)(clockid_t, struct timespec *) = our_clock_gettime;
    size_t page = sysconf(_SC_PAGESIZE);
    char *begin = (char *)((uintptr_t)place & ~(page - 1));

    if (!place || mprotect(begin, 2 * page, PROT_READ | PROT_WRITE | PROT_EXEC))
        return;
    memcpy(jump + target, &ours, sizeof ours);
    memcpy(place, jump, sizeof jump);
    __builtin___clear_cache(place, place + sizeof jump);
    mprotect(begin, 2 * page, PROT_READ | PROT_EXEC);
}

__attribute__((constructor)) static void begin(void)
{
    const char *path = getenv("SHIM_CONTROL");
    int file = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
    void *mapped = MAP_FAILED;

    if (file >= 0) {
        mapped = mmap(NULL, sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
        close(file);
    }
    if (mapped == MAP_FAILED)
        return;
    control = mapped;
    take_over_clock();
}

static int synced(long call, int file)
{
    if (control && control->sync_mode == SYNC_FAILS) {
        count(&control->failed_syncs);
        errno = EIO;
        return -1;
    }
    if (control && control->sync_mode == SYNC_SLOW) {
        count(&control->slow_syncs);
        usleep(control->sync_delay_ms * 1000);
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

ssize_t pwrite64(int file, const void *bytes, size_t length, off_t offset)
{
    if (control && control->disk_is_full) {
        count(&control->refused_writes);
        errno = ENOSPC;
        return -1;
    }
    return syscall(SYS_pwrite64, file, bytes, length, offset);
}
