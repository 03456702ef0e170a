/**
 * A ring's part of an inflight region, as a file: copied out once, written in small steps.
 *
 * The front-end and earlier back-ends can write it too, at any time: what is read is a copy, and judged as such.
 */
import { readSync, writeSync } from "node:fs";
import { ProtocolError } from "../errors.ts";
import {
  INFLIGHT_DESC_NUM,
  INFLIGHT_ENTRY_INFLIGHT,
  INFLIGHT_FEATURES,
  INFLIGHT_VERSION,
  INFLIGHT_VERSION_1,
} from "../layout/vhost-user.ts";
import type { InflightPlace } from "./port.ts";

/** What came of looking at a part when its ring starts. */
export interface Recovery {
  /** Where the ring goes on. */
  position: number;
  /** Why the part made no sense: nothing was returned by it, and it was made sound. */
  complaint?: string;
}

/** Where the entries of a part are. */
export interface EntryLayout {
  at: number;
  bytes: number;
  /** In an entry: u16, the next one of the list it is in. */
  next: number;
  /** In an entry: u64, the larger the later it was taken. */
  counter: number;
}

export class InflightFile {
  readonly #place: InflightPlace;
  readonly #layout: EntryLayout;
  /** What was in it. */
  readonly copy: DataView;
  readonly #bytes: Uint8Array;
  #isChanged = false;

  /** @throws ProtocolError when the file does not have it, or is of a kind that nobody defined */
  constructor(place: InflightPlace, size: number, layout: EntryLayout) {
    this.#place = place;
    this.#layout = layout;
    const bytes = new Uint8Array(layout.at + size * layout.bytes);
    if (place.offset + BigInt(bytes.length) > BigInt(Number.MAX_SAFE_INTEGER)) {
      throw new ProtocolError(`a part of the inflight region at offset ${place.offset}, expected less than 2^53`);
    }
    const count = this.#access(() => readSync(place.fd, bytes, 0, bytes.length, place.offset));
    if (count !== bytes.length) throw new ProtocolError("the inflight region has become shorter");
    this.copy = new DataView(bytes.buffer);
    this.#bytes = bytes;
    const version = this.copy.getUint16(INFLIGHT_VERSION, true);
    const features = this.copy.getBigUint64(INFLIGHT_FEATURES, true);
    if (version > INFLIGHT_VERSION_1 || features !== 0n) {
      throw new ProtocolError(`inflight region of version ${version}, features ${features}: only version 1 is known`);
    }
  }

  /** Whether no back-end has used it yet. */
  get isFresh(): boolean {
    return this.copy.getUint16(INFLIGHT_VERSION, true) === 0;
  }

  /** From now on it is in use. Written last. */
  setInUse(size: number): void {
    this.setU16(INFLIGHT_DESC_NUM, size);
    this.setU16(INFLIGHT_VERSION, INFLIGHT_VERSION_1);
  }

  /** Where in the copy, and in the part, an entry is. */
  entry(index: number): number {
    return this.#layout.at + index * this.#layout.bytes;
  }

  isInFlight(index: number): boolean {
    return this.#bytes[this.entry(index) + INFLIGHT_ENTRY_INFLIGHT] !== 0;
  }

  /** Clears the entry's mark, in the copy. */
  clear(index: number): void {
    if (!this.isInFlight(index)) return;
    this.#bytes[this.entry(index) + INFLIGHT_ENTRY_INFLIGHT] = 0;
    this.#isChanged = true;
  }

  /** The entry that follows in a list; maybe one that there is not. */
  next(index: number): number {
    return this.copy.getUint16(this.entry(index) + this.#layout.next, true);
  }

  /** Sets the entry's next one, in the copy. */
  setNext(index: number, next: number): void {
    this.copy.setUint16(this.entry(index) + this.#layout.next, next, true);
    this.#isChanged = true;
  }

  /** No entry is in flight, and each is followed by the one behind it; in the copy. */
  setAllFree(size: number): void {
    for (let index = 0; index < size; index++) {
      this.#bytes[this.entry(index) + INFLIGHT_ENTRY_INFLIGHT] = 0;
      this.setNext(index, index + 1);
    }
  }

  /** The entries marked in flight, oldest first; those of the same count by their index. */
  inFlight(size: number): Uint16Array {
    const all = new Uint16Array(size);
    let count = 0;
    for (let index = 0; index < size; index++) if (this.isInFlight(index)) all[count++] = index;
    let marked = all.subarray(0, count);
    // By each byte of the counter in turn, the lowest first: a comparing sort would be most of what a full ring costs.
    for (let byte = 0; byte < 8 && count > 1; byte++) marked = this.#sortByByte(marked, this.#layout.counter + byte);
    return marked;
  }

  /** Sorts entries by their byte at an offset; equal ones keep their order. Plain loops: it runs once, so uncompiled. */
  #sortByByte(entries: Uint16Array<ArrayBuffer>, offset: number): Uint16Array<ArrayBuffer> {
    const bytes = this.#bytes.subarray(this.#layout.at + offset);
    const stride = this.#layout.bytes;
    // Where the first entry of each value goes, then where the next one goes.
    const places = new Uint16Array(257);
    for (let i = 0; i < entries.length; i++) places[bytes[entries[i]! * stride]! + 1]!++;
    if (places[bytes[entries[0]! * stride]! + 1] === entries.length) return entries;
    for (let value = 1; value < 256; value++) places[value]! += places[value - 1]!;
    const sorted = new Uint16Array(entries.length);
    for (let i = 0; i < entries.length; i++) sorted[places[bytes[entries[i]! * stride]!]!++] = entries[i]!;
    return sorted;
  }

  /** Writes all entries as they are in the copy, if one has changed. A kill may leave some of them as they were. */
  writeEntries(): void {
    if (!this.#isChanged) return;
    this.write(this.#layout.at, new Uint8Array(this.copy.buffer, this.#layout.at));
    this.#isChanged = false;
  }

  setU16(at: number, value: number): void {
    this.write(at, new Uint8Array(Uint16Array.of(value).buffer));
  }

  /** Of a few bytes: all or nothing, as far as a kill of this process goes. */
  write(at: number, bytes: Uint8Array): void {
    this.#access(() => writeSync(this.#place.fd, bytes, 0, bytes.length, Number(this.#place.offset) + at));
  }

  #access(call: () => number): number {
    try {
      return call();
    } catch (error) {
      throw new ProtocolError(`the inflight region cannot be used: ${(error as Error).message}`);
    }
  }
}
