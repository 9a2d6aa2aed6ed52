/* A pool of threads that do one job together and meet at barriers, made when a job first needs them.

   Waiting spins for a few microseconds, as long as a phase of a job takes, and then sleeps: between jobs no core is busy.
   The process may fork (the child starts without workers), be interrupted (workers take no signals) and end at any time. */

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <time.h>
#ifdef __SSE2__
#include <xmmintrin.h>
#endif

#define MAX_THREADS 64
#define SPIN_NANOSECONDS 30000 /* longer than a phase takes, shorter than anybody notices */

/* One of the threads that do a job; a job of one thread has no barriers. */
struct worker {
    int index, count;
};

typedef void job_function(void *job, struct worker worker);

/* Somewhere to wait for a number to change. `sleepers` is read after the number was changed, and raised before it is looked at
   for the last time, so that nobody sleeps through a change. */
struct gate {
    _Alignas(64) atomic_ulong value;
    atomic_int sleepers;
    pthread_mutex_t mutex;
    pthread_cond_t changed;
};

static struct {
    pthread_mutex_t one_job; /* held by the caller whose job it is */
    struct gate start;       /* number of the job, times MAX_THREADS + 1, plus the number of its workers */
    struct gate barrier;     /* how often all have met */
    _Alignas(64) atomic_int arrived;
    int started;          /* workers that have been made */
    unsigned long before; /* the number at the start gate when the last of them were */
    job_function *function;
    void *job;
} pool = {
    .one_job = PTHREAD_MUTEX_INITIALIZER,
    .start = {.mutex = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER},
    .barrier = {.mutex = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER},
};

static inline void cpu_relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__) || defined(__arm__)
    __asm__ volatile("yield");
#endif
}

static inline long monotonic_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000L + now.tv_nsec;
}

/* Return the gate's number once it is not `old`. */
static unsigned long wait_for_change(struct gate *gate, unsigned long old) {
    unsigned long value;
    for (long deadline = 0; !deadline || monotonic_ns() < deadline;) {
        for (int look = 0; look < 32; look++, cpu_relax()) {
            if ((value = atomic_load_explicit(&gate->value, memory_order_acquire)) != old) return value;
        }
        if (!deadline) deadline = monotonic_ns() + SPIN_NANOSECONDS;
    }
    pthread_mutex_lock(&gate->mutex);
    atomic_fetch_add(&gate->sleepers, 1);
    while ((value = atomic_load(&gate->value)) == old) pthread_cond_wait(&gate->changed, &gate->mutex);
    atomic_fetch_sub(&gate->sleepers, 1);
    pthread_mutex_unlock(&gate->mutex);
    return value;
}

static void set_and_wake(struct gate *gate, unsigned long value) {
    atomic_store(&gate->value, value);
    if (!atomic_load(&gate->sleepers)) return;
    pthread_mutex_lock(&gate->mutex); /* whoever is about to sleep does so first */
    pthread_cond_broadcast(&gate->changed);
    pthread_mutex_unlock(&gate->mutex);
}

/* Wait until all workers of the job have come here; what they wrote before is seen by all after it. */
static inline void barrier_wait(struct worker worker) {
    if (worker.count == 1) return;
    unsigned long met = atomic_load_explicit(&pool.barrier.value, memory_order_relaxed);
    if (atomic_fetch_add(&pool.arrived, 1) + 1 < worker.count) {
        wait_for_change(&pool.barrier, met);
    } else {
        atomic_store_explicit(&pool.arrived, 0, memory_order_relaxed);
        set_and_wake(&pool.barrier, met + 1);
    }
}

/* Have this thread take denormal numbers for zero, and return the setting that was. Trained models have them, from GELUs and softmaxes
   of what is far below zero, and x86 processors compute with them at a hundredth of their speed. */
static unsigned flush_denormals(void) {
#ifdef __SSE2__
    const unsigned before = _mm_getcsr(), both = 0x8040; /* of operands and of results */
    _mm_setcsr(before | both);
    return before;
#else
    return 0;
#endif
}

static void restore_denormals(unsigned setting) {
#ifdef __SSE2__
    _mm_setcsr(setting);
#else
    (void)setting;
#endif
}

static void *worker_main(void *index) {
    struct worker worker = {.index = (int)(intptr_t)index};
    flush_denormals();
    for (unsigned long order = pool.before;;) {
        order = wait_for_change(&pool.start, order);
        worker.count = (int)(order % (MAX_THREADS + 1));
        if (worker.index >= worker.count) continue;
        pool.function(pool.job, worker);
        barrier_wait(worker);
    }
    return 0;
}

/* A forked child has none of the workers, whatever they were doing. */
static void reset_after_fork(void) {
    pthread_mutex_init(&pool.one_job, 0);
    for (int i = 0; i < 2; i++) {
        struct gate *gate = i ? &pool.start : &pool.barrier;
        pthread_mutex_init(&gate->mutex, 0);
        pthread_cond_init(&gate->changed, 0);
        atomic_store(&gate->sleepers, 0);
    }
    atomic_store(&pool.arrived, 0);
    pool.started = 0;
}

static void register_fork_handler(void) { pthread_atfork(0, 0, reset_after_fork); }

/* Have `count` workers at least, or as many as the system gives; signals are for the threads of the program. */
static int start_workers(int count) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, register_fork_handler);
    if (pool.started >= count - 1) return count;
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pool.before = atomic_load(&pool.start.value);
    while (pool.started < count - 1) {
        pthread_t thread;
        if (pthread_create(&thread, 0, worker_main, (void *)(intptr_t)(pool.started + 1))) break;
        pthread_detach(thread);
        pool.started++;
    }
    pthread_sigmask(SIG_SETMASK, &before, 0);
    return pool.started + 1 < count ? pool.started + 1 : count;
}

/* Have `count` threads do a job, the caller among them; return when it is done. */
static void run_job(job_function *function, void *job, int count) {
    if (count <= 1) { /* needs no worker, and so does not wait for another job that has them */
        const unsigned setting = flush_denormals();
        function(job, (struct worker){.index = 0, .count = 1});
        restore_denormals(setting);
        return;
    }
    pthread_mutex_lock(&pool.one_job);
    if (count > MAX_THREADS) count = MAX_THREADS;
    count = start_workers(count);
    struct worker caller = {.index = 0, .count = count};
    if (count > 1) {
        pool.function = function, pool.job = job;
        unsigned long jobs = atomic_load(&pool.start.value) / (MAX_THREADS + 1);
        set_and_wake(&pool.start, (jobs + 1) * (MAX_THREADS + 1) + (unsigned long)count);
    }
    const unsigned setting = flush_denormals(); /* which the program's own numbers need */
    function(job, caller);
    barrier_wait(caller);
    restore_denormals(setting);
    pthread_mutex_unlock(&pool.one_job);
}
