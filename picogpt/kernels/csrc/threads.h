/* A thread pool for the engine: all threads run one job together and meet at barriers. Threads are made
   when a job first needs them, and are kept.

   Decoding a character takes a few dozen barriers, some microseconds apart, which is too short to sleep.
   So a wait spins for SPIN_NANOSECONDS first and then sleeps on a condition variable: between jobs no
   core is busy. The process may fork (the child starts without workers), be interrupted (workers block
   all signals) and exit at any time (workers are detached). */

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <time.h>

#include "denormals.h"

#define MAX_THREADS 64
#define SPIN_NANOSECONDS 30000 /* longer than the work between two barriers, shorter than anybody notices */

/* A thread's index in a job of `count` threads. A job of one thread has no barriers. */
struct worker {
    int index, count;
};

typedef void job_function(void *job, struct worker worker);

/* A value that threads wait on until it changes, as with a futex. The writer stores the value before it
   reads `sleepers`; a sleeper raises `sleepers` before it reads the value for the last time. In either
   order one of them sees the other, so no wake-up is lost. */
struct gate {
    /* On a cache line of its own: spinning threads read it all the time. */
    _Alignas(64) atomic_ulong value;
    atomic_int sleepers;
    pthread_mutex_t mutex;
    pthread_cond_t changed;
};

static struct {
    pthread_mutex_t one_job; /* held by the caller whose job runs */
    struct gate start;       /* job number x (MAX_THREADS + 1) + threads of the job */
    struct gate barrier;     /* how often all threads have met */
    /* Threads that are at the barrier. */
    _Alignas(64) atomic_int arrived;
    int started;          /* workers made so far */
    unsigned long before; /* value of `start` when the last of them were made: they wait for the next */
    job_function *function;
    void *job;
} pool = {
    .one_job = PTHREAD_MUTEX_INITIALIZER,
    .start = {.mutex = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER},
    .barrier = {.mutex = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER},
};

/* Tell the core that this is a spin loop: it leaves more to the hyper-thread beside it. */
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

/* Wait until the gate's value is not `old`, and return it. The clock is read once in 32 looks, and not
   before the first 32, as a look takes less time than the clock. */
static unsigned long wait_for_change(struct gate *gate, unsigned long old) {
    unsigned long value;
    for (long deadline = 0; !deadline || monotonic_ns() < deadline;) {
        for (int look = 0; look < 32; look++, cpu_relax()) {
            if ((value = atomic_load_explicit(&gate->value, memory_order_acquire)) != old) return value;
        }
        if (!deadline) deadline = monotonic_ns() + SPIN_NANOSECONDS;
    }
    /* Sleep: see `struct gate` for the order of these lines. */
    pthread_mutex_lock(&gate->mutex);
    atomic_fetch_add(&gate->sleepers, 1);
    while ((value = atomic_load(&gate->value)) == old) pthread_cond_wait(&gate->changed, &gate->mutex);
    atomic_fetch_sub(&gate->sleepers, 1);
    pthread_mutex_unlock(&gate->mutex);
    return value;
}

/* Change the gate's value and wake its sleepers. Without any, it is one store and one load. */
static void set_and_wake(struct gate *gate, unsigned long value) {
    atomic_store(&gate->value, value);
    if (!atomic_load(&gate->sleepers)) return;
    pthread_mutex_lock(&gate->mutex); /* a thread that is about to sleep holds the mutex: it sleeps first, then is woken */
    pthread_cond_broadcast(&gate->changed);
    pthread_mutex_unlock(&gate->mutex);
}

/* Barrier: wait until all threads of the job are here. After it all threads see what any of them wrote
   before it. The last to arrive resets the count before it opens the gate, so the barrier can be used
   again at once. */
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

/* A worker: waits for jobs for ever, and takes part in those that have a place for its index. */
static void *worker_main(void *index) {
    struct worker worker = {.index = (int)(intptr_t)index};
    flush_denormals();
    for (unsigned long order = pool.before;;) {
        order = wait_for_change(&pool.start, order);
        worker.count = (int)(order % (MAX_THREADS + 1)); /* added to the job's number by run_job */
        if (worker.index >= worker.count) continue;
        pool.function(pool.job, worker);
        barrier_wait(worker);
    }
    return 0;
}

/* After a fork: the child has none of the workers, and locks may be held by threads that it lacks.
   Everything is made anew. */
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

/* Registered once, with the first job that needs workers. */
static void register_fork_handler(void) { pthread_atfork(0, 0, reset_after_fork); }

/* Make sure that there are `count` threads, the caller among them, or as many as the system gives;
   returns how many. Signals are blocked meanwhile, as threads inherit the mask: signals are for the
   program's own threads. */
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

/* Run a job on `count` threads, the caller among them; returns when all are done. One job runs at a
   time. */
static void run_job(job_function *function, void *job, int count) {
    if (count <= 1) { /* needs no worker, and so does not wait for a job that has them */
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
        pool.function = function, pool.job = job; /* visible to workers once `start` changes */
        unsigned long jobs = atomic_load(&pool.start.value) / (MAX_THREADS + 1);
        set_and_wake(&pool.start, (jobs + 1) * (MAX_THREADS + 1) + (unsigned long)count);
    }
    const unsigned setting = flush_denormals(); /* only during the job */
    function(job, caller);
    barrier_wait(caller);
    restore_denormals(setting);
    pthread_mutex_unlock(&pool.one_job);
}
