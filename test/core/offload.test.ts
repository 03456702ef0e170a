/**
 * Offloads (virtio 1.3, 5.1.6.2): what one driver leaves to the device and the other does not take, the lane does. Every
 * frame is compared, byte for byte, with what a sender without offloads would have sent. Rows 249 to 261 of the
 * catalogue of bad inputs.
 */
import fc from "fast-check";
import { describe, expect, test } from "vitest";
import { OFFLOAD_CSUM, OFFLOAD_ECN, OFFLOAD_TSO4, OFFLOAD_TSO6, POLL_PROGRESS } from "../../src/layout/lane.ts";
import { Bump, ChainDriver, type Shape } from "./chains.ts";
import type { Access } from "./hooked-core.ts";
import { Rig, type Ring, type Variant, ringAt } from "./rig.ts";
import { runs } from "./runs.ts";
import { type TcpFrame, cutFrame, tcpFrame } from "./tcp.ts";

const ALL = OFFLOAD_CSUM | OFFLOAD_TSO4 | OFFLOAD_TSO6 | OFFLOAD_ECN;
const NEEDS_CSUM = 1;
const TCPV4 = 1;
const TCPV6 = 4;
const ECN = 0x80;
const plain: Shape = { ones: 0, cuts: [1], zeros: [], full: false, indirect: false, gap: 0 };

interface Setting {
  variant?: Variant;
  source?: Partial<Ring>;
  destination?: Partial<Ring>;
  size?: number;
  observe?: (access: Access) => void;
}

class Scene {
  readonly rig: Rig;
  readonly transmitq: ChainDriver;
  readonly receiveq: ChainDriver;

  constructor({ variant = 1, source = {}, destination = {}, size = 1024, observe = () => undefined }: Setting) {
    const end = (ring: Partial<Ring>) => ({
      regions: [
        { gpa: 0n, sizeBytes: 0x1_0000 },
        { gpa: 0x10_0000n, sizeBytes: 0x20_0000 },
      ],
      ring: ringAt(0n, size, { offloads: ALL, ...ring }),
    });
    this.rig = new Rig({ source: end(source), destination: end(destination), variant, observe });
    const driver = ({ ram, ring }: Rig["source"]) => new ChainDriver(ram, ring, new Bump(ram, ram.regions[1]!.start));
    this.transmitq = driver(this.rig.source);
    this.receiveq = driver(this.rig.destination);
  }

  send(header: Uint8Array, frame: Uint8Array, shape = plain): void {
    const bytes = Buffer.concat([header, frame]);
    expect(this.transmitq.add(bytes.length, shape, bytes)).toBe(true);
    this.transmitq.queue.publish();
  }

  post(count: number, bytes: number, shape = plain): void {
    for (let i = 0; i < count && this.receiveq.add(bytes, shape); i++);
    this.receiveq.queue.publish();
  }

  /** Frames received since, each behind its header. */
  received(): { header: Buffer; frame: Uint8Array }[] {
    const frames = [];
    for (let first; (first = this.receiveq.reap());) {
      const parts = [first];
      const header = Buffer.from(first.subarray(0, 12));
      while (parts.length < header.readUInt16LE(10)) parts.push(this.receiveq.reap()!);
      frames.push({ header, frame: Uint8Array.from(Buffer.concat(parts).subarray(12)) });
    }
    return frames;
  }
}

interface HeaderFields {
  flags?: number;
  gsoType?: number;
  hdrLen?: number;
  gsoSize?: number;
  csumStart?: number;
  csumOffset?: number;
}

function headerOf(fields: HeaderFields): Buffer {
  const { flags = NEEDS_CSUM, gsoType = 0, hdrLen = 0, gsoSize = 0, csumStart = 0, csumOffset = 16 } = fields;
  const header = Buffer.alloc(12);
  header.set([flags, gsoType]);
  for (const [i, word] of [hdrLen, gsoSize, csumStart, csumOffset].entries()) header.writeUInt16LE(word, 2 + 2 * i);
  return header;
}

function frameFor(payloadBytes: number, more: Partial<TcpFrame> = {}): TcpFrame {
  const payload = Uint8Array.from({ length: payloadBytes }, (_, i) => (i * 31 + (i >> 8)) & 0xff);
  const rest = { version: 4, vlans: [], id: 0xfffe, sequence: 0xffff_f000, flags: 0x18, ipOptions: 0, tcpOptions: 12 };
  return { ...rest, payload, ...more } as TcpFrame;
}

const tcp = fc.record({
  version: fc.constantFrom<4 | 6>(4, 6),
  vlans: fc.array(fc.nat(4095), { maxLength: 2 }),
  id: fc.nat(0xffff),
  sequence: fc.nat(0xffff_ffff),
  flags: fc.nat(0xff),
  ipOptions: fc.constantFrom(0, 8, 24),
  tcpOptions: fc.integer({ min: 0, max: 10 }).map((words) => 4 * words),
  payload: fc.oneof(
    fc.uint8Array({ maxLength: 200 }),
    fc.integer({ min: 0, max: 64_000 }).map((length) => frameFor(length).payload),
  ),
});
const shape: fc.Arbitrary<Shape> = fc.record({
  ones: fc.nat(14),
  cuts: fc.array(fc.integer({ min: 1, max: 100 }), { minLength: 1, maxLength: 6 }),
  zeros: fc.constant([]),
  full: fc.constant(false),
  indirect: fc.boolean(),
  gap: fc.nat(40),
});

describe("what the receiver does not take is done for it", () => {
  test("checksums, of any frame, any layout", { timeout: 60_000 }, () => {
    const variant = fc.constantFrom<Variant>(1, 2, "hooked");
    fc.assert(
      fc.property(tcp, shape, shape, fc.boolean(), fc.boolean(), variant, (frame, from, to, a, b, variant) => {
        const scene = new Scene({ variant, source: { packed: a }, destination: { packed: b, offloads: 0 } });
        const { bytes, tcp: csumStart } = tcpFrame(frame, "partial");
        scene.send(headerOf({ csumStart }), bytes, from);
        scene.post(40, 2000, to);
        scene.rig.poll();
        const [received] = scene.received();
        expect(received!.header.readBigUInt64LE(0)).toBe(0n);
        expect(Buffer.compare(received!.frame, tcpFrame(frame, "full").bytes)).toBe(0);
      }),
      { numRuns: runs(100) },
    );
  });

  test(
    "BI-261 large segments are cut, of any frame, any layout, however few buffers there are",
    { timeout: 60_000 },
    () => {
      const variant = fc.constantFrom<Variant>(1, 2, "hooked");
      const mss = fc.integer({ min: 48, max: 9000 });
      const offloads = fc.constantFrom(0, OFFLOAD_CSUM);
      const buffers = fc.integer({ min: 1, max: 60 });
      fc.assert(
        fc.property(
          tcp,
          mss,
          shape,
          fc.boolean(),
          fc.boolean(),
          variant,
          offloads,
          buffers,
          (frame, gsoSize, from, a, b, variant, offloads, count) => {
            const scene = new Scene({ variant, source: { packed: a }, destination: { packed: b, offloads } });
            const { bytes, tcp: csumStart } = tcpFrame(frame, "partial");
            const gsoType = (frame.version === 4 ? TCPV4 : TCPV6) | (frame.flags & 0x80 ? ECN : 0);
            scene.send(headerOf({ gsoType, gsoSize, csumStart }), bytes, from);
            const expected = cutFrame(frame, gsoSize);
            const frames: { header: Buffer; frame: Uint8Array }[] = [];
            for (let turns = 0; scene.rig.counters.packets === 0; turns++) {
              expect(turns).toBeLessThan(5000);
              scene.post(count, 5000);
              scene.rig.poll();
              frames.push(...scene.received());
            }
            expect(frames.length).toBe(expected.length);
            for (const [i, { header, frame: bytes }] of frames.entries()) {
              expect(header.readBigUInt64LE(0)).toBe(0n);
              expect(Buffer.compare(bytes, expected[i]!)).toBe(0);
            }
            expect(scene.transmitq.reap()).toHaveLength(0);
          },
        ),
        { numRuns: runs(100) },
      );
    },
  );

  test("a frame that waited too long in the middle is dropped, the next one begins at its beginning", () => {
    const scene = new Scene({ destination: { offloads: 0 } });
    const frame = frameFor(5000);
    const { bytes, tcp: csumStart } = tcpFrame(frame, "partial");
    for (let i = 0; i < 2; i++) scene.send(headerOf({ gsoType: TCPV4, gsoSize: 1000, csumStart }), bytes);
    scene.post(2, 2000);
    expect(scene.rig.poll()).toMatchObject({ taken: 0, waiting: true });
    expect(scene.rig.poll(1, true)).toMatchObject({ taken: 1 });
    scene.post(10, 2000);
    expect(scene.rig.poll()).toMatchObject({ taken: 1 });
    expect(scene.received().length).toBe(2 + 5);
    expect(scene.rig.counters).toMatchObject({ packets: 1, drops: { noBuffer: 1 } });
  });
});

describe("what the receiver takes is handed on", () => {
  test.each(["split", "packed"])("checksums to do, in a run of frames (%s)", (format) => {
    const ring = { packed: format === "packed" };
    const scene = new Scene({ source: ring, destination: ring });
    const frame = frameFor(100);
    const { bytes, tcp: csumStart } = tcpFrame(frame, "partial");
    for (let i = 0; i < 10; i++) scene.send(headerOf({ csumStart, hdrLen: 7, gsoSize: 9 }), bytes);
    scene.post(20, 2000);
    scene.rig.poll();
    const frames = scene.received();
    expect(frames.length).toBe(10);
    for (const { header, frame: received } of frames) {
      const numBuffers = Buffer.from([1, 0]);
      expect(header).toEqual(Buffer.concat([headerOf({ csumStart }).subarray(0, 10), numBuffers]));
      expect(Buffer.compare(received, bytes)).toBe(0);
    }
  });

  test("BI-253 large segments: the header is written anew, hdr_len measured", () => {
    const scene = new Scene({});
    const frame = frameFor(30_000);
    const { bytes, tcp: csumStart, payload } = tcpFrame(frame, "partial");
    for (const hdrLen of [0, 0xffff]) scene.send(headerOf({ gsoType: TCPV4, gsoSize: 1448, csumStart, hdrLen }), bytes);
    scene.post(40, 4096);
    scene.rig.poll();
    const frames = scene.received();
    expect(frames.length).toBe(2);
    for (const { header, frame: received } of frames) {
      expect(header.subarray(0, 10)).toEqual(
        headerOf({ gsoType: TCPV4, gsoSize: 1448, csumStart, hdrLen: payload }).subarray(0, 10),
      );
      expect(Buffer.compare(received, bytes)).toBe(0);
    }
  });

  test("BI-251 a segment that is not larger than gso_size is not called large", () => {
    const scene = new Scene({});
    const { bytes, tcp: csumStart } = tcpFrame(frameFor(1448), "partial");
    scene.send(headerOf({ gsoType: TCPV4, gsoSize: 1448, csumStart }), bytes);
    scene.post(4, 4096);
    scene.rig.poll();
    expect(scene.received()[0]!.header.subarray(0, 10)).toEqual(headerOf({ csumStart }).subarray(0, 10));
  });
});

describe("headers that make no sense make bad frames", () => {
  const frame = frameFor(3000);
  const { bytes, tcp: csumStart } = tcpFrame(frame, "partial");
  const good = { gsoType: TCPV4, gsoSize: 1000, csumStart };
  const bad: [string, HeaderFields][] = [
    ["BI-249 an unknown gso_type", { ...good, gsoType: 0x7f }],
    ["BI-249 UDP fragmentation, which was never offered", { ...good, gsoType: 3 }],
    ["BI-249 ECN alone", { ...good, gsoType: ECN }],
    ["BI-251 gso_size 1", { ...good, gsoSize: 1 }],
    ["BI-251 gso_size 7", { ...good, gsoSize: 7 }],
    ["BI-251 gso_size 0", { ...good, gsoSize: 0 }],
    ["BI-252 GSO without NEEDS_CSUM", { ...good, flags: 0 }],
    ["BI-254 csum_start at the last byte", { csumStart: bytes.length - 1 }],
    ["BI-254 csum_start behind the frame", { csumStart: bytes.length }],
    ["BI-254 csum_start 0xffff", { csumStart: 0xffff }],
    ["BI-256 csum_start + csum_offset beyond 16 bits", { csumStart, csumOffset: 0xffff }],
    ["BI-257 a checksum inside the Ethernet header", { csumStart: 4 }],
    ["a large segment whose checksum is not TCP's", { ...good, csumOffset: 6 }],
  ];
  for (const offloads of [ALL, 0]) {
    const taker = offloads ? "a receiver that takes all" : "one that takes none";
    test.each(bad)(`%s, to ${taker}`, (_, fields) => {
      const scene = new Scene({ destination: { offloads } });
      scene.send(headerOf(fields), bytes);
      scene.send(headerOf(good), bytes);
      scene.post(40, 2000);
      scene.rig.poll();
      expect(scene.rig.counters).toMatchObject({ packets: 1, drops: { badFrame: 1 } });
    });
  }

  test.each([
    ["checksums", { csumStart }, ALL & ~OFFLOAD_CSUM],
    ["TSO4", good, ALL & ~OFFLOAD_TSO4],
    ["ECN", { ...good, gsoType: TCPV4 | ECN }, ALL & ~OFFLOAD_ECN],
  ])("BI-249 %s from a driver that did not negotiate them", (_, fields, offloads) => {
    const scene = new Scene({ source: { offloads } });
    scene.send(headerOf(fields), bytes);
    scene.post(40, 2000);
    scene.rig.poll();
    expect(scene.rig.counters).toMatchObject({ packets: 0, drops: { badFrame: 1 } });
  });

  test.each<[string, Partial<TcpFrame>, (frame: Uint8Array) => void]>([
    ["BI-267 IHL 4", {}, (frame) => (frame[14] = 0x44)],
    ["BI-267 IHL beyond the TCP header", {}, (frame) => (frame[14] = 0x4f)],
    ["BI-267 a TCP data offset of 4", {}, (frame) => (frame[csumStart + 12] = 0x40)],
    ["no IPv4 at all", {}, (frame) => (frame[12] = 0x09)],
    ["IPv4 of version 6", {}, (frame) => (frame[14] = 0x65)],
    ["IPv4 with UDP in it", {}, (frame) => (frame[23] = 17)],
    ["BI-267 three VLAN tags", { vlans: [1, 2] }, (frame) => frame.set([0x81, 0], 20)],
  ])("a large segment that cannot be cut: %s", (_, more, spoil) => {
    const { bytes, tcp: csumStart } = tcpFrame(frameFor(3000, more), "partial");
    spoil(bytes);
    const scene = new Scene({ destination: { offloads: 0 } });
    scene.send(headerOf({ ...good, csumStart }), bytes);
    scene.post(40, 2000);
    scene.rig.poll();
    expect(scene.rig.counters).toMatchObject({ packets: 0, drops: { badFrame: 1 } });
    expect(scene.received()).toEqual([]);
  });

  test("BI-251 a frame of thousands of pieces in segments of 8 is cut in bounded polls", () => {
    const scene = new Scene({ size: 1024, destination: { offloads: 0 } });
    const { bytes, tcp: csumStart } = tcpFrame(frameFor(60_000), "partial");
    const cuts = Array.from({ length: 1000 }, () => 1);
    scene.send(headerOf({ ...good, gsoSize: 8, csumStart }), bytes, { ...plain, cuts, indirect: true });
    const frames: number[] = [];
    while (scene.rig.counters.packets === 0) {
      scene.post(1024, 500);
      scene.rig.poll();
      frames.push(scene.received().length);
    }
    expect(frames.reduce((sum, count) => sum + count, 0)).toBe(60_000 / 8);
    expect(Math.max(...frames)).toBe(256);
  });

  test("a segment that no IP header can tell the length of is a bad frame", () => {
    const { bytes, tcp: csumStart } = tcpFrame(frameFor(65_480), "partial");
    for (const [gsoSize, packets] of [
      [65_480, 1],
      [65_484, 1],
    ] as const) {
      const scene = new Scene({ destination: { offloads: 0 } });
      scene.send(headerOf({ ...good, gsoSize, csumStart }), bytes);
      scene.post(40, 4000);
      scene.rig.poll();
      expect(scene.rig.counters).toMatchObject({ packets });
    }
    const large = Uint8Array.from(bytes);
    const longer = Buffer.concat([large, Buffer.alloc(40)]);
    const scene = new Scene({ destination: { offloads: 0 } });
    scene.send(headerOf({ ...good, gsoSize: 65_535, csumStart }), longer);
    scene.post(40, 4000);
    scene.rig.poll();
    expect(scene.rig.counters).toMatchObject({ packets: 0, drops: { badFrame: 1 } });
  });

  test("BI-259 a payload that changes while it is summed and copied: a wrong checksum, no more", () => {
    let at = 0;
    const scene: Scene = new Scene({
      variant: "hooked",
      destination: { offloads: 0 },
      observe: ({ end, gpa }) => {
        if (end === "source" && gpa >= 0x10_0000n) scene.rig.source.ram.bytes[0x1_0000 + 200 + (at++ % 2500)]! ^= 0xff;
      },
    });
    scene.send(headerOf(good), bytes);
    scene.send(headerOf({ csumStart }), bytes);
    scene.post(40, 4000);
    expect(scene.rig.poll()).toMatchObject({ taken: 2 });
    const lengths = scene.received().map(({ frame }) => frame.length);
    expect(lengths).toEqual([...cutFrame(frame, 1000).map(({ length }) => length), bytes.length]);
    expect(at).toBeGreaterThan(100);
  });

  test("a frame that gets on, one buffer at a time, says so", () => {
    const scene = new Scene({ destination: { offloads: 0 } });
    scene.send(headerOf(good), bytes);
    scene.post(1, 2000);
    expect(scene.rig.core.poll(64, 0) & POLL_PROGRESS).toBe(POLL_PROGRESS);
    expect(scene.rig.core.poll(64, 0) & POLL_PROGRESS).toBe(0);
  });

  test("BI-297 a bad frame does not end the impatience of a lane that waited too long", () => {
    const scene = new Scene({ destination: { offloads: 0 } });
    scene.send(headerOf(good), bytes);
    scene.send(headerOf({ ...good, gsoType: 0x7f }), bytes);
    expect(scene.rig.poll()).toMatchObject({ taken: 0, waiting: true });
    expect(scene.rig.poll(64, true)).toMatchObject({ taken: 2, waiting: true });
  });
});
