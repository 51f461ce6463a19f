/* Calls the pool of codegen/cpu/pool.c as hostile callers would: from many threads at once, nested,
   with tasks that fail, and in children that are forked in the middle. Ends with 0 where each task
   ran once, and each launch told whether one of its tasks failed. Arguments: rounds, forks. */

#include "pool.c"

#include <pthread.h>
#include <stdio.h>
#include <sys/wait.h>

enum {
  CALLERS = 20, /* more than there are slots */
  MOST = 1024,  /* tasks, which is enough for those that the pool chooses for 128 threads */
};

typedef struct {
  _Atomic int runs[MOST];
  int fails; /* the task that does; none: -1 */
  int nests;
} Job;

static _Atomic int taken_errors, raised_errors, wrong;

static void take(void **error) {
  *error = (void *)1;
  taken_errors++;
}
static void raised(void *error) {
  (void)error;
  raised_errors++;
}
static void text(const char *kind, const char *what) { fprintf(stderr, "%s: %s\n", kind, what); }
static int release(void *object) { return object != (void *)1; }
static int create(unsigned long *thread, const void *attributes, void *(*entry)(void *),
                  void *argument) {
  return pthread_create((pthread_t *)thread, attributes, entry, argument);
}
static int detach(unsigned long thread) { return pthread_detach((pthread_t)thread); }

static int inner(int task, Group *group, void *data) {
  (void)group;
  ((_Atomic int *)data)[task]++;
  return 0;
}

static int outer(int task, Group *group, void *data) {
  Job *job = data;
  if (task < 0 || task >= group->tasks)
    wrong++;
  job->runs[task]++;
  if (job->nests && task % 7 == 0) {
    _Atomic int runs[5] = {0};
    if (moec_pool_launch(inner, runs, 5))
      wrong++;
    for (int i = 0; i < 5; i++)
      wrong += runs[i] != 1;
  }
  return task == job->fails ? -1 : 0;
}

static void launch_one(unsigned number) {
  static const int sizes[] = {0, 1, 2, 3, 31, 64, 300};
  int tasks = sizes[number % 7], chosen = tasks ? tasks : 1;
  Job job = {.fails = number % 5 == 0 && tasks ? (int)(number % (unsigned)tasks) : -1};
  job.nests = number % 3 == 0;
  int code = moec_pool_launch(outer, &job, tasks);
  if ((code != 0) != (job.fails >= 0))
    wrong++;
  int most = 0;
  for (int i = 0; i < MOST; i++) {
    wrong += job.runs[i] > 1;
    most += job.runs[i];
  }
  /* A loop without threads ends with the first failure; the pool chooses how many tasks 0 means. */
  wrong += job.fails < 0 && tasks ? most != tasks : most < (job.fails < 0 ? chosen : 1);
}

static void *call(void *rounds) {
  for (long i = 0; i < (long)rounds; i++)
    launch_one((unsigned)i * 2654435761u >> 8);
  return NULL;
}

int main(int count, char **words) {
  long rounds = count > 1 ? atol(words[1]) : 100, forks = count > 2 ? atol(words[2]) : 0;
  Functions given = {create, detach, take, raised, text, release};
  moec_pool_connect(&given);
  pthread_t callers[CALLERS];
  for (int i = 0; i < CALLERS; i++)
    pthread_create(&callers[i], NULL, call, (void *)rounds);
  for (long i = 0; i < forks; i++) {
    pid_t child = fork();
    if (!child) {
      alarm(60); /* a child that hangs is ended */
      moec_pool_forked();
      wrong = 0;
      call((void *)20);
      _exit(wrong ? 1 : 0);
    }
    int status = 0;
    waitpid(child, &status, 0);
    wrong += status != 0;
  }
  for (int i = 0; i < CALLERS; i++)
    pthread_join(callers[i], NULL);
  if (atomic_load(&threads) < 2 || taken_errors < 1 || taken_errors != raised_errors)
    wrong++;
  fprintf(stderr, "threads %u, errors %d, wrong %d\n", atomic_load(&threads), taken_errors, wrong);
  return wrong ? 1 : 0;
}
