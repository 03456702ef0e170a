/**
 * Who wakes whom (virtio 1.3, 2.7.7, 2.7.10 and 2.8.10): calls to the driver, kicks from it.
 *
 * Both handshakes are "store mine, then load yours" and need sequential consistency between the two: what was used
 * is published before the driver's suppression word is read; the wish for kicks is published before it is looked again whether a
 * chain is available. No wake-up is lost that way, whichever side is faster.
 */
import {
  AVAIL_FLAGS,
  AVAIL_ENTRY_SIZE,
  AVAIL_RING,
  PACKED_EVENT_FLAGS,
  PACKED_EVENT_OFF_WRAP,
  USED_ENTRY_SIZE,
  USED_FLAGS,
  USED_RING,
  VRING_AVAIL_F_NO_INTERRUPT,
  VRING_PACKED_EVENT_FLAG_DESC,
  VRING_PACKED_EVENT_FLAG_DISABLE,
  VRING_PACKED_EVENT_FLAG_ENABLE,
  VRING_USED_F_NO_NOTIFY,
} from "../src/layout/virtio.ts";
import {
  VRING_AVAIL,
  VRING_AVAIL_SEGMENT,
  VRING_EVENT_IDX,
  VRING_FLAGS,
  VRING_NEXT_USED,
  VRING_SIZE,
  VRING_UNDECIDED,
  VRING_USED,
  VRING_USED_SEGMENT,
} from "../src/layout/lane.ts";
import { atomicLoad16, atomicStore16, end } from "./guest";
import { slotsBetween } from "./packed";
import { isPacked, vringOf } from "./vring";

/** The bits of a packed event's flags that mean something. */
const EVENT_FLAGS_MASK: u32 = 3;

/** Whether anything was used since the last call decision. */
export function isCallUndecided<E>(): bool {
  return load<u32>(vringOf<E>(), VRING_UNDECIDED) != 0;
}

/** Decides, after it was published, whether the driver wants a call for what was used since the last decision. */
export function isCallDue<E>(): bool {
  const vring = vringOf<E>();
  const slots = load<u32>(vring, VRING_UNDECIDED);
  store<u32>(vring, 0, VRING_UNDECIDED);
  return isPacked<E>() ? isCallDuePacked<E>(slots) : isCallDueSplit<E>(slots);
}

function isCallDueSplit<E>(entries: u32): bool {
  const vring = vringOf<E>();
  const segment = load<u32>(vring, VRING_AVAIL_SEGMENT);
  const avail = load<u64>(vring, VRING_AVAIL);
  if (!(load<u32>(vring, VRING_FLAGS) & VRING_EVENT_IDX)) {
    return !(atomicLoad16(end<E>(), segment, avail + AVAIL_FLAGS) & VRING_AVAIL_F_NO_INTERRUPT);
  }
  const usedEvent = atomicLoad16(
    end<E>(),
    segment,
    avail + AVAIL_RING + <u64>load<u32>(vring, VRING_SIZE) * AVAIL_ENTRY_SIZE,
  );
  return ((load<u32>(vring, VRING_NEXT_USED) - usedEvent - 1) & 0xffff) < entries;
}

/** A driver's event that is nonsense asks for a call: one too many does no harm. */
function isCallDuePacked<E>(slots: u32): bool {
  const vring = vringOf<E>();
  const segment = load<u32>(vring, VRING_AVAIL_SEGMENT);
  const event = load<u64>(vring, VRING_AVAIL);
  const flags = atomicLoad16(end<E>(), segment, event + PACKED_EVENT_FLAGS) & EVENT_FLAGS_MASK;
  if (flags == VRING_PACKED_EVENT_FLAG_DISABLE) return false;
  if (flags != VRING_PACKED_EVENT_FLAG_DESC || !(load<u32>(vring, VRING_FLAGS) & VRING_EVENT_IDX)) return true;
  const position = atomicLoad16(end<E>(), segment, event + PACKED_EVENT_OFF_WRAP);
  const size = load<u32>(vring, VRING_SIZE);
  if ((position & 0x7fff) >= size || slots >= 2 * size) return true;
  const passed = slotsBetween(position, load<u32>(vring, VRING_NEXT_USED), size);
  return passed != 0 && passed <= slots;
}

/** Asks the driver for a kick when it makes the chain at a position available, the first it had not yet made so. */
export function requestKick<E>(position: u32): void {
  const vring = vringOf<E>();
  const segment = load<u32>(vring, VRING_USED_SEGMENT);
  const used = load<u64>(vring, VRING_USED);
  const hasEvents = (load<u32>(vring, VRING_FLAGS) & VRING_EVENT_IDX) != 0;
  if (isPacked<E>()) {
    if (hasEvents) atomicStore16(end<E>(), segment, used + PACKED_EVENT_OFF_WRAP, position);
    const flags = hasEvents ? VRING_PACKED_EVENT_FLAG_DESC : VRING_PACKED_EVENT_FLAG_ENABLE;
    atomicStore16(end<E>(), segment, used + PACKED_EVENT_FLAGS, flags);
  } else if (hasEvents) {
    const availEvent = used + USED_RING + <u64>load<u32>(vring, VRING_SIZE) * USED_ENTRY_SIZE;
    atomicStore16(end<E>(), segment, availEvent, position);
  } else {
    atomicStore16(end<E>(), segment, used + USED_FLAGS, 0);
  }
}

/** Tells the driver that kicks are pointless: the ring is being polled. A stale event index of a split ring says so by itself. */
export function suppressKicks<E>(): void {
  const vring = vringOf<E>();
  const segment = load<u32>(vring, VRING_USED_SEGMENT);
  const used = load<u64>(vring, VRING_USED);
  if (isPacked<E>()) {
    atomicStore16(end<E>(), segment, used + PACKED_EVENT_FLAGS, VRING_PACKED_EVENT_FLAG_DISABLE);
  } else if (!(load<u32>(vring, VRING_FLAGS) & VRING_EVENT_IDX)) {
    atomicStore16(end<E>(), segment, used + USED_FLAGS, VRING_USED_F_NO_NOTIFY);
  }
}
