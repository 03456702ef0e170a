/** Frames in a guest's memory, for the TAP bench: the C loops and the lanes carry the same ones. */
import { Arena, Guest } from "../src/driver/guest.ts";
import type { Window } from "../src/driver/guest.ts";
import { NET_HDR_SIZE, VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_TCPV4 } from "../src/layout/virtio.ts";
import { GuestMemory } from "../src/memory/guest-memory.ts";
import { baseAddress } from "../native/mman.ts";
import type { Frames } from "./c-tap.ts";

const GPA = 0x4000_0000n;
const WINDOW_BYTES = 32 << 20;
/** Buffers that are used in turn, as the C loops do. */
export const BUFFERS = 64;
const CACHE_LINE = 64;
/** The largest frame, in pages. */
const FRAME_ROOM = 17 * 4096;

/** Longer ones are TCP segments for the kernel to cut, or to pass on as they are. */
const MTU = 1500;
const ETHERNET = 14;
const IPV4 = 20;
const TCP = 20;
const HEADERS = ETHERNET + IPV4 + TCP;
const ETHERTYPE_IPV4 = 0x0800;
/** For local experiments (IEEE 802): nobody listens. */
const ETHERTYPE_EXPERIMENT = 0x88b5;
/** Not the interface's, so that IPv4 throws it away at once. */
const ELSEWHERE = [2, 0, 0, 0, 0, 0x99];
const SENDER = [2, 0, 0, 0, 0, 0x01];

/** Frames as they lie in the guest. */
export interface LaidFrames extends Frames {
  readonly gpa: bigint;
  /** Guest memory from `gpa` on. */
  readonly sizeBytes: number;
}

export class TapRig implements Disposable {
  readonly memory = new GuestMemory();
  readonly #guest = new Guest([{ gpa: GPA, sizeBytes: BigInt(WINDOW_BYTES) }]);
  readonly #window = this.#guest.window(GPA, WINDOW_BYTES);
  readonly #arena: Arena;
  readonly #frames: Window;
  /** One that no receiver overwrites. */
  readonly #original: Window;

  constructor() {
    this.memory.setRegions(this.#guest.regions);
    this.#arena = new Arena(this.#window);
    this.#frames = this.#arena.take(BUFFERS * FRAME_ROOM, 4096);
    this.#original = this.#arena.take(FRAME_ROOM, 4096);
  }

  /** Guest memory for a ring. */
  take(sizeBytes: number): Window {
    return this.#arena.take(sizeBytes, 4096);
  }

  /** Lays the frames of a size; those of the size before are gone. @param bytesMin that each has for itself */
  lay(frameBytes: number, bytesMin = 0): LaidFrames {
    const stride = strideOf(Math.max(NET_HDR_SIZE + frameBytes, bytesMin));
    for (let i = 0; i < BUFFERS; i++) writeFrame(bytesOf(this.#frames, i * stride, NET_HDR_SIZE + frameBytes), i);
    writeFrame(bytesOf(this.#original, 0, NET_HDR_SIZE + frameBytes), 0);
    const { gpa, sizeBytes } = this.#frames;
    const [address, original] = [gpa, this.#original.gpa].map((each) => this.#addressOf(each)) as [bigint, bigint];
    return { address, original, gpa, sizeBytes, stride, buffers: BUFFERS, frameBytes };
  }

  #addressOf(gpa: bigint): bigint {
    const { segment, offset } = this.memory.locate(gpa, 1n)!;
    return baseAddress(this.memory.segments[segment]!) + offset;
  }

  [Symbol.dispose](): void {
    this.#guest[Symbol.dispose]();
  }
}

function bytesOf({ buffer, byteOffset }: Window, offset: number, length: number): Buffer {
  return Buffer.from(buffer, byteOffset + offset, length);
}

function strideOf(bytes: number): number {
  return Math.ceil(bytes / CACHE_LINE) * CACHE_LINE;
}

/** A net header, and a frame that the kernel throws away as soon as it has looked at it. */
function writeFrame(bytes: Buffer, number: number): void {
  const frame = bytes.subarray(NET_HDR_SIZE);
  frame.forEach((_, i) => (frame[i] = i * 31 + (i >> 8) + number));
  bytes.fill(0, 0, NET_HDR_SIZE);
  frame.set([...ELSEWHERE, ...SENDER]);
  const segmented = frame.length > ETHERNET + MTU;
  frame.writeUInt16BE(segmented ? ETHERTYPE_IPV4 : ETHERTYPE_EXPERIMENT, 12);
  if (!segmented) return;
  bytes[0] = VIRTIO_NET_HDR_F_NEEDS_CSUM;
  bytes[1] = VIRTIO_NET_HDR_GSO_TCPV4;
  bytes.writeUInt16LE(HEADERS, 2); // hdr_len
  bytes.writeUInt16LE(MTU - IPV4 - TCP, 4); // gso_size
  bytes.writeUInt16LE(ETHERNET + IPV4, 6); // csum_start
  bytes.writeUInt16LE(16, 8); // csum_offset
  const ip = frame.subarray(ETHERNET);
  ip.set([0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, 6, 0, 0, 10, 9, 0, 1, 10, 9, 0, 2]);
  ip.writeUInt16BE(ip.length, 2);
  let sum = 0;
  for (let i = 0; i < IPV4; i += 2) sum += ip.readUInt16BE(i);
  ip.writeUInt16BE(~((sum & 0xffff) + (sum >> 16)) & 0xffff, 10);
  const tcp = ip.subarray(IPV4);
  tcp[12] = (TCP / 4) << 4;
  tcp[13] = 0x10; // ACK
}
