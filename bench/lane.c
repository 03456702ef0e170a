/*
 * The copy lane in C: the measuring rod of bench/lane.ts, and nothing else.
 *
 * The same work as assembly/ with the same checks, in the same order, on the same guest memory: bounded indexes, chains
 * walked once and validated, every address translated through sorted extents with the last hit remembered, header
 * checked, receive chains collected before the first byte is written, one sequentially consistent store of the used
 * index or of the first used flags per batch, calls decided by the event index. Offloads are not in here: the bench's
 * drivers ask for none. What C can do better it does: extents, rings and pieces hold pointers, and one descriptor to one
 * descriptor takes a short way without lists. Numbers of layouts come from layout.h, which bench/c-lane.ts writes from
 * src/layout.
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
typedef uint64_t __attribute__((may_alias)) event64;
#define READ64(at) (*(const volatile guest64 *)(at))
#define READ16(at) (*(const volatile guest16 *)(at))
#define LOAD64(at) __atomic_load_n((event64 *)(at), __ATOMIC_SEQ_CST)
#define READ8(at) (*(const volatile uint8_t *)(at))
#define LOAD16(at) __atomic_load_n((event16 *)(at), __ATOMIC_SEQ_CST)
#define STORE16(at, value) __atomic_store_n((event16 *)(at), (uint16_t)(value), __ATOMIC_SEQ_CST)

struct extent { uint64_t gpa, size; uint8_t *at; };
struct piece { uint8_t *at; uint32_t length; };
struct merged { uint32_t id, slots, written; };
struct chain { uint64_t bytes; struct piece *end; uint32_t id, slots; };

struct end {
  uint32_t flags, size, header, next_avail, next_used, published, undecided, held_flags;
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
enum walked { NONE, READY, REFUSED, BROKEN };
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

/* The virtqueues ---------------------------------------------------------------------------------------------- */

/* Functions that take `packed` are compiled for either format where it matters. */
INLINE bool is_packed(const struct end *end) { return end->flags & VRING_PACKED; }

INLINE void suppress_kicks(struct end *end) {
  if (is_packed(end)) STORE16(end->used + PACKED_EVENT_FLAGS, VRING_PACKED_EVENT_FLAG_DISABLE);
  else if (!(end->flags & VRING_EVENT_IDX)) STORE16(end->used + USED_FLAGS, VRING_USED_F_NO_NOTIFY);
}

INLINE bool is_running(struct end *end) {
  if ((end->flags & (VRING_READY | VRING_BROKEN)) != VRING_READY) return false;
  if (UNLIKELY(end->flags & VRING_FRESH)) {
    end->next_used = is_packed(end) ? end->next_avail : LOAD16(end->used + USED_IDX);
    end->published = end->next_used;
    end->flags &= ~VRING_FRESH;
    suppress_kicks(end);
  }
  return true;
}

INLINE bool is_receiving(struct lane *lane) {
  return is_running(&lane->destination) && lane->destination.flags & VRING_ENABLED;
}

INLINE uint32_t load_avail_index(struct end *end) { return LOAD16(end->avail + AVAIL_IDX); }

INLINE uint32_t load_head(const struct end *end, uint32_t index) {
  return READ16(end->avail + AVAIL_RING + (index & (end->size - 1)) * AVAIL_ENTRY_SIZE);
}

/* A position in a packed ring: slot | wrap counter << 15. */
#define SLOT 0x7fffu
#define WRAP (1u << VRING_PACKED_EVENT_F_WRAP_CTR)
#define AVAIL (1u << VRING_PACKED_DESC_F_AVAIL)
#define USED (1u << VRING_PACKED_DESC_F_USED)

INLINE uint32_t available_at(uint32_t position) { return position & WRAP ? AVAIL : USED; }

INLINE uint32_t used_at(uint32_t position) { return position & WRAP ? AVAIL | USED : 0; }

INLINE uint8_t *slot_at(const struct end *end, uint32_t position) {
  return end->desc + (uint64_t)(position & SLOT) * DESC_SIZE;
}

/* Length, id and flags of the slot there; false if it is not available. */
INLINE bool load_slot(const struct end *end, uint32_t position, uint64_t *rest) {
  *rest = LOAD64(slot_at(end, position) + PACKED_DESC_LEN);
  return (*rest >> 48 & (AVAIL | USED)) == available_at(position);
}

INLINE uint32_t advance(const struct end *end, const bool packed, uint32_t position, uint32_t slots) {
  if (!packed) return (position + 1) & 0xffff;
  const uint32_t slot = (position & SLOT) + slots;
  return slot < end->size ? (position & WRAP) | slot : ((position & WRAP) ^ WRAP) | (slot - end->size);
}

/* Slots from one position in a packed ring on to another, mod two laps. */
INLINE uint32_t slots_between(const struct end *end, uint32_t from, uint32_t to) {
  const uint32_t slots = (to & SLOT) - (from & SLOT) + ((from ^ to) & WRAP ? end->size : 0);
  return (int32_t)slots < 0 ? slots + 2 * end->size : slots;
}

INLINE void give_used(struct end *end, const bool packed, uint32_t id, uint32_t written, uint32_t slots) {
  end->undecided += slots;
  if (!packed) {
    uint8_t *entry = end->used + USED_RING + (end->next_used & (end->size - 1)) * USED_ENTRY_SIZE;
    *(guest64 *)entry = id | (uint64_t)written << 32;
    end->next_used = (end->next_used + 1) & 0xffff;
    return;
  }
  uint8_t *slot = slot_at(end, end->next_used);
  const uint32_t flags = used_at(end->next_used) | (written ? VRING_DESC_F_WRITE : 0);
  if (end->next_used == end->published) {
    *(guest32 *)(slot + PACKED_DESC_LEN) = written;
    *(guest16 *)(slot + PACKED_DESC_ID) = id;
    end->held_flags = flags;
  } else *(guest64 *)(slot + PACKED_DESC_LEN) = written | (uint64_t)id << 32 | (uint64_t)flags << 48;
  for (uint32_t i = 1; i < slots; i++) {
    const uint32_t position = advance(end, true, end->next_used, i);
    slot_at(end, position)[PACKED_DESC_FLAGS + 1] = used_at(position) >> 8;
  }
  end->next_used = advance(end, true, end->next_used, slots);
}

INLINE void publish_used(struct end *end) {
  if (is_packed(end)) STORE16(slot_at(end, end->published) + PACKED_DESC_FLAGS, end->held_flags);
  else STORE16(end->used + USED_IDX, end->next_used);
  end->published = end->next_used;
}

NOINLINE bool is_call_due_packed(struct end *end, uint32_t slots) {
  const uint32_t flags = LOAD16(end->avail + PACKED_EVENT_FLAGS) & 3;
  if (flags == VRING_PACKED_EVENT_FLAG_DISABLE) return false;
  if (flags != VRING_PACKED_EVENT_FLAG_DESC || !(end->flags & VRING_EVENT_IDX)) return true;
  const uint32_t event = LOAD16(end->avail + PACKED_EVENT_OFF_WRAP);
  if ((event & SLOT) >= end->size) return true;
  const uint32_t passed = slots_between(end, event, end->next_used);
  return passed != 0 && passed <= slots;
}

INLINE bool is_call_due(struct end *end) {
  const uint32_t since = end->undecided;
  end->undecided = 0;
  if (is_packed(end)) return is_call_due_packed(end, since);
  if (!(end->flags & VRING_EVENT_IDX)) return !(LOAD16(end->avail + AVAIL_FLAGS) & VRING_AVAIL_F_NO_INTERRUPT);
  uint32_t event = LOAD16(end->avail + AVAIL_RING + end->size * AVAIL_ENTRY_SIZE);
  return ((end->next_used - event - 1) & 0xffff) < since;
}

INLINE uint32_t decide_call(struct lane *lane, struct end *end, unsigned counter, uint32_t due) {
  if (end->undecided == 0) return 0;
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

INLINE bool walk_split(struct end *end, const uint32_t direction, uint32_t head, struct piece *pieces, uint64_t wanted,
                       struct chain *chain) {
  const uint32_t size = end->size;
  const uint8_t *table = end->desc;
  uint64_t table_gpa = 0;
  uint32_t entries = size, index = head;
  bool indirect = false, scattered = false;
  *chain = (struct chain){0, pieces, head, 1};

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

/* The buffers of an indirect table of a packed ring: all its entries, in order. */
NOINLINE bool walk_table(struct end *end, const uint32_t direction, uint64_t gpa, uint32_t bytes, uint64_t wanted,
                         struct chain *chain) {
  uint8_t *table;
  if (!(end->flags & VRING_INDIRECT) || bytes == 0 || bytes % DESC_SIZE || bytes / DESC_SIZE > end->size) return false;
  const uint64_t reach = translate(end, gpa, &table);
  if (reach == 0) return false;
  for (uint32_t into = 0; into < bytes; into += DESC_SIZE) {
    uint64_t address, rest;
    if (UNLIKELY(reach < bytes)) {
      if (!gather64(end, gpa + into, &address) || !gather64(end, gpa + into + PACKED_DESC_LEN, &rest)) return false;
    } else {
      address = READ64(table + into);
      rest = READ64(table + into + PACKED_DESC_LEN);
    }
    const uint32_t length = (uint32_t)rest, flags = rest >> 48;
    if (flags & VRING_DESC_F_INDIRECT || (flags & VRING_DESC_F_WRITE) != direction) return false;
    if (length != 0 && !append(end, chain, address, length, wanted)) return false;
  }
  return true;
}

INLINE enum walked walk_packed(struct end *end, const uint32_t direction, uint32_t position, struct piece *pieces,
                               uint64_t wanted, struct chain *chain) {
  bool whole = true;
  *chain = (struct chain){0, pieces, 0, 0};
  for (uint32_t slots = 1; slots <= end->size; slots++) {
    uint64_t rest;
    if (!load_slot(end, position, &rest)) return slots == 1 ? NONE : BROKEN;
    const uint64_t address = READ64(slot_at(end, position));
    const uint32_t length = (uint32_t)rest, flags = rest >> 48;
    if (flags & VRING_DESC_F_INDIRECT) {
      whole = slots == 1 && !(flags & VRING_DESC_F_NEXT) && walk_table(end, direction, address, length, wanted, chain);
    } else if (whole) {
      whole = (flags & VRING_DESC_F_WRITE) == direction &&
              (length == 0 || append(end, chain, address, length, wanted));
    }
    if (!(flags & VRING_DESC_F_NEXT)) {
      chain->id = rest >> 32 & 0xffff;
      chain->slots = slots;
      return whole ? READY : REFUSED;
    }
    position = advance(end, true, position, 1);
  }
  return BROKEN;
}

/* The chain at a position; of a split ring, one that is available. */
INLINE enum walked walk(struct end *end, const bool packed, const uint32_t direction, uint32_t position,
                        struct piece *pieces, uint64_t wanted, struct chain *chain) {
  if (packed) return walk_packed(end, direction, position, pieces, wanted, chain);
  const uint32_t head = load_head(end, position);
  if (UNLIKELY(head >= end->size)) return BROKEN;
  return walk_split(end, direction, head, pieces, wanted, chain) ? READY : REFUSED;
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

NOINLINE void return_unused(struct lane *lane, const struct chain *refused) {
  struct end *end = &lane->destination;
  for (struct merged *chain = lane->merged; chain < lane->merged_end; chain++)
    give_used(end, is_packed(end), chain->id, 0, chain->slots);
  give_used(end, is_packed(end), refused->id, 0, refused->slots);
  count(lane, COUNT_MALFORMED, 1);
}

INLINE enum outcome collect_buffers(struct lane *lane, const bool packed, uint32_t frame, struct piece **pieces_end) {
  struct end *end = &lane->destination;
  const uint32_t size = end->size;
  const bool mergeable = end->flags & VRING_MERGEABLE;
  const uint64_t needed = end->header + (uint64_t)frame;
  uint32_t next = end->next_avail;
  uint64_t got = 0;
  struct piece *pieces = end->pieces;
  struct merged *merged = lane->merged;

  uint32_t taken = 0;
  for (uint32_t step = 0; step <= size; step++) {
    if (!packed && next == lane->avail_limit) {
      lane->avail_limit = load_avail_index(end);
      if (((lane->avail_limit - end->next_avail) & 0xffff) > size) return break_destination(lane);
    }
    struct chain chain;
    const enum walked walked = !packed && next == lane->avail_limit
                                   ? NONE
                                   : walk(end, packed, VRING_DESC_F_WRITE, next, pieces, needed - got, &chain);
    if (walked == NONE) return taken == size ? drop(lane, COUNT_DROP_TOO_SMALL) : wait_for_buffers(lane, next);
    if (walked == BROKEN) return break_destination(lane);
    next = advance(end, packed, next, chain.slots);
    taken += chain.slots;
    if (UNLIKELY(walked == REFUSED || chain.bytes == 0 || chain.bytes > UINT32_MAX)) {
      lane->merged_end = merged;
      return_unused(lane, &chain);
      end->next_avail = next;
      got = taken = 0;
      pieces = end->pieces;
      merged = lane->merged;
      continue;
    }
    if (!mergeable && chain.bytes < needed) return drop(lane, COUNT_DROP_TOO_SMALL);
    const uint64_t written = chain.bytes < needed - got ? chain.bytes : needed - got;
    *merged++ = (struct merged){chain.id, chain.slots, (uint32_t)written};
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

INLINE enum outcome carry_frame(struct lane *lane, const bool packed, enum walked walked, const struct chain *chain,
                                uint64_t *frame_bytes) {
  struct end *source = &lane->source, *destination = &lane->destination;
  if (!(source->flags & VRING_ENABLED)) return drop(lane, COUNT_DROP_DISABLED);
  const uint32_t header = source->header;
  if (walked == REFUSED) return drop(lane, COUNT_DROP_MALFORMED);
  if (chain->bytes < header + FRAME_BYTES_MIN || chain->bytes > header + (uint64_t)FRAME_BYTES_MAX)
    return drop(lane, COUNT_DROP_BAD_FRAME);
  if (asks_for_offload(source->pieces)) return drop(lane, COUNT_DROP_BAD_FRAME);
  const uint32_t bytes = (uint32_t)chain->bytes - header;
  *frame_bytes = bytes;

  if (UNLIKELY(!is_receiving(lane))) {
    if (destination->flags & VRING_SINK) return DELIVERED;
    return drop(lane, COUNT_DROP_NO_RECEIVER);
  }
  struct piece *pieces_end = NULL;
  const enum outcome outcome = collect_buffers(lane, packed, bytes, &pieces_end);
  if (outcome != DELIVERED) return outcome;
  store_header(destination->pieces, destination->header, (uint32_t)(lane->merged_end - lane->merged));
  if (chain->end == source->pieces + 1 && pieces_end == destination->pieces + 1)
    memmove(destination->pieces->at + destination->header, source->pieces->at + header, bytes);
  else copy_pieces(destination->pieces, destination->header, source->pieces, header, bytes);
  for (struct merged *merged = lane->merged; merged < lane->merged_end; merged++)
    give_used(destination, packed, merged->id, merged->written, merged->slots);
  return DELIVERED;
}

/* A chain of one descriptor inside the extent found last: its place, length and id; NULL for anything else. */
INLINE uint8_t *load_only(const struct end *end, const bool packed, uint32_t position, const uint32_t direction,
                          uint32_t *length, uint32_t *id) {
  uint64_t address, rest;
  uint32_t flags;
  if (packed) {
    if (!load_slot(end, position, &rest)) return NULL;
    address = READ64(slot_at(end, position));
    *id = rest >> 32 & 0xffff;
    flags = rest >> 48;
  } else {
    *id = load_head(end, position);
    if (*id >= end->size) return NULL;
    const uint8_t *descriptor = end->desc + (uint64_t)*id * DESC_SIZE;
    address = READ64(descriptor);
    rest = READ64(descriptor + 8);
    flags = (uint32_t)(rest >> 32);
  }
  if ((flags & (VRING_DESC_F_NEXT | VRING_DESC_F_WRITE | VRING_DESC_F_INDIRECT)) != direction) return NULL;
  const uint64_t into = address - end->hit.gpa;
  *length = (uint32_t)rest;
  if (into >= end->hit.size || end->hit.size - into < *length) return NULL;
  return end->hit.at + into;
}

/* The common case without lists: one descriptor to one descriptor. false: nothing was changed, carry_frame() is to do it. */
INLINE bool carry_at_once(struct lane *lane, const bool from_packed, const bool to_packed, uint32_t position,
                          bool receiving, struct chain *chain, uint64_t *frame_bytes) {
  struct end *source = &lane->source, *destination = &lane->destination;
  if (!receiving || !(source->flags & VRING_ENABLED)) return false;
  if (!to_packed && destination->next_avail == lane->avail_limit) return false;
  uint32_t length, room, to_id;
  const uint8_t *from = load_only(source, from_packed, position, 0, &length, &chain->id);
  if (!from || length - (source->header + FRAME_BYTES_MIN) > FRAME_BYTES_MAX - FRAME_BYTES_MIN) return false;
  if (READ16(from) != 0) return false;
  uint8_t *to = load_only(destination, to_packed, destination->next_avail, VRING_DESC_F_WRITE, &room, &to_id);
  const uint32_t frame = length - source->header, header = destination->header;
  if (!to || room < header + frame) return false;
  *(guest64 *)to = 0;
  if (header == NET_HDR_SIZE) *(guest32 *)(to + 8) = 1 << 16;
  else *(guest16 *)(to + 8) = 0;
  memmove(to + header, from + source->header, frame);
  destination->next_avail = advance(destination, to_packed, destination->next_avail, 1);
  lane->waiting_at = NOT_WAITING;
  *frame_bytes = frame;
  chain->slots = 1;
  give_used(destination, to_packed, to_id, header + frame, 1);
  return true;
}

INLINE uint32_t finish_destination(struct lane *lane) {
  struct end *end = &lane->destination;
  uint32_t result = 0;
  if (lane->broke_destination) {
    lane->broke_destination = false;
    result = POLL_BROKE_DESTINATION;
  } else if (!is_running(end)) return 0;
  if (end->published != end->next_used) publish_used(end);
  return result | decide_call(lane, end, COUNT_CALLS_DESTINATION, POLL_CALL_DESTINATION);
}

/* Whether buffers are there that were missing. */
INLINE bool has_more_buffers(struct lane *lane) {
  uint64_t rest;
  if (is_packed(&lane->destination)) return load_slot(&lane->destination, lane->waiting_at, &rest);
  return load_avail_index(&lane->destination) != lane->waiting_at;
}

INLINE uint32_t poll(struct lane *lane, const bool from_packed, const bool to_packed, uint32_t budget, bool stuck) {
  struct end *source = &lane->source;
  const bool receiving = is_receiving(lane);
  if (lane->waiting_at != NOT_WAITING && !stuck && receiving && !has_more_buffers(lane)) return POLL_WAITING;
  uint32_t limit = budget;
  if (!from_packed) {
    const uint32_t pending = (load_avail_index(source) - source->next_avail) & 0xffff;
    if (pending == 0) return lane->waiting_at != NOT_WAITING ? POLL_WAITING : 0;
    if (pending > source->size) {
      source->flags |= VRING_BROKEN;
      return POLL_BROKE_SOURCE;
    }
    if (pending < budget) limit = pending;
  }

  uint32_t result = 0, taken = 0;
  uint64_t delivered = 0, bytes = 0;
  if (receiving) lane->avail_limit = lane->destination.next_avail;
  for (; taken < limit; taken++) {
    const uint32_t position = source->next_avail;
    uint64_t frame_bytes = 0;
    struct chain chain;
    enum outcome outcome = DELIVERED;
    if (!carry_at_once(lane, from_packed, to_packed, position, receiving, &chain, &frame_bytes)) {
      const enum walked walked = walk(source, from_packed, 0, position, source->pieces,
                                      source->header + (uint64_t)FRAME_BYTES_MAX, &chain);
      if (walked == NONE) break;
      if (UNLIKELY(walked == BROKEN)) {
        source->flags |= VRING_BROKEN;
        result |= POLL_BROKE_SOURCE;
        break;
      }
      outcome = carry_frame(lane, to_packed, walked, &chain, &frame_bytes);
      if (UNLIKELY(outcome == NO_BUFFERS)) {
        if (!stuck) break;
        outcome = drop(lane, COUNT_DROP_NO_BUFFER);
      }
    }
    if (outcome == DELIVERED) {
      delivered++;
      bytes += frame_bytes;
    }
    give_used(source, from_packed, chain.id, 0, chain.slots);
    source->next_avail = advance(source, from_packed, position, chain.slots);
  }

  if (taken) publish_used(source);
  if (delivered) {
    count(lane, COUNT_PACKETS, delivered);
    count(lane, COUNT_BYTES, bytes);
    count(lane, COUNT_BATCHES, 1);
  }
  if (lane->waiting_at != NOT_WAITING) result |= POLL_WAITING;
  return result | taken | finish_destination(lane) | decide_call(lane, source, COUNT_CALLS_SOURCE, POLL_CALL_SOURCE);
}

NOINLINE uint32_t poll_split(struct lane *lane, uint32_t budget, bool stuck) {
  return poll(lane, false, false, budget, stuck);
}
NOINLINE uint32_t poll_packed(struct lane *lane, uint32_t budget, bool stuck) {
  return poll(lane, true, true, budget, stuck);
}
NOINLINE uint32_t poll_to_packed(struct lane *lane, uint32_t budget, bool stuck) {
  return poll(lane, false, true, budget, stuck);
}
NOINLINE uint32_t poll_from_packed(struct lane *lane, uint32_t budget, bool stuck) {
  return poll(lane, true, false, budget, stuck);
}

/* Carries up to `budget` frames; POLL_* of layout.h. */
uint32_t lane_poll(struct lane *lane, uint32_t budget, bool stuck) {
  if (!is_running(&lane->source)) return 0;
  if (is_packed(&lane->source))
    return is_packed(&lane->destination) ? poll_packed(lane, budget, stuck) : poll_from_packed(lane, budget, stuck);
  return is_packed(&lane->destination) ? poll_to_packed(lane, budget, stuck) : poll_split(lane, budget, stuck);
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
  end->published = STATE32(VRING_PUBLISHED);
  end->undecided = STATE32(VRING_UNDECIDED);
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
  STATE32(VRING_PUBLISHED) = end->published;
  STATE32(VRING_UNDECIDED) = end->undecided;
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
