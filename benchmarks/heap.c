/* Counts the bytes that a process has allocated, and the most at once. Loaded before libc
 * (LD_PRELOAD), it sees what anybody allocates: torch's allocator, and the buffers that a library
 * takes inside an operation. For glibc, whose own functions it calls. */
#include <errno.h>
#include <malloc.h>
#include <stdatomic.h>
#include <stddef.h>

extern void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_realloc(void *, size_t);
extern void *__libc_memalign(size_t, size_t);
extern void __libc_free(void *);

static atomic_long live, peak;

long heap_live(void) { return atomic_load(&live); }
long heap_peak(void) { return atomic_load(&peak); }
void heap_reset_peak(void) { atomic_store(&peak, atomic_load(&live)); }

static void change(long bytes) {
  const long now = atomic_fetch_add(&live, bytes) + bytes;
  long most = atomic_load(&peak);
  while (now > most && !atomic_compare_exchange_weak(&peak, &most, now)) {
  }
}

static long size_of(void *block) { return (long)malloc_usable_size(block); }

static void *counted(void *block) {
  if (block) change(size_of(block));
  return block;
}

void *malloc(size_t size) { return counted(__libc_malloc(size)); }
void *calloc(size_t count, size_t size) { return counted(__libc_calloc(count, size)); }
void *memalign(size_t alignment, size_t size) { return counted(__libc_memalign(alignment, size)); }
void *aligned_alloc(size_t alignment, size_t size) { return memalign(alignment, size); }

int posix_memalign(void **result, size_t alignment, size_t size) {
  void *block = memalign(alignment, size);
  if (!block) return ENOMEM;
  *result = block;
  return 0;
}

void *realloc(void *old, size_t size) {
  const long before = size_of(old);
  void *block = __libc_realloc(old, size);
  if (block || size == 0) change((block ? size_of(block) : 0) - before);
  return block;
}

void free(void *block) {
  if (block) change(-size_of(block));
  __libc_free(block);
}
