"""The worker threads behind ``T.parallel``, written in LLVM's language and built into a library.

Every artifact carries this library (16 KB) instead of TVM's runtime (3.4 MB), which serves the
same calls with a pool per Python thread that hangs or crashes a forked child, burns a core for
100 ms after each call, pins threads, cannot grow and loses errors raised with one thread.

One pool serves the process. One parallel loop at a time has the workers; a loop that finds them
taken, or that is inside another, runs in its caller alone. Workers spin for a third of a
millisecond after their work, then sleep; they are never joined, and after a fork forgotten.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from . import linker

MAX_THREADS = 1024
SPIN = 1_000_000  # cycles of the time stamp counter

SOURCE = r"""
target triple = "x86_64-unknown-linux-gnu"

%slot = type { i32, i32, [56 x i8] }  ; how often this worker was called; whether it sleeps
%group = type { ptr, i32 }            ; TVMParallelGroupEnv: unused here; number of tasks

@slots = internal global [MAX_THREADS x %slot] zeroinitializer, align 64
@pending = internal global i32 0, align 64  ; workers that have not finished
@waiting = internal global i32 0            ; whether the caller sleeps until they have
@busy = internal global i32 0, align 64     ; whether a loop has the workers
@hired = internal global i32 0              ; workers that exist
@lambda = internal global ptr null          ; the loop: its body, what that captured, its tasks
@closure = internal global ptr null
@tasks = internal global %group zeroinitializer
@error = internal global ptr null           ; the first error that a worker met
@limit = internal thread_local global i32 1 ; threads that loops of this thread may use

declare i64 @llvm.readcyclecounter()
declare void @llvm.x86.sse2.pause()
declare ptr @llvm.threadlocal.address.p0(ptr)
declare void @llvm.memset.p0.i64(ptr, i8, i64, i1)
declare i32 @sched_yield()
declare i64 @syscall(i64, ...)
declare i32 @pthread_create(ptr, ptr, ptr, ptr)
declare i32 @pthread_detach(i64)
declare i32 @pthread_sigmask(i32, ptr, ptr)
declare ptr @aligned_alloc(i64, i64)
declare void @free(ptr)
declare void @TVMFFIErrorMoveFromRaised(ptr)
declare void @TVMFFIErrorSetRaised(ptr)
declare i32 @TVMFFIObjectDecRef(ptr)

define void @dcc_threads(i32 %threads) {
  %limit = call ptr @llvm.threadlocal.address.p0(ptr @limit)
  store i32 %threads, ptr %limit
  ret void
}

; In a forked child: there are no workers, and nobody holds or waits for anything.
define void @dcc_forget() {
  call void @llvm.memset.p0.i64(ptr @slots, i8 0, i64 SLOTS_BYTES, i1 false)
  store i32 0, ptr @pending
  store i32 0, ptr @waiting
  store i32 0, ptr @hired
  store ptr null, ptr @error
  store atomic i32 0, ptr @busy seq_cst, align 4
  ret void
}

; Waits until *word differs from `old`; returns what it is then. Spins, then sleeps; *asleep
; tells the one who changes the word that a wake-up call is needed.
define internal i32 @await(ptr %word, i32 %old, ptr %asleep) {
entry:
  %start = call i64 @llvm.readcyclecounter()
  br label %spin
spin:
  %round = phi i32 [ 0, %entry ], [ %next, %rest ], [ %next, %give ]
  %now = load atomic i32, ptr %word acquire, align 4
  %changed = icmp ne i32 %now, %old
  br i1 %changed, label %done, label %rest
rest:
  call void @llvm.x86.sse2.pause()
  %next = add i32 %round, 1
  %low = and i32 %next, 3
  %often = icmp ne i32 %low, 0
  br i1 %often, label %spin, label %give
give:
  %_ = call i32 @sched_yield()
  %time = call i64 @llvm.readcyclecounter()
  %spent = sub i64 %time, %start
  %early = icmp ult i64 %spent, SPIN
  br i1 %early, label %spin, label %sleep
sleep:
  store atomic i32 1, ptr %asleep seq_cst, align 4
  %last = load atomic i32, ptr %word seq_cst, align 4
  %late = icmp ne i32 %last, %old
  br i1 %late, label %wake, label %wait
wait:
  %r = call i64 (i64, ...) @syscall(i64 202, ptr %word, i64 128, i32 %old, ptr null)
  br label %wake
wake:
  store atomic i32 0, ptr %asleep seq_cst, align 4
  %then = load atomic i32, ptr %word acquire, align 4
  %differs = icmp ne i32 %then, %old
  br i1 %differs, label %done, label %sleep
done:
  %result = phi i32 [ %now, %spin ], [ %then, %wake ]
  ret i32 %result
}

define internal void @wake(ptr %word, ptr %asleep) {
  %flag = load atomic i32, ptr %asleep seq_cst, align 4
  %sleeps = icmp ne i32 %flag, 0
  br i1 %sleeps, label %call, label %done
call:
  %r = call i64 (i64, ...) @syscall(i64 202, ptr %word, i64 129, i32 1)
  br label %done
done:
  ret void
}

; A worker: its number is its task and its slot.
define internal ptr @work(ptr %argument) {
entry:
  %number = ptrtoint ptr %argument to i64
  %task = trunc i64 %number to i32
  %turn = getelementptr [MAX_THREADS x %slot], ptr @slots, i64 0, i64 %number, i32 0
  %asleep = getelementptr [MAX_THREADS x %slot], ptr @slots, i64 0, i64 %number, i32 1
  br label %next
next:
  %seen = phi i32 [ 0, %entry ], [ %now, %finish ], [ %now, %last ]
  %now = call i32 @await(ptr %turn, i32 %seen, ptr %asleep)
  %lambda = load ptr, ptr @lambda
  %closure = load ptr, ptr @closure
  %status = call i32 %lambda(i32 %task, ptr @tasks, ptr %closure)
  %good = icmp eq i32 %status, 0
  br i1 %good, label %finish, label %failed
failed:
  call void @keep_error()
  br label %finish
finish:
  %before = atomicrmw sub ptr @pending, i32 1 seq_cst
  %none = icmp eq i32 %before, 1
  br i1 %none, label %last, label %next
last:
  call void @wake(ptr @pending, ptr @waiting)
  br label %next
}

; Takes the error out of the worker's thread, for the caller to raise.
define internal void @keep_error() {
  %place = alloca ptr
  store ptr null, ptr %place
  call void @TVMFFIErrorMoveFromRaised(ptr %place)
  %mine = load ptr, ptr %place
  %pair = cmpxchg ptr @error, ptr null, ptr %mine seq_cst seq_cst
  %first = extractvalue { ptr, i1 } %pair, 1
  br i1 %first, label %done, label %drop
drop:
  call void @drop(ptr %mine)
  br label %done
done:
  ret void
}

define internal void @drop(ptr %object) {
  %nothing = icmp eq ptr %object, null
  br i1 %nothing, label %done, label %free
free:
  %_ = call i32 @TVMFFIObjectDecRef(ptr %object)
  br label %done
done:
  ret void
}

; Starts workers until there are `wanted`, with all signals blocked; returns how many of them are.
define internal i32 @hire(i32 %wanted) {
entry:
  %thread = alloca i64
  %all = alloca [128 x i8]
  %old = alloca [128 x i8]
  %have = load i32, ptr @hired
  %enough = icmp uge i32 %have, %wanted
  br i1 %enough, label %full, label %block
full:
  ret i32 %wanted
block:
  call void @llvm.memset.p0.i64(ptr %all, i8 -1, i64 128, i1 false)
  %a = call i32 @pthread_sigmask(i32 2, ptr %all, ptr %old)
  br label %start
start:
  %count = phi i32 [ %have, %block ], [ %number, %started ]
  %number = add i32 %count, 1
  %wide = zext i32 %number to i64
  %argument = inttoptr i64 %wide to ptr
  %failed = call i32 @pthread_create(ptr %thread, ptr null, ptr @work, ptr %argument)
  %good = icmp eq i32 %failed, 0
  br i1 %good, label %started, label %stop
started:
  store i32 %number, ptr @hired
  %id = load i64, ptr %thread
  %b = call i32 @pthread_detach(i64 %id)
  %more = icmp ult i32 %number, %wanted
  br i1 %more, label %start, label %stop
stop:
  %total = phi i32 [ %count, %start ], [ %number, %started ]
  %c = call i32 @pthread_sigmask(i32 2, ptr %old, ptr null)
  ret i32 %total
}

; Runs a parallel loop: the signature of TVMBackendParallelLaunch.
define i32 @dcc_launch(ptr %lambda, ptr %closure, i32 %requested) {
entry:
  %place = call ptr @llvm.threadlocal.address.p0(ptr @limit)
  %limit = load i32, ptr %place
  %wanted = sub i32 %limit, 1
  %several = icmp sgt i32 %limit, 1
  br i1 %several, label %take, label %alone
take:
  %pair = cmpxchg ptr @busy, i32 0, i32 1 seq_cst seq_cst
  %taken = extractvalue { i32, i1 } %pair, 1
  br i1 %taken, label %gather, label %alone
gather:
  %workers = call i32 @hire(i32 %wanted)
  %nobody = icmp eq i32 %workers, 0
  br i1 %nobody, label %release, label %publish
release:
  store atomic i32 0, ptr @busy seq_cst, align 4
  br label %alone
publish:
  store ptr %lambda, ptr @lambda
  store ptr %closure, ptr @closure
  %together = add i32 %workers, 1
  store i32 %together, ptr getelementptr (%group, ptr @tasks, i32 0, i32 1)
  store atomic i32 %workers, ptr @pending seq_cst, align 4
  br label %post
post:
  %i = phi i32 [ 1, %publish ], [ %following, %post ]
  %wide = zext i32 %i to i64
  %turn = getelementptr [MAX_THREADS x %slot], ptr @slots, i64 0, i64 %wide, i32 0
  %asleep = getelementptr [MAX_THREADS x %slot], ptr @slots, i64 0, i64 %wide, i32 1
  %_ = atomicrmw add ptr %turn, i32 1 seq_cst
  call void @wake(ptr %turn, ptr %asleep)
  %following = add i32 %i, 1
  %more = icmp ule i32 %following, %workers
  br i1 %more, label %post, label %own
own:
  %status = call i32 %lambda(i32 0, ptr @tasks, ptr %closure)
  br label %join
join:
  %left = load atomic i32, ptr @pending acquire, align 4
  %joined = icmp eq i32 %left, 0
  br i1 %joined, label %finish, label %sleep
sleep:
  %changed = call i32 @await(ptr @pending, i32 %left, ptr @waiting)
  br label %join
finish:
  %error = load ptr, ptr @error
  store ptr null, ptr @error
  store atomic i32 0, ptr @busy seq_cst, align 4
  %fine = icmp eq ptr %error, null
  br i1 %fine, label %done, label %failed
failed:
  %quiet = icmp eq i32 %status, 0
  br i1 %quiet, label %raise, label %forget
raise:
  call void @TVMFFIErrorSetRaised(ptr %error)
  br label %forget
forget:
  %result = phi i32 [ -1, %raise ], [ %status, %failed ]
  call void @drop(ptr %error)
  ret i32 %result
done:
  ret i32 %status
alone:
  %single = alloca %group
  store %group { ptr null, i32 1 }, ptr %single
  %only = call i32 %lambda(i32 0, ptr %single, ptr %closure)
  ret i32 %only
}

; TVMBackendAllocWorkspace and TVMBackendFreeWorkspace: scratch memory inside a kernel.
define ptr @dcc_alloc(i32 %type, i32 %id, i64 %bytes, i32 %code, i32 %bits) {
  %more = add i64 %bytes, 127
  %whole = and i64 %more, -64
  %memory = call ptr @aligned_alloc(i64 64, i64 %whole)
  ret ptr %memory
}

define i32 @dcc_free(i32 %type, i32 %id, ptr %memory) {
  call void @free(ptr %memory)
  ret i32 0
}
"""


def build(output: Path) -> None:
    """Writes the shared library. Needs TVM and a linker."""
    import tvm  # noqa: F401 (registers the loader of LLVM's language)
    import tvm_ffi

    text = SOURCE.replace("SLOTS_BYTES", str(64 * MAX_THREADS))
    text = text.replace("MAX_THREADS", str(MAX_THREADS)).replace("SPIN", str(SPIN))
    with tempfile.TemporaryDirectory(prefix="dccompile-") as folder:
        source, code = Path(folder) / "pool.ll", Path(folder) / "pool.o"
        source.write_text(text)
        tvm_ffi.load_module(source).write_to_file(str(code), "o")
        linker.link([code], output)
