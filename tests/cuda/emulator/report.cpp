// What a kernel's faults look like.
#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "threads.h"

namespace fastrnn_emulator {
namespace {

void print_thread(const Thread& t) {
  std::fprintf(stderr, "block (%u,%u,%u) thread (%u,%u,%u)", t.block->index.x, t.block->index.y,
               t.block->index.z, t.index.x, t.index.y, t.index.z);
}

// Says who waits where, once for each place.
void print_waiting() {
  std::vector<const Thread*> seen;
  for (const Block& block : residents->blocks) {
    for (const Thread& t : block.threads) {
      if (!t.waits) continue;
      const auto same = [&](const Thread* s) {
        return s->where.line == t.where.line && std::strcmp(s->where.file, t.where.file) == 0 &&
               s->waits->operation.mask == t.waits->operation.mask;
      };
      if (std::any_of(seen.begin(), seen.end(), same)) continue;
      size_t count = 0;
      for (const Block& other : residents->blocks) {
        for (const Thread& u : other.threads) count += u.waits && same(&u);
      }
      seen.push_back(&t);
      std::fprintf(stderr, "  %s:%d: %zu wait at %s", t.where.file, t.where.line, count,
                   t.waits->operation.name);
      if (t.waits->operation.mask) {
        unsigned missing = t.waits->operation.mask & t.warp->existing;
        for (const Thread* u = t.waits->first; u; u = u->next) missing &= ~(1u << u->lane);
        std::fprintf(stderr, " with mask 0x%08x, for lanes 0x%08x", t.waits->operation.mask,
                     missing);
      }
      std::fprintf(stderr, ", such as ");
      print_thread(t);
      std::fprintf(stderr, "\n");
    }
  }
  std::fprintf(stderr, "  %zu of %zu threads have left the kernel\n", residents->all.exited,
               residents->all.threads);
}

}  // namespace

void deadlock() {
  std::fprintf(stderr, "fastrnn emulator: error: deadlock: all threads wait\n");
  print_waiting();
  std::abort();
}

void fail(Where where, const char* format, ...) {
  std::fprintf(stderr, "%s:%d: fastrnn emulator: error: ", where.file, where.line);
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  std::fprintf(stderr, "\n  in ");
  print_thread(*current);
  std::fprintf(stderr, "\n");
  print_waiting();
  std::abort();
}

}  // namespace fastrnn_emulator
