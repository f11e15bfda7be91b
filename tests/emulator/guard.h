// While one lives, signals that a fiber causes end its launch, and so does its time.
#pragma once
#include <signal.h>
#include <time.h>

namespace emu {

struct Guard {
  timer_t timer;
  bool timed;
  stack_t stack, old_stack;
  explicit Guard(unsigned seconds);  // of processor time
  ~Guard();
};

}  // namespace emu
