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
  counter: number;
}

export class InflightFile {
  readonly #place: InflightPlace;
  readonly #layout: EntryLayout;
  /** What was in it. */
  readonly copy: DataView;

  /** @throws ProtocolError when the file does not have it, or is of a kind that nobody defined */
  constructor(place: InflightPlace, size: number, layout: EntryLayout) {
    this.#place = place;
    this.#layout = layout;
    const bytes = new Uint8Array(layout.at + size * layout.bytes);
    const count = this.#access(() => readSync(place.fd, bytes, 0, bytes.length, place.offset));
    if (count !== bytes.length) throw new ProtocolError("the inflight region has become shorter");
    this.copy = new DataView(bytes.buffer);
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
    return this.copy.getUint8(this.entry(index) + INFLIGHT_ENTRY_INFLIGHT) !== 0;
  }

  /** Clears the entry's mark, in the copy. */
  clear(index: number): void {
    this.copy.setUint8(this.entry(index) + INFLIGHT_ENTRY_INFLIGHT, 0);
  }

  /** The entries marked in flight, oldest first; those of the same count by their index. */
  inFlight(size: number): number[] {
    return Array.from({ length: size }, (_, index) => index)
      .filter((index) => this.isInFlight(index))
      .map((index) => ({ index, counter: this.copy.getBigUint64(this.entry(index) + this.#layout.counter, true) }))
      .toSorted((a, b) => (a.counter === b.counter ? a.index - b.index : a.counter < b.counter ? -1 : 1))
      .map(({ index }) => index);
  }

  /** Writes all entries as they are in the copy. A kill may leave some of them as they were. */
  writeEntries(): void {
    this.write(this.#layout.at, new Uint8Array(this.copy.buffer, this.#layout.at));
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
