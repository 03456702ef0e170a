/**
 * A batch of a packed ring that a relay wrote and did not publish, for it was killed in between: it is given back empty.
 *
 * Its first slot still holds what the driver made available there, the others are used already, and the driver has seen none
 * of it (assembly/packed.ts). The frames are lost, as a network may lose them; every buffer comes back once. Main thread,
 * before a lane runs on the ring; all is done by the one store at the end, so that being killed here harms nothing either.
 */
import { DESC_SIZE, PACKED_DESC_FLAGS, PACKED_DESC_ID, PACKED_DESC_LEN, VRING_DESC_F_NEXT } from "../layout/virtio.ts";
import { advance, AVAIL, positionIndex, positionWrap, unpublished, USED } from "../vhost-user/position.ts";
import { packedFlags } from "./ring-memory.ts";

/**
 * @param desc the descriptor ring in guest memory
 * @param position where the relay stood
 * @returns where the ring goes on: the position itself if no batch was cut off there
 */
export function giveBackCutBatch(desc: DataView, position: number): number {
  const flags = packedFlags(desc);
  const size = flags.length;
  const batch = unpublished(position, flags);
  if (batch === 0 || batch === Number.POSITIVE_INFINITY) return position;
  const slotAt = (distance: number) => positionIndex(advance(position, distance, size));

  // The batch begins with a chain whose descriptors are as the driver wrote them, but for used bits.
  let slots = 1;
  while (slots < size && ((flags[slotAt(slots - 1)] ?? 0) & VRING_DESC_F_NEXT) !== 0) slots++;
  const id = desc.getUint16(slotAt(slots - 1) * DESC_SIZE + PACKED_DESC_ID, true);
  for (let distance = 1; distance < Math.max(slots, batch); distance++) {
    const at = slotAt(distance) * DESC_SIZE;
    if (distance < slots) {
      const used = positionWrap(advance(position, distance, size)) === 1 ? USED : 0;
      desc.setUint16(at + PACKED_DESC_FLAGS, ((flags[slotAt(distance)] ?? 0) & ~USED) | used, true);
    } else desc.setUint32(at + PACKED_DESC_LEN, 0, true);
  }
  const owner = positionWrap(position) === 1 ? AVAIL | USED : 0;
  const first = desc.byteOffset + slotAt(0) * DESC_SIZE + PACKED_DESC_LEN;
  Atomics.store(new BigUint64Array(desc.buffer, first, 1), 0, (BigInt(owner) << 48n) | (BigInt(id) << 32n));
  return advance(position, Math.max(slots, batch), size);
}
