/**
 * The three areas of a virtqueue: how many bytes each has, how it is aligned, how many entries a ring may have.
 *
 * Truth: virtio 1.3, 2.7 (split virtqueues) and 2.8 (packed virtqueues); docs/PROTOCOL.md, 16. The protocol calls the
 * areas of a packed ring by the names of a split one's: desc is the descriptor ring, avail the driver event suppression
 * structure, used the device's.
 */
import {
  AVAIL_ALIGN,
  AVAIL_ENTRY_SIZE,
  AVAIL_RING,
  DESC_ALIGN,
  DESC_SIZE,
  PACKED_EVENT_ALIGN,
  PACKED_EVENT_SIZE,
  USED_ALIGN,
  USED_ENTRY_SIZE,
  USED_RING,
  VIRTIO_F_RING_PACKED,
  VIRTIO_RING_F_EVENT_IDX,
  VRING_SIZE_MAX,
} from "../layout/virtio.ts";

const EVENT_INDEX_SIZE = 2;

/** Where the three areas of a ring lie; in which address space, the holder knows. */
export interface Areas {
  desc: bigint;
  avail: bigint;
  used: bigint;
}

/** What the acknowledged features say of the form of all rings. */
export interface RingForm {
  isPacked: boolean;
  hasEventIndex: boolean;
}

export function ringForm(features: bigint): RingForm {
  return { isPacked: has(features, VIRTIO_F_RING_PACKED), hasEventIndex: has(features, VIRTIO_RING_F_EVENT_IDX) };
}

/** Bytes of each area. */
export function areaSizes(size: number, { isPacked, hasEventIndex }: RingForm): Record<keyof Areas, number> {
  const desc = DESC_SIZE * size;
  if (isPacked) return { desc, avail: PACKED_EVENT_SIZE, used: PACKED_EVENT_SIZE };
  const event = hasEventIndex ? EVENT_INDEX_SIZE : 0;
  return {
    desc,
    avail: AVAIL_RING + AVAIL_ENTRY_SIZE * size + event,
    used: USED_RING + USED_ENTRY_SIZE * size + event,
  };
}

/** The first area whose address does not suit it. */
export function misaligned({ desc, avail, used }: Areas, { isPacked }: RingForm): keyof Areas | undefined {
  if (desc % BigInt(DESC_ALIGN) !== 0n) return "desc";
  if (avail % BigInt(isPacked ? PACKED_EVENT_ALIGN : AVAIL_ALIGN) !== 0n) return "avail";
  return used % BigInt(USED_ALIGN) !== 0n ? "used" : undefined;
}

/** Whether a ring of this form may have so many entries: a split one has a power of two. */
export function isRingSize(size: number, { isPacked }: RingForm): boolean {
  return size >= 1 && size <= VRING_SIZE_MAX && (isPacked || (size & (size - 1)) === 0);
}

function has(features: bigint, bit: number): boolean {
  return ((features >> BigInt(bit)) & 1n) === 1n;
}
