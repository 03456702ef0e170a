/**
 * Who wakes whom (virtio 1.3, 2.7.7 and 2.7.10): calls to the driver, kicks from it.
 *
 * Both handshakes are "store mine, then load yours" and need sequential consistency between the two: the used index
 * is published before the driver's suppression word is read; the wish for kicks is published before the avail index
 * is read again. No wake-up is lost that way, whichever side is faster.
 */
import {
  AVAIL_FLAGS,
  AVAIL_ENTRY_SIZE,
  AVAIL_RING,
  USED_ENTRY_SIZE,
  USED_FLAGS,
  USED_RING,
  VRING_AVAIL_F_NO_INTERRUPT,
  VRING_USED_F_NO_NOTIFY,
} from "../src/layout/virtio.ts";
import {
  VRING_AVAIL,
  VRING_AVAIL_SEGMENT,
  VRING_EVENT_IDX,
  VRING_FLAGS,
  VRING_NEXT_USED,
  VRING_SIGNALLED,
  VRING_SIZE,
  VRING_USED,
  VRING_USED_SEGMENT,
} from "../src/layout/lane.ts";
import { atomicLoad16, atomicStore16, end } from "./guest";
import { vringOf } from "./vring";

/** Whether anything was used since the last call decision. */
export function isCallUndecided<E>(): bool {
  const vring = vringOf<E>();
  return load<u32>(vring, VRING_SIGNALLED) != load<u32>(vring, VRING_NEXT_USED);
}

/** Decides, after the used index was published, whether the driver wants a call for what was used since the last decision. */
export function isCallDue<E>(): bool {
  const vring = vringOf<E>();
  const segment = load<u32>(vring, VRING_AVAIL_SEGMENT);
  const avail = load<u64>(vring, VRING_AVAIL);
  const used = load<u32>(vring, VRING_NEXT_USED);
  const before = load<u32>(vring, VRING_SIGNALLED);
  store<u32>(vring, used, VRING_SIGNALLED);
  if (!(load<u32>(vring, VRING_FLAGS) & VRING_EVENT_IDX)) {
    return !(atomicLoad16(end<E>(), segment, avail + AVAIL_FLAGS) & VRING_AVAIL_F_NO_INTERRUPT);
  }
  const usedEvent = atomicLoad16(
    end<E>(),
    segment,
    avail + AVAIL_RING + <u64>load<u32>(vring, VRING_SIZE) * AVAIL_ENTRY_SIZE,
  );
  return ((used - usedEvent - 1) & 0xffff) < ((used - before) & 0xffff);
}

/** Asks the driver for a kick when it makes the chain at an avail index available, the first it had not yet made so. */
export function requestKick<E>(index: u32): void {
  const vring = vringOf<E>();
  const segment = load<u32>(vring, VRING_USED_SEGMENT);
  const used = load<u64>(vring, VRING_USED);
  if (load<u32>(vring, VRING_FLAGS) & VRING_EVENT_IDX) {
    const availEvent = used + USED_RING + <u64>load<u32>(vring, VRING_SIZE) * USED_ENTRY_SIZE;
    atomicStore16(end<E>(), segment, availEvent, index);
  } else {
    atomicStore16(end<E>(), segment, used + USED_FLAGS, 0);
  }
}

/** Tells the driver that kicks are pointless: the ring is being polled. With the event index a stale event says so by itself. */
export function suppressKicks<E>(): void {
  const vring = vringOf<E>();
  if (load<u32>(vring, VRING_FLAGS) & VRING_EVENT_IDX) return;
  atomicStore16(
    end<E>(),
    load<u32>(vring, VRING_USED_SEGMENT),
    load<u64>(vring, VRING_USED) + USED_FLAGS,
    VRING_USED_F_NO_NOTIFY,
  );
}
