/*
 * The copy lane in C: the measuring rod of bench/lane.ts, and nothing else.
 *
 * The same work as assembly/ with the same checks, in the same order, on the same guest memory: bounded indexes, chains
 * walked once and validated, every address translated through sorted extents with the last hit remembered, header
 * checked, receive chains collected before the first byte is written, one sequentially consistent store of the used
 * index per batch, calls decided by the event index. What C can do better it does: extents, rings and pieces hold
 * pointers, and one descriptor to one descriptor takes a short way without lists. Numbers of layouts come from layout.h, which bench/c-lane.ts writes from src/layout.
 */
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "layout.h"

#define INLINE static inline __attribute__((always_inline))
#define NOINLINE static __attribute__((noinline))
#define UNLIKELY(x) __builtin_expect(!!(x), 0)

/* Guest memory: any alignment, read once. Index, flags and event words: sequentially consistent. */
typedef uint64_t __attribute__((aligned(1), may_alias)) guest64;
typedef uint32_t __attribute__((aligned(1), may_alias)) guest32;
typedef uint16_t __attribute__((aligned(1), may_alias)) guest16;
typedef uint16_t __attribute__((may_alias)) event16;
#define READ64(at) (*(const volatile guest64 *)(at))
#define READ16(at) (*(const volatile guest16 *)(at))
#define READ8(at) (*(const volatile uint8_t *)(at))
#define LOAD16(at) __atomic_load_n((event16 *)(at), __ATOMIC_SEQ_CST)
#define STORE16(at, value) __atomic_store_n((event16 *)(at), (uint16_t)(value), __ATOMIC_SEQ_CST)

struct extent { uint64_t gpa, size; uint8_t *at; };
struct piece { uint8_t *at; uint32_t length; };
struct merged { uint32_t head, written; };
struct chain { uint64_t bytes; struct piece *end; };

struct end {
  uint32_t flags, size, header, next_avail, next_used, signalled;
  uint8_t *desc, *avail, *used;
  struct extent hit;
  uint32_t extent_count;
  struct extent extents[EXTENTS_MAX];
  struct piece pieces[PIECES_MAX];
};

struct lane {
  uint64_t *counters;
  uint32_t waiting_at, avail_limit;
  bool broke_destination;
  struct merged *merged_end;
  struct end source, destination;
  struct merged merged[VRING_SIZE_MAX];
};

enum outcome { DELIVERED, DROPPED, NO_BUFFERS };
#define NOT_WAITING 0x10000u

INLINE void count(struct lane *lane, unsigned counter, uint64_t by) { lane->counters[counter / 8] += by; }

NOINLINE enum outcome drop(struct lane *lane, unsigned reason) {
  count(lane, reason, 1);
  return DROPPED;
}

/* Translation ------------------------------------------------------------------------------------------------- */

NOINLINE bool find_extent(struct end *end, uint64_t gpa) {
  uint32_t low = 0, high = end->extent_count;
  while (low < high) {
    uint32_t middle = (low + high) / 2;
    if (end->extents[middle].gpa <= gpa) low = middle + 1;
    else high = middle;
  }
  if (low == 0 || gpa - end->extents[low - 1].gpa >= end->extents[low - 1].size) return false;
  end->hit = end->extents[low - 1];
  return true;
}

/* How many bytes follow contiguously at *at, 0 if no memory is there. */
INLINE uint64_t translate(struct end *end, uint64_t gpa, uint8_t **at) {
  uint64_t into = gpa - end->hit.gpa;
  if (UNLIKELY(into >= end->hit.size)) {
    if (!find_extent(end, gpa)) return 0;
    into = gpa - end->hit.gpa;
  }
  *at = end->hit.at + into;
  return end->hit.size - into;
}

/* The split virtqueue ----------------------------------------------------------------------------------------- */

INLINE void suppress_kicks(struct end *end) {
  if (!(end->flags & VRING_EVENT_IDX)) STORE16(end->used + USED_FLAGS, VRING_USED_F_NO_NOTIFY);
}

INLINE bool is_running(struct end *end) {
  if ((end->flags & (VRING_READY | VRING_BROKEN)) != VRING_READY) return false;
  if (UNLIKELY(end->flags & VRING_FRESH)) {
    end->next_used = LOAD16(end->used + USED_IDX);
    end->flags &= ~VRING_FRESH;
    suppress_kicks(end);
  }
  return true;
}

INLINE bool is_receiving(struct lane *lane) {
  return is_running(&lane->destination) && lane->destination.flags & VRING_ENABLED;
}

INLINE uint32_t load_avail_index(struct end *end) { return LOAD16(end->avail + AVAIL_IDX); }

INLINE uint32_t load_head(struct end *end, uint32_t index) {
  return READ16(end->avail + AVAIL_RING + (index & (end->size - 1)) * AVAIL_ENTRY_SIZE);
}

INLINE void give_used(struct end *end, uint32_t head, uint32_t written) {
  uint8_t *entry = end->used + USED_RING + (end->next_used & (end->size - 1)) * USED_ENTRY_SIZE;
  *(guest64 *)entry = head | (uint64_t)written << 32;
  end->next_used = (end->next_used + 1) & 0xffff;
}

INLINE void publish_used(struct end *end) { STORE16(end->used + USED_IDX, end->next_used); }

INLINE bool is_call_due(struct end *end) {
  uint32_t before = end->signalled;
  end->signalled = end->next_used;
  if (!(end->flags & VRING_EVENT_IDX)) return !(LOAD16(end->avail + AVAIL_FLAGS) & VRING_AVAIL_F_NO_INTERRUPT);
  uint32_t event = LOAD16(end->avail + AVAIL_RING + end->size * AVAIL_ENTRY_SIZE);
  return ((end->next_used - event - 1) & 0xffff) < ((end->next_used - before) & 0xffff);
}

INLINE uint32_t decide_call(struct lane *lane, struct end *end, unsigned counter, uint32_t due) {
  if (end->signalled == end->next_used) return 0;
  bool call = is_call_due(end);
  count(lane, call ? counter : COUNT_CALLS_SUPPRESSED, 1);
  return call ? due : 0;
}

/* Descriptor chains ------------------------------------------------------------------------------------------- */

INLINE bool append(struct end *end, struct chain *chain, uint64_t gpa, uint32_t length, uint64_t wanted) {
  uint64_t left = length;
  do {
    uint8_t *at;
    uint64_t part = translate(end, gpa, &at);
    if (part == 0) return false;
    if (part > left) part = left;
    if (chain->bytes < wanted) {
      uint64_t rest = wanted - chain->bytes;
      *chain->end++ = (struct piece){at, (uint32_t)(part < rest ? part : rest)};
    }
    chain->bytes += part;
    gpa += part;
    left -= part;
  } while (left != 0);
  return true;
}

/* Reads 64 bits that may lie in two extents. */
NOINLINE bool gather64(struct end *end, uint64_t gpa, uint64_t *value) {
  *value = 0;
  for (unsigned i = 0; i < 8; i++) {
    uint8_t *at;
    if (translate(end, gpa + i, &at) == 0) return false;
    *value |= (uint64_t)READ8(at) << (8 * i);
  }
  return true;
}

INLINE bool walk(struct end *end, const uint32_t direction, uint32_t head, struct piece *pieces, uint64_t wanted,
                 struct chain *chain) {
  const uint32_t size = end->size;
  const uint8_t *table = end->desc;
  uint64_t table_gpa = 0;
  uint32_t entries = size, index = head;
  bool indirect = false, scattered = false;
  *chain = (struct chain){0, pieces};

  for (uint32_t step = 0; step < size;) {
    uint64_t address, rest;
    if (UNLIKELY(scattered)) {
      if (!gather64(end, table_gpa + (uint64_t)index * DESC_SIZE, &address)) return false;
      if (!gather64(end, table_gpa + (uint64_t)index * DESC_SIZE + 8, &rest)) return false;
    } else {
      address = READ64(table + (uint64_t)index * DESC_SIZE);
      rest = READ64(table + (uint64_t)index * DESC_SIZE + 8);
    }
    const uint32_t length = (uint32_t)rest, flags = rest >> 32 & 0xffff, next = rest >> 48;
    if (flags & VRING_DESC_F_INDIRECT) {
      uint8_t *at;
      if (indirect || flags & VRING_DESC_F_NEXT || !(end->flags & VRING_INDIRECT)) return false;
      if (length == 0 || length % DESC_SIZE) return false;
      const uint64_t reach = translate(end, address, &at);
      if (reach == 0) return false;
      scattered = reach < length;
      table = at;
      table_gpa = address;
      entries = length / DESC_SIZE;
      index = 0;
      indirect = true;
      continue;
    }
    if ((flags & VRING_DESC_F_WRITE) != direction) return false;
    if (length != 0 && !append(end, chain, address, length, wanted)) return false;
    if (!(flags & VRING_DESC_F_NEXT)) return true;
    if (next >= entries) return false;
    index = next;
    step++;
  }
  return false;
}

/* Header and payload ------------------------------------------------------------------------------------------ */

INLINE bool asks_for_offload(const struct piece *piece) {
  if (piece->length >= 2) return READ16(piece->at) != 0;
  return (READ8(piece[0].at) | READ8(piece[1].at)) != 0;
}

INLINE void store_header(const struct piece *piece, uint32_t size, uint32_t num_buffers) {
  if (piece->length >= size) {
    *(guest64 *)piece->at = 0;
    if (size == NET_HDR_SIZE) *(guest32 *)(piece->at + 8) = num_buffers << 16;
    else *(guest16 *)(piece->at + 8) = 0;
    return;
  }
  for (uint32_t i = 0, into = 0; i < size; i++, into++) {
    while (into >= piece->length) piece++, into = 0;
    piece->at[into] = i < NET_HDR_NUM_BUFFERS ? 0 : num_buffers >> (i - NET_HDR_NUM_BUFFERS) * 8 & 0xff;
  }
}

NOINLINE void copy_pieces(const struct piece *to, uint32_t to_skip, const struct piece *from, uint32_t from_skip,
                          uint32_t length) {
  for (; to_skip >= to->length; to++) to_skip -= to->length;
  for (; from_skip >= from->length; from++) from_skip -= from->length;
  while (length != 0) {
    const uint32_t room = to->length - to_skip, rest = from->length - from_skip;
    uint32_t part = room < rest ? room : rest;
    if (part > length) part = length;
    memmove(to->at + to_skip, from->at + from_skip, part);
    length -= part;
    to_skip += part;
    from_skip += part;
    if (part == room) to++, to_skip = 0;
    if (part == rest) from++, from_skip = 0;
  }
}

/* The lane ---------------------------------------------------------------------------------------------------- */

NOINLINE enum outcome wait_for_buffers(struct lane *lane, uint32_t at) {
  if (lane->waiting_at == NOT_WAITING) count(lane, COUNT_WAITS, 1);
  lane->waiting_at = at;
  return NO_BUFFERS;
}

NOINLINE enum outcome break_destination(struct lane *lane) {
  lane->destination.flags |= VRING_BROKEN;
  lane->broke_destination = true;
  lane->waiting_at = NOT_WAITING;
  return drop(lane, COUNT_DROP_NO_RECEIVER);
}

NOINLINE void return_unused(struct lane *lane, uint32_t head) {
  for (struct merged *chain = lane->merged; chain < lane->merged_end; chain++)
    give_used(&lane->destination, chain->head, 0);
  give_used(&lane->destination, head, 0);
  count(lane, COUNT_MALFORMED, 1);
}

INLINE enum outcome collect_buffers(struct lane *lane, uint32_t frame, struct piece **pieces_end) {
  struct end *end = &lane->destination;
  const uint32_t size = end->size;
  const bool mergeable = end->flags & VRING_MERGEABLE;
  const uint64_t needed = end->header + (uint64_t)frame;
  uint32_t next = end->next_avail;
  uint64_t got = 0;
  struct piece *pieces = end->pieces;
  struct merged *merged = lane->merged;

  for (uint32_t step = 0; step <= size; step++) {
    if (next == lane->avail_limit) {
      lane->avail_limit = load_avail_index(end);
      const uint32_t taken = (next - end->next_avail) & 0xffff;
      if (((lane->avail_limit - next) & 0xffff) + taken > size) return break_destination(lane);
      if (next == lane->avail_limit)
        return taken == size ? drop(lane, COUNT_DROP_TOO_SMALL) : wait_for_buffers(lane, next);
    }
    const uint32_t head = load_head(end, next);
    if (head >= size) return break_destination(lane);
    next = (next + 1) & 0xffff;
    struct chain chain;
    if (UNLIKELY(!walk(end, VRING_DESC_F_WRITE, head, pieces, needed - got, &chain) || chain.bytes == 0 ||
                 chain.bytes > UINT32_MAX)) {
      lane->merged_end = merged;
      return_unused(lane, head);
      end->next_avail = next;
      got = 0;
      pieces = end->pieces;
      merged = lane->merged;
      continue;
    }
    if (!mergeable && chain.bytes < needed) return drop(lane, COUNT_DROP_TOO_SMALL);
    const uint64_t written = chain.bytes < needed - got ? chain.bytes : needed - got;
    *merged++ = (struct merged){head, (uint32_t)written};
    got += written;
    pieces = chain.end;
    if (got == needed) {
      end->next_avail = next;
      lane->waiting_at = NOT_WAITING;
      lane->merged_end = merged;
      *pieces_end = pieces;
      return DELIVERED;
    }
  }
  return wait_for_buffers(lane, next);
}

NOINLINE enum outcome carry_frame(struct lane *lane, uint32_t head, uint64_t *frame_bytes) {
  struct end *source = &lane->source, *destination = &lane->destination;
  if (!(source->flags & VRING_ENABLED)) return drop(lane, COUNT_DROP_DISABLED);
  const uint32_t header = source->header;
  const uint64_t bytes_max = header + (uint64_t)FRAME_BYTES_MAX;
  struct chain chain;
  if (UNLIKELY(!walk(source, 0, head, source->pieces, bytes_max, &chain))) return drop(lane, COUNT_DROP_MALFORMED);
  if (chain.bytes < header + FRAME_BYTES_MIN || chain.bytes > bytes_max) return drop(lane, COUNT_DROP_BAD_FRAME);
  if (asks_for_offload(source->pieces)) return drop(lane, COUNT_DROP_BAD_FRAME);
  const uint32_t bytes = (uint32_t)chain.bytes - header;
  *frame_bytes = bytes;

  if (UNLIKELY(!is_receiving(lane))) {
    if (destination->flags & VRING_SINK) return DELIVERED;
    return drop(lane, COUNT_DROP_NO_RECEIVER);
  }
  struct piece *pieces_end = NULL;
  const enum outcome outcome = collect_buffers(lane, bytes, &pieces_end);
  if (outcome != DELIVERED) return outcome;
  store_header(destination->pieces, destination->header, (uint32_t)(lane->merged_end - lane->merged));
  if (chain.end == source->pieces + 1 && pieces_end == destination->pieces + 1)
    memmove(destination->pieces->at + destination->header, source->pieces->at + header, bytes);
  else copy_pieces(destination->pieces, destination->header, source->pieces, header, bytes);
  for (struct merged *merged = lane->merged; merged < lane->merged_end; merged++)
    give_used(destination, merged->head, merged->written);
  return DELIVERED;
}

/* A chain of one descriptor inside the extent found last: its place and length; NULL for anything else. */
INLINE uint8_t *load_only(const struct end *end, uint32_t head, const uint32_t direction, uint32_t *length) {
  const uint8_t *descriptor = end->desc + (uint64_t)head * DESC_SIZE;
  const uint64_t address = READ64(descriptor), rest = READ64(descriptor + 8);
  if ((rest >> 32 & (VRING_DESC_F_NEXT | VRING_DESC_F_WRITE | VRING_DESC_F_INDIRECT)) != direction) return NULL;
  const uint64_t into = address - end->hit.gpa;
  *length = (uint32_t)rest;
  if (into >= end->hit.size || end->hit.size - into < *length) return NULL;
  return end->hit.at + into;
}

/* The common case without lists: one descriptor to one descriptor. false: nothing was changed, carry_frame() is to do it. */
INLINE bool carry_at_once(struct lane *lane, uint32_t head, bool receiving, uint64_t *frame_bytes) {
  struct end *source = &lane->source, *destination = &lane->destination;
  if (!receiving || destination->next_avail == lane->avail_limit || !(source->flags & VRING_ENABLED)) return false;
  uint32_t length, room;
  const uint8_t *from = load_only(source, head, 0, &length);
  if (!from || length - (source->header + FRAME_BYTES_MIN) > FRAME_BYTES_MAX - FRAME_BYTES_MIN) return false;
  if (READ16(from) != 0) return false;
  const uint32_t to_head = load_head(destination, destination->next_avail);
  if (to_head >= destination->size) return false;
  uint8_t *to = load_only(destination, to_head, VRING_DESC_F_WRITE, &room);
  const uint32_t frame = length - source->header, header = destination->header;
  if (!to || room < header + frame) return false;
  *(guest64 *)to = 0;
  if (header == NET_HDR_SIZE) *(guest32 *)(to + 8) = 1 << 16;
  else *(guest16 *)(to + 8) = 0;
  memmove(to + header, from + source->header, frame);
  destination->next_avail = (destination->next_avail + 1) & 0xffff;
  lane->waiting_at = NOT_WAITING;
  *frame_bytes = frame;
  give_used(destination, to_head, header + frame);
  return true;
}

INLINE uint32_t finish_destination(struct lane *lane) {
  struct end *end = &lane->destination;
  uint32_t result = 0;
  if (lane->broke_destination) {
    lane->broke_destination = false;
    result = POLL_BROKE_DESTINATION;
  } else if (!is_running(end)) return 0;
  if (end->signalled != end->next_used) publish_used(end);
  return result | decide_call(lane, end, COUNT_CALLS_DESTINATION, POLL_CALL_DESTINATION);
}

/* Carries up to `budget` frames; POLL_* of layout.h. */
uint32_t lane_poll(struct lane *lane, uint32_t budget, bool stuck) {
  struct end *source = &lane->source;
  if (!is_running(source)) return 0;
  const bool receiving = is_receiving(lane);
  if (lane->waiting_at != NOT_WAITING && !stuck && receiving) {
    if (load_avail_index(&lane->destination) == lane->waiting_at) return POLL_WAITING;
  }
  const uint32_t size = source->size, first = source->next_avail;
  const uint32_t pending = (load_avail_index(source) - first) & 0xffff;
  if (pending == 0) return lane->waiting_at != NOT_WAITING ? POLL_WAITING : 0;
  if (pending > size) {
    source->flags |= VRING_BROKEN;
    return POLL_BROKE_SOURCE;
  }

  uint32_t result = 0, taken = 0;
  uint64_t delivered = 0, bytes = 0;
  if (receiving) lane->avail_limit = lane->destination.next_avail;
  const uint32_t limit = pending < budget ? pending : budget;
  for (; taken < limit; taken++) {
    const uint32_t head = load_head(source, first + taken);
    if (UNLIKELY(head >= size)) {
      source->flags |= VRING_BROKEN;
      result |= POLL_BROKE_SOURCE;
      break;
    }
    uint64_t frame_bytes = 0;
    enum outcome outcome =
        carry_at_once(lane, head, receiving, &frame_bytes) ? DELIVERED : carry_frame(lane, head, &frame_bytes);
    if (UNLIKELY(outcome == NO_BUFFERS)) {
      if (!stuck) break;
      outcome = drop(lane, COUNT_DROP_NO_BUFFER);
    }
    if (outcome == DELIVERED) {
      delivered++;
      bytes += frame_bytes;
    }
    give_used(source, head, 0);
  }

  source->next_avail = (first + taken) & 0xffff;
  if (taken) publish_used(source);
  if (delivered) {
    count(lane, COUNT_PACKETS, delivered);
    count(lane, COUNT_BYTES, bytes);
    count(lane, COUNT_BATCHES, 1);
  }
  if (lane->waiting_at != NOT_WAITING) result |= POLL_WAITING;
  return result | taken | finish_destination(lane) | decide_call(lane, source, COUNT_CALLS_SOURCE, POLL_CALL_SOURCE);
}

/* State comes from and goes back to the lane's memory 0, so that Wasm and C take turns on the same rings ------- */

static void load_end(struct end *end, uint8_t *state, const uint8_t *extents, uint8_t *const *segments) {
#define STATE32(at) (*(uint32_t *)(state + (at)))
#define STATE64(at) (*(uint64_t *)(state + (at)))
  end->flags = STATE32(VRING_FLAGS);
  end->size = STATE32(VRING_SIZE);
  end->header = STATE32(VRING_HEADER_SIZE);
  end->next_avail = STATE32(VRING_NEXT_AVAIL);
  end->next_used = STATE32(VRING_NEXT_USED);
  end->signalled = end->next_used - STATE32(VRING_UNDECIDED);
  end->desc = segments[STATE32(VRING_DESC_SEGMENT)] + STATE64(VRING_DESC);
  end->avail = segments[STATE32(VRING_AVAIL_SEGMENT)] + STATE64(VRING_AVAIL);
  end->used = segments[STATE32(VRING_USED_SEGMENT)] + STATE64(VRING_USED);
  end->hit = (struct extent){0};
  end->extent_count = *(const uint32_t *)extents;
  for (uint32_t i = 0; i < end->extent_count; i++) {
    const uint8_t *entry = extents + EXTENTS_FIRST + i * EXTENT_BYTES;
    end->extents[i].gpa = *(const uint64_t *)(entry + EXTENT_GPA);
    end->extents[i].size = *(const uint64_t *)(entry + EXTENT_SIZE);
    end->extents[i].at = segments[*(const uint32_t *)(entry + EXTENT_SEGMENT)] + *(const uint64_t *)(entry + EXTENT_OFFSET);
  }
}

static void store_end(const struct end *end, uint8_t *state) {
  STATE32(VRING_FLAGS) = end->flags;
  STATE32(VRING_NEXT_AVAIL) = end->next_avail;
  STATE32(VRING_NEXT_USED) = end->next_used;
  STATE32(VRING_PUBLISHED) = end->next_used;
  STATE32(VRING_UNDECIDED) = (uint16_t)(end->next_used - end->signalled);
}

struct lane *lane_create(void) { return calloc(1, sizeof(struct lane)); }

void lane_free(struct lane *lane) { free(lane); }

/* segments: host addresses, SEGMENTS_MAX of the source, then SEGMENTS_MAX of the destination. */
void lane_load(struct lane *lane, uint8_t *memory, uint8_t *const *segments) {
  lane->counters = (uint64_t *)(memory + COUNTERS);
  lane->waiting_at = NOT_WAITING;
  load_end(&lane->source, memory + SOURCE_VRING, memory + SOURCE_EXTENTS, segments);
  load_end(&lane->destination, memory + DESTINATION_VRING, memory + DESTINATION_EXTENTS, segments + SEGMENTS_MAX);
}

void lane_store(const struct lane *lane, uint8_t *memory) {
  store_end(&lane->source, memory + SOURCE_VRING);
  store_end(&lane->destination, memory + DESTINATION_VRING);
}

/* The loops around lane_poll(); in C too, for a call from JavaScript costs more than a packet ------------------ */

static double now_ns(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec * 1e9 + time.tv_nsec;
}

/* Polls until `frames` are carried. Nanoseconds it took; negative if a poll found nothing to do. */
double lane_drain(struct lane *lane, uint32_t budget, uint32_t frames) {
  const double start = now_ns();
  for (uint32_t done = 0, taken; done < frames; done += taken) {
    taken = lane_poll(lane, budget, false) & POLL_COUNT;
    if (taken == 0) return -1;
  }
  return now_ns() - start;
}

/* Polls for `duration` ns. result: nanoseconds, frames, polls, polls that found nothing. */
void lane_run(struct lane *lane, uint32_t budget, double duration, double *result) {
  const double start = now_ns();
  uint64_t frames = 0, polls = 0, idle = 0;
  double elapsed;
  do {
    for (unsigned i = 0; i < 1024; i++) {
      const uint32_t taken = lane_poll(lane, budget, false) & POLL_COUNT;
      frames += taken;
      idle += taken == 0;
    }
    polls += 1024;
    elapsed = now_ns() - start;
  } while (elapsed < duration);
  result[0] = elapsed;
  result[1] = frames;
  result[2] = polls;
  result[3] = idle;
}
