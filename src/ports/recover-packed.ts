/**
 * What another back-end left in flight in a packed ring: it is given back unused.
 *
 * Truth: QEMU docs/interop/vhost-user.rst, "Inflight I/O tracking", packed virtqueue; docs/PROTOCOL.md, 17. A network device
 * may lose frames; no buffer is lost or given back twice, wherever this is killed: the header has each position twice, new
 * and old, and the descriptor at the old one tells which counts.
 */
import {
  INFLIGHT_PACKED_COUNTER,
  INFLIGHT_PACKED_ENTRIES,
  INFLIGHT_PACKED_ENTRY_SIZE,
  INFLIGHT_PACKED_FREE_HEAD,
  INFLIGHT_PACKED_ID,
  INFLIGHT_PACKED_LAST,
  INFLIGHT_PACKED_NEXT,
  INFLIGHT_PACKED_NUM,
  INFLIGHT_PACKED_OLD_FREE_HEAD,
  INFLIGHT_PACKED_OLD_USED_IDX,
  INFLIGHT_PACKED_OLD_USED_WRAP,
  INFLIGHT_PACKED_USED_IDX,
  INFLIGHT_PACKED_USED_WRAP,
} from "../layout/vhost-user.ts";
import { DESC_SIZE, PACKED_DESC_FLAGS, PACKED_DESC_ID, PACKED_DESC_LEN } from "../layout/virtio.ts";
import {
  advance,
  AVAIL,
  makePosition,
  positionIndex,
  positionWrap,
  startPosition,
  USED,
} from "../vhost-user/position.ts";
import { InflightFile, type Recovery } from "./inflight-file.ts";
import type { InflightPlace } from "./port.ts";
import { flagsWord, packedFlags, wordsOf } from "./ring-memory.ts";

const LAYOUT = {
  at: INFLIGHT_PACKED_ENTRIES,
  bytes: INFLIGHT_PACKED_ENTRY_SIZE,
  next: INFLIGHT_PACKED_NEXT,
  counter: INFLIGHT_PACKED_COUNTER,
};

/** A state of the header: the first of the free entries, and the position of the next chain to give back. */
interface Header {
  free: number;
  position: number;
}

interface Chain {
  /** Its first entry and its last. */
  head: number;
  last: number;
  /** Its buffer id and its slots. */
  id: number;
  slots: number;
}

/**
 * @param desc the descriptor ring in guest memory
 * @param base where the ring goes on if the region is fresh and the ring does not belie it
 * @throws ProtocolError when the region cannot be used at all; it is as it was
 */
export function recoverPacked(place: InflightPlace, size: number, desc: DataView, base: number): Recovery {
  const file = new InflightFile(place, size, LAYOUT);
  if (file.isFresh) return { position: begin(file, size, startPosition(base, packedFlags(desc))) };
  const found = readHeader(file, size, desc);
  const chains = typeof found === "string" ? found : readChains(file, size, found.free);
  if (typeof found === "string" || typeof chains === "string") {
    return { position: begin(file, size, startPosition(base, packedFlags(desc))), complaint: String(chains) };
  }
  let header = found;
  if (chains.length === 0) header = { ...found, position: startPosition(found.position, packedFlags(desc)) };
  file.writeEntries();
  writeHeader(file, header, header);
  return { position: giveBack(file, size, desc, header, chains) };
}

/** Makes the part a new one. Its free entries are all of them, in their order; the list ends behind the last. */
function begin(file: InflightFile, size: number, position: number): number {
  file.setAllFree(size);
  file.writeEntries();
  const header = { free: 0, position };
  writeHeader(file, header, header);
  file.setInUse(size);
  return position;
}

/** The header that counts, or why none can. */
function readHeader({ copy }: InflightFile, size: number, desc: DataView): Header | string {
  const read = (free: number, index: number, wrap: number) => ({
    free: copy.getUint16(free, true),
    index: copy.getUint16(index, true),
    wrap: copy.getUint8(wrap),
  });
  const now = read(INFLIGHT_PACKED_FREE_HEAD, INFLIGHT_PACKED_USED_IDX, INFLIGHT_PACKED_USED_WRAP);
  const old = read(INFLIGHT_PACKED_OLD_FREE_HEAD, INFLIGHT_PACKED_OLD_USED_IDX, INFLIGHT_PACKED_OLD_USED_WRAP);
  for (const { index, wrap } of [now, old]) {
    if (index >= size || wrap > 1) return `used index ${index}, wrap counter ${wrap} in the inflight region of ${size}`;
  }
  const isSame = now.index === old.index && now.wrap === old.wrap;
  const { free, index, wrap } = isSame || isAvailable(desc, old.index, old.wrap) ? old : now;
  return { free, position: makePosition(index, wrap) };
}

/** Whether the slot still has what the driver made available: nothing was given back there. */
function isAvailable(desc: DataView, slot: number, wrap: number): boolean {
  const flags = desc.getUint16(slot * DESC_SIZE + PACKED_DESC_FLAGS, true);
  return ((flags & AVAIL) !== 0) === (wrap === 1) && ((flags & USED) !== 0) !== (wrap === 1);
}

/** The chains in flight, oldest first, or why the entries make no sense. Entries in the list of free ones are not in flight. */
function readChains(file: InflightFile, size: number, free: number): Chain[] | string {
  const marked = file.inFlight(size);
  if (marked.length === 0) return [];
  for (let index = free, i = 0; index < size && i < size; i++) {
    file.clear(index);
    index = file.next(index);
  }
  const chains: Chain[] = [];
  let slots = 0;
  for (const head of marked) {
    if (!file.isInFlight(head)) continue;
    const last = file.copy.getUint16(file.entry(head) + INFLIGHT_PACKED_LAST, true);
    const count = file.copy.getUint16(file.entry(head) + INFLIGHT_PACKED_NUM, true);
    slots += count;
    if (last >= size || count === 0 || slots > size) {
      return `inflight region: the chain of entry ${head} ends at ${last} and has ${count} slots, in a ring of ${size}`;
    }
    chains.push({ head, last, id: file.copy.getUint16(file.entry(last) + INFLIGHT_PACKED_ID, true), slots: count });
  }
  return chains;
}

/**
 * Gives the chains back in one batch, in the order that lets a kill at any point be told from both before and after: the
 * first slot is written last. Every slot gets its used bit, as the core does it. Returns the position then.
 */
function giveBack(file: InflightFile, size: number, desc: DataView, old: Header, chains: readonly Chain[]): number {
  if (chains.length === 0) return old.position;
  const header = { ...old };
  const positions: number[] = [];
  for (const { head, last, slots } of chains) {
    positions.push(header.position);
    file.setNext(last, header.free);
    header.free = head;
    header.position = advance(header.position, slots, size);
  }
  file.writeEntries();
  writeHeader(file, header, old);
  const words = wordsOf(desc);
  for (let i = chains.length - 1; i >= 0; i--) {
    giveBackChain(desc, words, size, positions[i] as number, chains[i] as Chain);
  }
  for (const { head } of chains) file.clear(head);
  file.writeEntries();
  writeHeader(file, header, header);
  return header.position;
}

/** The used descriptor of a chain of which nothing was written, last slot first. `words` are those of `desc`. */
function giveBackChain(desc: DataView, words: Uint16Array, size: number, first: number, { id, slots }: Chain): void {
  const at = positionIndex(first) * DESC_SIZE;
  desc.setUint16(at + PACKED_DESC_ID, id, true);
  desc.setUint32(at + PACKED_DESC_LEN, 0, true);
  for (let slot = slots - 1; slot >= 0; slot--) {
    const position = advance(first, slot, size);
    Atomics.store(words, flagsWord(positionIndex(position)), positionWrap(position) === 1 ? AVAIL | USED : 0);
  }
}

function writeHeader(file: InflightFile, now: Header, old: Header): void {
  const bytes = new DataView(new ArrayBuffer(INFLIGHT_PACKED_OLD_USED_WRAP + 1 - INFLIGHT_PACKED_FREE_HEAD));
  const at = (field: number) => field - INFLIGHT_PACKED_FREE_HEAD;
  bytes.setUint16(at(INFLIGHT_PACKED_FREE_HEAD), now.free, true);
  bytes.setUint16(at(INFLIGHT_PACKED_OLD_FREE_HEAD), old.free, true);
  bytes.setUint16(at(INFLIGHT_PACKED_USED_IDX), positionIndex(now.position), true);
  bytes.setUint16(at(INFLIGHT_PACKED_OLD_USED_IDX), positionIndex(old.position), true);
  bytes.setUint8(at(INFLIGHT_PACKED_USED_WRAP), positionWrap(now.position));
  bytes.setUint8(at(INFLIGHT_PACKED_OLD_USED_WRAP), positionWrap(old.position));
  file.write(INFLIGHT_PACKED_FREE_HEAD, new Uint8Array(bytes.buffer));
}
