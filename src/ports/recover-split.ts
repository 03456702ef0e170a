/**
 * What another back-end left in flight in a split ring: it is given back unused.
 *
 * Truth: QEMU docs/interop/vhost-user.rst, "Inflight I/O tracking", split virtqueue; docs/PROTOCOL.md, 17. A network device
 * may lose frames; no buffer is lost or given back twice, wherever this is killed: what the used ring says counts, and
 * last_batch_head leads to the entries that are in it though they are still marked.
 */
import {
  INFLIGHT_SPLIT_COUNTER,
  INFLIGHT_SPLIT_ENTRIES,
  INFLIGHT_SPLIT_ENTRY_SIZE,
  INFLIGHT_SPLIT_LAST_BATCH_HEAD,
  INFLIGHT_SPLIT_NEXT,
  INFLIGHT_SPLIT_USED_IDX,
} from "../layout/vhost-user.ts";
import { USED_ENTRY_ID, USED_ENTRY_LEN, USED_ENTRY_SIZE, USED_IDX, USED_RING } from "../layout/virtio.ts";
import { InflightFile, type Recovery } from "./inflight-file.ts";
import type { InflightPlace } from "./port.ts";
import { wordsOf } from "./ring-memory.ts";

const LAYOUT = {
  at: INFLIGHT_SPLIT_ENTRIES,
  bytes: INFLIGHT_SPLIT_ENTRY_SIZE,
  next: INFLIGHT_SPLIT_NEXT,
  counter: INFLIGHT_SPLIT_COUNTER,
};
const INDEX_MASK = 0xffff;

/**
 * Where nothing is in flight, in a fresh region too, the ring goes on at its used index.
 * @param used the used area in guest memory
 * @throws ProtocolError when the region cannot be used at all; it is as it was
 */
export function recoverSplit(place: InflightPlace, size: number, used: DataView): Recovery {
  const file = new InflightFile(place, size, LAYOUT);
  const usedIndex = used.getUint16(USED_IDX, true);
  if (file.isFresh) {
    file.setU16(INFLIGHT_SPLIT_USED_IDX, usedIndex);
    file.setInUse(size);
    return { position: usedIndex };
  }
  const complaint = clearUsed(file, size, usedIndex);
  if (complaint !== undefined) for (const head of file.inFlight(size)) file.clear(head);
  file.writeEntries();
  file.setU16(INFLIGHT_SPLIT_USED_IDX, usedIndex);
  const position = giveBack(file, size, used, usedIndex);
  return complaint === undefined ? { position } : { position, complaint };
}

/** Clears the marks of the batch that is in the used ring already. Returns why that cannot be. */
function clearUsed(file: InflightFile, size: number, usedIndex: number): string | undefined {
  const count = (usedIndex - file.copy.getUint16(INFLIGHT_SPLIT_USED_IDX, true)) & INDEX_MASK;
  if (count > size) return `the used index of the inflight region is ${count} entries behind in a ring of ${size}`;
  let head = file.copy.getUint16(INFLIGHT_SPLIT_LAST_BATCH_HEAD, true);
  for (let i = 0; i < count; i++) {
    if (head >= size) return `entry ${head} in the inflight region's last batch, there are ${size}`;
    file.clear(head);
    head = file.next(head);
  }
  return undefined;
}

/** Gives all that is in flight back in one batch. Returns the used index then. */
function giveBack(file: InflightFile, size: number, used: DataView, usedIndex: number): number {
  const heads = file.inFlight(size);
  if (heads.length === 0) return usedIndex;
  let last = file.copy.getUint16(INFLIGHT_SPLIT_LAST_BATCH_HEAD, true);
  for (let i = 0; i < heads.length; i++) {
    const head = heads[i] as number;
    file.setNext(head, last);
    last = head;
    const entry = USED_RING + (((usedIndex + i) & INDEX_MASK) % size) * USED_ENTRY_SIZE;
    used.setUint32(entry + USED_ENTRY_ID, head, true);
    used.setUint32(entry + USED_ENTRY_LEN, 0, true);
  }
  file.writeEntries();
  file.setU16(INFLIGHT_SPLIT_LAST_BATCH_HEAD, last);
  const next = (usedIndex + heads.length) & INDEX_MASK;
  Atomics.store(wordsOf(used), USED_IDX >> 1, next);
  for (const head of heads) file.clear(head);
  file.writeEntries();
  file.setU16(INFLIGHT_SPLIT_USED_IDX, next);
  return next;
}
