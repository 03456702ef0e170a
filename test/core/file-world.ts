/**
 * A lane with a file at one end, alone: a guest with a well-behaved driver, and a kernel of the tests' own. Every chain must
 * come back once, in order; every request must lie in buffers that the device has; frames are compared byte by byte.
 */
import { PackedDriver } from "../../src/driver/packed.ts";
import { SplitDriver } from "../../src/driver/split.ts";
import type { VirtqueueDriver } from "../../src/driver/virtqueue.ts";
import {
  DESTINATION_EXTENTS,
  DESTINATION_VRING,
  OFFLOAD_CSUM,
  POLL_BROKE_DESTINATION,
  POLL_BROKE_SOURCE,
  POLL_CALL_DESTINATION,
  POLL_CALL_SOURCE,
  POLL_COUNT,
  POLL_FILE_ASK,
  POLL_FILE_WAITS,
  SOURCE_EXTENTS,
  SOURCE_VRING,
  VRING_BYTES,
  FRAME_BYTES_MAX,
} from "../../src/layout/lane.ts";
import { HELD_END, HELD_NEXT, READS_NEXT } from "../../src/layout/requests.ts";
import { Bump, type Shape, cut } from "./chains.ts";
import { FakeKernel, type Layout } from "./file-kernel.ts";
import type { Access } from "./hooked-core.ts";
import { type EndPlan, type Ram, Rig, type Ring, type Variant, areaBytes } from "./rig.ts";

export type FileDirection = "send" | "receive";

/** One descriptor, on an even address. */
export const PLAIN: Shape = { ones: 0, cuts: [1], zeros: [], full: false, indirect: false, gap: 0 };

/** In place of a buffer's number. */
const TABLE = 0xffff_ffff;

interface Part {
  gpa: bigint;
  len: number;
}

interface Outstanding {
  id: number;
  parts: Part[];
  /** The same, and the table. */
  lent: Part[];
  /** Of its first buffer. */
  number: number;
  published: boolean;
  /** What was in it when it was made available. */
  content: Buffer;
}

/** A virtqueue's driver that wants its chains back in order, and knows which bytes the device may touch. */
export class FileDriver {
  readonly queue: VirtqueueDriver;
  readonly #ram: Ram;
  readonly #ring: Ring;
  readonly #bump: Bump;
  #outstanding: Outstanding[] = [];
  /** 1 for each byte of RAM that was ever a ring's, a table's or a buffer's. */
  readonly touched: Uint8Array;
  /** Of each byte of RAM the number of the buffer that it is in, of a chain that the device has; 0: none. */
  readonly #lent: Uint32Array;
  /** By their numbers; tables are no buffers. */
  readonly #buffers = new Map<number, Outstanding>();
  #numbers = 0;
  /** Of the chain that is being laid. */
  #taken: readonly Part[] = [];
  /** Chains that came back with bytes changed behind what was written to them. */
  scribbled = 0;

  constructor(ram: Ram, ring: Ring, bump: Bump, touched: Uint8Array = new Uint8Array(ram.bytes.length)) {
    const { packed, size, desc: gpa, eventIdx, indirect, base } = ring;
    const place = { buffer: ram.bytes.buffer, byteOffset: ram.at(gpa), gpa, size, eventIdx, indirect, base };
    this.queue = packed ? new PackedDriver(place) : new SplitDriver(place);
    this.#ram = ram;
    this.#ring = ring;
    this.#bump = bump;
    this.touched = touched;
    this.#lent = new Uint32Array(touched.length);
    const areas = areaBytes(ring);
    for (const area of ["desc", "avail", "used"] as const) this.#touch(ring[area], areas[area]);
  }

  /** Adds a chain of `length` bytes, to be read if it has content. @returns whether there was room */
  add(length: number, shape: Shape, content?: Uint8Array): boolean {
    const isTable = shape.indirect && this.#ring.indirect;
    const limit = isTable ? this.#ring.size : this.queue.numFree;
    if (this.queue.numFree === 0) return false;
    const parts: Part[] = [];
    this.#taken = parts;
    for (const len of cut(length, shape, limit)) {
      const gpa = this.#take(len, shape.gap);
      if (gpa === undefined) return false;
      parts.push({ gpa, len });
    }
    return this.addParts(parts, isTable ? shape.gap : undefined, content);
  }

  /** The same of buffers that lie somewhere. @param tableGap bytes left free in front of an indirect table; undefined: none */
  addParts(parts: Part[], tableGap?: number, content?: Uint8Array): boolean {
    const chain = parts.map((part) => ({ ...part, writable: content === undefined }));
    const table = tableGap === undefined ? undefined : this.#take(16 * chain.length, tableGap);
    if (tableGap !== undefined && table === undefined) return false;
    const id = table === undefined ? this.queue.add(chain) : this.#addIndirect(chain, table);
    if (id < 0) return false;
    this.#taken = [];
    const lent = table === undefined ? parts : [...parts, { gpa: table, len: 16 * chain.length }];
    let done = 0;
    for (const { gpa, len } of parts) {
      if (len === 0 || !this.#isRam(gpa)) continue;
      this.#touch(gpa, len);
      if (content) this.#ram.slice(gpa, len).set(content.subarray(done, done + len));
      done += len;
    }
    const added = { id, parts, lent, number: this.#numbers + 1, published: false, content: this.#contentOf(parts) };
    for (const [i, part] of lent.entries()) {
      if (i < parts.length) this.#buffers.set(++this.#numbers, added);
      if (part.len > 0 && this.#isRam(part.gpa)) this.#lend(part, i < parts.length ? this.#numbers : TABLE);
    }
    this.#outstanding.push(added);
    return true;
  }

  publish(): void {
    this.queue.publish();
    for (const chain of this.#outstanding) chain.published = true;
  }

  /** Takes back one chain. @returns what was written to it */
  reap(): Buffer | undefined {
    const id = this.queue.pop();
    if (id < 0) return undefined;
    const first = this.#outstanding.shift();
    if (first?.id !== id || !first.published) throw new Error(`chain ${id} came back, it is the turn of ${first?.id}`);
    const bytes = this.#contentOf(first.parts);
    const { usedLen } = this.queue;
    if (Buffer.compare(bytes.subarray(usedLen), first.content.subarray(usedLen)) !== 0) this.scribbled++;
    for (const part of first.lent) if (part.len > 0 && this.#isRam(part.gpa)) this.#lend(part, 0);
    for (let i = 0; i < first.parts.length; i++) this.#buffers.delete(first.number + i);
    return bytes.subarray(0, usedLen);
  }

  get outstanding(): number {
    return this.#outstanding.length;
  }

  /** Whether these bytes are those of one buffer that the device has. */
  allows(gpa: bigint, length: number): boolean {
    const at = this.#ram.at(gpa);
    const number = this.#lent[at]!;
    return this.#buffers.get(number)?.published === true && this.#lent[at + length - 1] === number;
  }

  /** A bad buffer may lie in no RAM at all. */
  #isRam(gpa: bigint): boolean {
    return this.#ram.regions.some((region) => gpa >= region.gpa && gpa < region.gpa + BigInt(region.sizeBytes));
  }

  #contentOf(parts: readonly Part[]): Buffer {
    return Buffer.concat(
      parts.filter(({ gpa, len }) => len > 0 && this.#isRam(gpa)).map(({ gpa, len }) => this.#ram.slice(gpa, len)),
    );
  }

  /** RAM that the device does not have; undefined: there is none, in turn. */
  #take(length: number, gap: number): bigint | undefined {
    let gpa = this.#bump.take(length, gap);
    if (gpa === undefined) {
      this.#bump.reset();
      gpa = this.#bump.take(length, gap);
    }
    if (gpa === undefined || length === 0) return gpa;
    const at = this.#ram.at(gpa);
    const end = gpa + BigInt(length);
    const isTaken = this.#taken.some((part) => part.len > 0 && part.gpa < end && gpa < part.gpa + BigInt(part.len));
    return isTaken || this.#lent.subarray(at, at + length).some((number) => number !== 0) ? undefined : gpa;
  }

  #lend({ gpa, len }: Part, lent: number): void {
    const at = this.#ram.at(gpa);
    this.#lent.fill(lent, at, at + len);
  }

  #addIndirect(chain: (Part & { writable: boolean })[], gpa: bigint): number {
    const buffer = new ArrayBuffer(16 * chain.length);
    const id = this.queue.addIndirect(chain, { buffer, byteOffset: 0, gpa });
    if (id < 0) return id;
    this.#ram.slice(gpa, buffer.byteLength).set(new Uint8Array(buffer));
    this.#touch(gpa, buffer.byteLength);
    return id;
  }

  #touch(gpa: bigint, length: number): void {
    const at = this.#ram.at(gpa);
    this.touched.fill(1, at, at + length);
  }
}

/** What one turn reports. */
export interface Turn {
  requests: number;
  count: number;
  fileWaits: boolean;
  /** Whether the file still makes it wait is to be asked. */
  fileAsk: boolean;
  call: boolean;
  broke: boolean;
}

export interface FilePlan {
  direction: FileDirection;
  end: EndPlan;
  layout?: Layout;
  variant?: Variant;
  observe?: (access: Access) => void;
  /** The largest frame that the file gives. */
  frameBytesMax?: number;
  /** Which bytes the device has, where the driver is none of ours. */
  allows?: (gpa: bigint, length: number) => boolean;
}

/** A lane with a file at one end, on a rig; its guest's driver is somebody else's. */
export class FileLane {
  readonly rig: Rig;
  readonly direction: FileDirection;
  readonly #plan: FilePlan;
  readonly #allows: (gpa: bigint, length: number) => boolean;
  kernel!: FakeKernel;

  constructor(plan: FilePlan) {
    const { end, variant = 1, observe = () => undefined, direction } = plan;
    this.#plan = plan;
    this.direction = direction;
    this.#allows = plan.allows ?? (() => true);
    this.rig = new Rig({ source: end, destination: { in: "source", ring: end.ring }, variant, observe });
    this.#openFile();
  }

  get ram(): Ram {
    return this.rig.source.ram;
  }

  get ring(): Ring {
    return this.rig.source.ring;
  }

  /** The guest's end of the lane. */
  get end(): "source" | "destination" {
    return this.direction === "send" ? "source" : "destination";
  }

  get view(): DataView {
    return new DataView(this.rig.lane.memory.buffer);
  }

  /** Frames were read that the guest does not have yet. */
  get isHolding(): boolean {
    return this.view.getUint32(HELD_NEXT, true) !== this.view.getUint32(HELD_END, true);
  }

  /** A new lane on the same guest, as a relay has that was killed and started again; the file and its frames stay. */
  replaceLane(base: number): void {
    const { queue, passed, answer } = this.kernel;
    this.rig.replaceLane({ source: base, destination: base });
    this.#openFile();
    this.kernel.queue.push(...queue);
    this.kernel.passed.push(...passed);
    this.kernel.answer = answer;
  }

  /** There never was a virtqueue at the file's end. */
  #openFile(): void {
    const { lane } = this.rig;
    const [vring, extents, end] =
      this.direction === "send"
        ? ([DESTINATION_VRING, DESTINATION_EXTENTS, "destination"] as const)
        : ([SOURCE_VRING, SOURCE_EXTENTS, "source"] as const);
    new Uint8Array(lane.memory.buffer, vring, VRING_BYTES).fill(0);
    this.view.setUint32(extents, 0, true);
    lane.setFile(end);
    if (this.direction === "receive") lane.setFileFrames(this.#plan.frameBytesMax ?? FRAME_BYTES_MAX);
    this.kernel = new FakeKernel({
      memory: lane.memory,
      guest: this.rig.source,
      direction: this.direction,
      layout: this.#plan.layout ?? "io_uring",
      allows: this.#allows,
    });
  }

  /** How many reads the next turn may ask for at once, whatever the lane would have guessed. */
  set reads(count: number) {
    this.view.setUint32(READS_NEXT, count, true);
  }

  /** @param meanwhile done between the request and the system call */
  turn(budget = 64, meanwhile = (): void => undefined): Turn {
    const requests = this.rig.core.prepare(budget);
    meanwhile();
    this.kernel.results = [];
    if (requests !== 0) this.kernel.submit(requests);
    const result = this.rig.core.finish();
    const has = (bit: number) => (result & bit) !== 0;
    const [call, otherCall] = [has(POLL_CALL_SOURCE), has(POLL_CALL_DESTINATION)];
    const [broke, otherBroke] = [has(POLL_BROKE_SOURCE), has(POLL_BROKE_DESTINATION)];
    const isSend = this.direction === "send";
    if ((isSend ? otherCall : call) || (isSend ? otherBroke : broke)) throw new Error("the file is no driver");
    return {
      requests,
      count: result & POLL_COUNT,
      fileWaits: has(POLL_FILE_WAITS),
      fileAsk: has(POLL_FILE_ASK),
      call: isSend ? call : otherCall,
      broke: isSend ? broke : otherBroke,
    };
  }

  /** Before blocking. @returns whether there is work */
  arm(): boolean {
    return this.rig.core.arm(0) !== 0;
  }

  /** Starts the virtqueue where it stopped, or somewhere else. */
  restart(base = this.rig.lane.nextAvail(this.end)): void {
    this.rig.start(this.end, base);
    this.rig.core.refresh();
  }
}

/** The same with a driver that keeps to the rules. */
export class FileWorld extends FileLane {
  driver!: FileDriver;
  readonly #bump: Bump;
  readonly #before: Uint8Array<ArrayBufferLike>;
  /** Of frames that arrived in the guest: their net header of 10 bytes, and they themselves. */
  readonly received: Uint8Array[] = [];

  /** @param bumpFrom where buffers begin, an offset in RAM */
  constructor(plan: FilePlan, bumpFrom?: number) {
    super({ ...plan, allows: (gpa, length) => this.driver.allows(gpa, length) });
    const { ram, ring } = this;
    this.#bump = new Bump(ram, bumpFrom ?? ram.regions[1]!.start);
    this.driver = new FileDriver(ram, ring, this.#bump);
    this.#before = ram.bytes.slice();
  }

  /** The driver begins anew, with an empty ring. */
  resetRing(): void {
    this.#bump.reset();
    this.driver = new FileDriver(this.ram, this.ring, this.#bump, this.driver.touched);
    this.restart(this.ring.base);
  }

  post(length: number, shape = PLAIN): boolean {
    const posted = this.driver.add(length, shape);
    this.driver.publish();
    return posted;
  }

  /** Offers a frame to be sent. @param header 12 bytes */
  send(frame: Uint8Array, header: Uint8Array, shape = PLAIN): boolean {
    const content = Buffer.concat([header.subarray(0, this.ring.headerBytes), frame]);
    const sent = this.driver.add(content.length, shape, content);
    this.driver.publish();
    return sent;
  }

  /** Takes back what was sent. @returns how many */
  reapSent(): number {
    let count = 0;
    for (let chain; (chain = this.driver.reap()); count++) if (chain.length > 0) throw new Error("written to");
    return count;
  }

  /** Takes back what was received, whole frames, into `received`. @param empty some may come back empty @returns how many chains */
  reapReceived({ empty = false } = {}): number {
    let count = 0;
    const { headerBytes, mergeable } = this.ring;
    for (let first; (first = this.driver.reap()); count++) {
      const parts = [first];
      const bytes = () => Buffer.concat(parts);
      const more = () => {
        const part = this.driver.reap();
        if (!part || part.length === 0) throw new Error(`${parts.length} chains of a frame came back`);
        parts.push(part);
        count++;
      };
      if (first.length === 0 && !empty) throw new Error("a chain came back empty");
      if (first.length === 0) continue;
      while (bytes().length < headerBytes) more();
      if (headerBytes === 12) for (const chains = bytes().readUInt16LE(10); parts.length < chains;) more();
      if (headerBytes === 12 && bytes().readUInt16LE(10) !== parts.length) throw new Error("wrong num_buffers");
      if (!mergeable && parts.length > 1) throw new Error("merged");
      this.received.push(Buffer.concat([bytes().subarray(0, 10), bytes().subarray(headerBytes)]));
    }
    return count;
  }

  /** How a frame in the file must arrive in `received`: a driver that does not take checksums gets no flags. */
  arriving(frame: Uint8Array): Uint8Array {
    const bytes = withoutNumBuffers(frame);
    if (!(this.ring.offloads & OFFLOAD_CSUM)) bytes[0] = 0;
    return bytes;
  }

  /** RAM that is no buffer, table or ring is as it was. */
  mustLeaveTheRest(): void {
    const { touched } = this.driver;
    const { bytes } = this.ram;
    for (let at = 0; at < bytes.length; at++) {
      if (touched[at] !== 0 || bytes[at] === this.#before[at]) continue;
      throw new Error(`gpa 0x${this.ram.gpa(at).toString(16)} was written to`);
    }
  }
}

/** A frame in the file: its net header, num_buffers and all, in front. */
export function inFile(header: Uint8Array, frame: Uint8Array): Uint8Array {
  return Uint8Array.from(Buffer.concat([header, frame]));
}

/** A frame in the file as `received` has it. */
export function withoutNumBuffers(frame: Uint8Array): Uint8Array {
  return Uint8Array.from(Buffer.concat([frame.subarray(0, 10), frame.subarray(12)]));
}
