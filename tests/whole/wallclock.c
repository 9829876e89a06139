/* A wall clock that is set by writing to a file: preload this, and name the file in WALL_CLOCK.
 *
 * The file holds one signed 64-bit number, the nanoseconds by which the wall clock is ahead of the machine's. Whoever
 * maps it and stores a number steps the clock of all processes that were started with it, at once. Monotonic clocks are
 * left alone. A wait on a semaphore ends as the kernel's would: when the wall clock, as it is then, has reached the
 * end that was computed from the wall clock as it was.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <semaphore.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#define SECOND 1000000000LL
#define LOOK 1000000LL /* how often a sleeper looks whether the clock was set */

static long long none;
static volatile long long *ahead = &none;

__attribute__((constructor)) static void map_the_file(void)
{
    const char *path = getenv("WALL_CLOCK");
    int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (file < 0)
        return;
    void *mapped = mmap(NULL, sizeof none, PROT_READ, MAP_SHARED, file, 0);
    close(file);
    if (mapped != MAP_FAILED)
        ahead = mapped;
}

static long long true_time(void)
{
    struct timespec now;
    syscall(SYS_clock_gettime, CLOCK_REALTIME, &now);
    return now.tv_sec * SECOND + now.tv_nsec;
}

static long long wall_time(void)
{
    return true_time() + *ahead;
}

static struct timespec spec(long long nanoseconds)
{
    return (struct timespec){nanoseconds / SECOND, nanoseconds % SECOND};
}

int clock_gettime(clockid_t clock, struct timespec *now)
{
    if (clock != CLOCK_REALTIME && clock != CLOCK_REALTIME_COARSE)
        return syscall(SYS_clock_gettime, clock, now);
    *now = spec(wall_time());
    return 0;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone)
{
    struct timespec time = spec(wall_time());
    (void)zone;
    *now = (struct timeval){time.tv_sec, time.tv_nsec / 1000};
    return 0;
}

time_t time(time_t *now)
{
    time_t seconds = wall_time() / SECOND;
    if (now)
        *now = seconds;
    return seconds;
}

int sem_timedwait(sem_t *restrict semaphore, const struct timespec *restrict end)
{
    static int (*wait)(sem_t *, const struct timespec *);
    long long until = end->tv_sec * SECOND + end->tv_nsec;
    if (!wait)
        wait = (int (*)(sem_t *, const struct timespec *))dlsym(RTLD_NEXT, "sem_timedwait");
    for (;;) {
        long long left = until - wall_time();
        struct timespec look = spec(true_time() + (left < LOOK ? left : LOOK));
        if (wait(semaphore, &look) == 0)
            return 0;
        if (errno != ETIMEDOUT)
            return -1;
        if (wall_time() >= until) {
            errno = ETIMEDOUT;
            return -1;
        }
    }
}
