// What ends a kernel that crashes or does not end.
#include "guard.h"

#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "multiprocessor.h"

namespace emu {
namespace {

constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGVTALRM};
constexpr int kSignalCount = sizeof kSignals / sizeof *kSignals;
struct sigaction before[kSignalCount];
pid_t launching;

void on_signal(int number, siginfo_t* info, void* context) {
  int i = 0;
  while (kSignals[i] != number) i++;
  if (!in_fiber || syscall(SYS_gettid) != launching) {                // not ours
    if (number != SIGVTALRM) sigaction(number, &before[i], nullptr);  // it comes again
    return;
  }
  mp.thread[mp.running].where = (void*)((ucontext_t*)context)->uc_mcontext.gregs[REG_RIP];
  if (number == SIGVTALRM) fail("still runs after %u s: an endless loop?", mp.launch->seconds);
  if (number == SIGFPE) fail("integer division by zero, or one that overflows");
  fail("access to the address %p, where no memory is", info->si_addr);
}

}  // namespace

Guard::Guard(unsigned seconds) {
  launching = syscall(SYS_gettid);
  static char* room =
      (char*)mmap(nullptr, 64 << 10, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  stack = {};
  stack.ss_sp = room, stack.ss_size = 64 << 10;
  sigaltstack(&stack, &old_stack);
  struct sigaction action = {};
  action.sa_sigaction = on_signal;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  for (int i = 0; i < kSignalCount; i++) sigaction(kSignals[i], &action, &before[i]);
  sigevent event = {};
  event.sigev_notify = SIGEV_THREAD_ID;
  event.sigev_signo = SIGVTALRM;
  event._sigev_un._tid = launching;
  timed = timer_create(CLOCK_THREAD_CPUTIME_ID, &event, &timer) == 0;
  itimerspec end = {{0, 50000000}, {(time_t)seconds, 0}};  // again and again until it hits a fiber
  if (timed) timer_settime(timer, 0, &end, nullptr);
}

Guard::~Guard() {
  if (timed) timer_delete(timer);
  for (int i = 0; i < kSignalCount; i++) sigaction(kSignals[i], &before[i], nullptr);
  sigaltstack(&old_stack, nullptr);
}

}  // namespace emu
