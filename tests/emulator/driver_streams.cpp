// Streams, events and graphs of the stand-in for libcuda.so.1, see driver.h.
//
// Work is done when it is submitted, or with EMU_LATE when somebody must see it done: both are
// legal, and a program that needs neither does not notice. Blocking streams and the legacy stream
// wait for each other.
#include <time.h>

#include "driver.h"

namespace emu {
namespace {

uint64_t now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000000000ull + t.tv_nsec;
}

bool known(Stream* stream) { return stream == &driver.legacy || driver.streams.count(stream); }

}  // namespace

// Handles 0 to 2 are the legacy stream and that of the thread.
Stream* stream_of(void* handle) {
  return (uintptr_t)handle <= 2 ? &driver.legacy : (Stream*)handle;
}

int drain(Stream* stream, uint64_t until) {
  while (!stream->queue.empty() && stream->done < until) {
    Work work = std::move(stream->queue.front());
    stream->queue.pop_front();
    stream->done++;
    if (int result = work()) return result;
  }
  return driver.broken;
}

int drain_all() {
  int result = drain(&driver.legacy);
  for (auto& [stream, blocking] : driver.streams)
    if (int other = drain(stream)) result = result ? result : other;
  return result;
}

int submit(void* handle, Work work) {
  Stream* stream = stream_of(handle);
  if (!known(stream)) return INVALID_HANDLE;
  if (stream->capture) {
    stream->capture->work.push_back(std::move(work));
    return stream->spoilt ? CAPTURE_INVALIDATED : SUCCESS;
  }
  for (auto& [other, blocking] :
       driver.streams) {  // the legacy stream and blocking ones take turns
    if (!blocking || other->capture) continue;
    if (stream == &driver.legacy)
      drain(other);
    else if (other == stream)
      drain(&driver.legacy);
  }
  stream->queue.push_back(std::move(work));
  stream->queued++;
  if (!driver.late) drain(stream);  // a failure shows in the next call
  return SUCCESS;
}

bool forbidden_in_capture() {
  bool found = false;
  for (auto& [stream, blocking] : driver.streams)
    if (stream->capture && !stream->relaxed) found = stream->spoilt = true;
  return found;
}

}  // namespace emu

using namespace emu;

API cuStreamCreate(Stream** stream, unsigned flags) {
  BEGIN();
  *stream = new Stream();
  driver.streams[*stream] = !(flags & 1);
  driver.objects++;
  return SUCCESS;
}

API cuStreamCreateWithPriority(Stream** stream, unsigned flags, int) {
  return cuStreamCreate(stream, flags);
}

API cuStreamDestroy_v2(Stream* stream) {
  BEGIN();
  if (!driver.streams.count(stream)) return INVALID_HANDLE;
  drain(stream);
  driver.streams.erase(stream);
  delete stream;
  driver.objects--;
  return SUCCESS;
}

API cuStreamSynchronize(void* handle) {
  BEGIN();
  Stream* stream = stream_of(handle);
  if (!known(stream)) return INVALID_HANDLE;
  if (stream->capture) {
    stream->spoilt = true;
    return CAPTURE_UNSUPPORTED;
  }
  return drain(stream);
}

API cuStreamQuery(void* handle) {
  BEGIN();
  Stream* stream = stream_of(handle);
  if (!known(stream)) return INVALID_HANDLE;
  bool waiting = !stream->queue.empty();
  if (int result = drain(stream)) return result;  // done by the next time
  return waiting ? NOT_READY : SUCCESS;
}

// ---- events ----

API cuEventCreate(Event** event, unsigned flags) {
  BEGIN();
  *event = new Event{!(flags & 2)};
  driver.objects++;
  return SUCCESS;
}

API cuEventDestroy_v2(Event* event) {
  BEGIN();
  drain_all();  // its work is not waited for by the driver, but writes to it here
  delete event;
  driver.objects--;
  return SUCCESS;
}

API cuEventRecord(Event* event, void* handle) {
  BEGIN();
  Stream* stream = stream_of(handle);
  if (!known(stream)) return INVALID_HANDLE;
  if (stream->capture) return SUCCESS;
  int result = submit(handle, [=] {
    event->nanoseconds = now();
    return SUCCESS;
  });
  event->stream = stream, event->place = stream->queued;
  return result;
}

API cuEventSynchronize(Event* event) {
  BEGIN();
  return event->stream && known(event->stream) ? drain(event->stream, event->place) : SUCCESS;
}

API cuEventQuery(Event* event) {
  BEGIN();
  bool waiting = event->stream && known(event->stream) && event->stream->done < event->place;
  return waiting ? NOT_READY : SUCCESS;
}

API cuEventElapsedTime(float* milliseconds, Event* from, Event* to) {
  BEGIN();
  if (!from->timed || !to->timed || !from->stream || !to->stream) return INVALID_HANDLE;
  if (!from->nanoseconds || !to->nanoseconds) return NOT_READY;
  *milliseconds = ((double)to->nanoseconds - (double)from->nanoseconds) * 1e-6;
  return SUCCESS;
}
API cuEventElapsedTime_v2(float* milliseconds, Event* from, Event* to) {
  return cuEventElapsedTime(milliseconds, from, to);
}

API cuStreamWaitEvent(void* handle, Event* event, unsigned) {
  BEGIN();
  Stream *other = event->stream, *stream = stream_of(handle);
  if (!known(stream)) return INVALID_HANDLE;
  if (!other || stream->capture) return SUCCESS;
  uint64_t place = event->place;
  return submit(handle, [=] { return known(other) ? drain(other, place) : (int)SUCCESS; });
}

// ---- graphs ----

API cuStreamBeginCapture_v2(void* handle, int mode) {
  BEGIN();
  Stream* stream = stream_of(handle);
  if (stream == &driver.legacy) return CAPTURE_UNSUPPORTED;
  if (!known(stream)) return INVALID_HANDLE;
  if (stream->capture) return INVALID_VALUE;
  stream->capture = new Graph();
  stream->relaxed = mode == 2, stream->spoilt = false;
  driver.objects++;
  return SUCCESS;
}

API cuStreamIsCapturing(void* handle, int* status) {
  BEGIN();
  Stream* stream = stream_of(handle);
  *status = !stream->capture ? 0 : stream->spoilt ? 2 : 1;
  return SUCCESS;
}

API cuStreamEndCapture(void* handle, Graph** graph) {
  BEGIN();
  Stream* stream = stream_of(handle);
  if (!stream->capture) return INVALID_VALUE;
  *graph = stream->capture;
  stream->capture = nullptr;
  if (!stream->spoilt) return SUCCESS;
  delete *graph;
  *graph = nullptr;
  driver.objects--;
  return CAPTURE_INVALIDATED;
}

API cuGraphInstantiateWithFlags(Graph** runnable, Graph* graph, uint64_t) {
  BEGIN();
  if (!graph) return INVALID_VALUE;
  *runnable = new Graph(*graph);
  driver.objects++;
  return SUCCESS;
}
API cuGraphInstantiate_v2(Graph** runnable, Graph* graph, void*, char*, size_t) {
  return cuGraphInstantiateWithFlags(runnable, graph, 0);
}

API cuGraphGetNodes(Graph* graph, void**, size_t* count) {
  BEGIN();
  *count = graph->work.size();
  return SUCCESS;
}

API cuGraphUpload(Graph*, void*) {
  BEGIN();
  return SUCCESS;
}

API cuGraphLaunch(Graph* runnable, void* stream) {
  BEGIN();
  if (!runnable) return INVALID_VALUE;
  for (const Work& work : runnable->work)
    if (int result = submit(stream, work)) return result;
  return SUCCESS;
}

API cuGraphDestroy(Graph* graph) {
  BEGIN();
  delete graph;
  driver.objects--;
  return SUCCESS;
}
API cuGraphExecDestroy(Graph* runnable) { return cuGraphDestroy(runnable); }
