/**
 * Headers and lengths under attack: rows of sections F and H of the catalogue of bad inputs that concern what is in a
 * chain rather than how it is linked, for split and packed rings. Every poll is compared with the reference, byte for
 * byte.
 */
import { describe, expect, test } from "vitest";
import { INDIRECT, WRITE } from "./raw-ring.ts";
import { DATA, GOOD, SEAM, Stage } from "./stage.ts";

const formats = ["split", "packed"] as const;

/** Offers a transmit chain of one buffer with this content and has it polled, a buffer waiting at the other side. */
function sendBytes(stage: Stage, bytes: Uint8Array): void {
  stage.rig.source.ram.slice(DATA, bytes.length).set(bytes);
  stage.post();
  stage.chain({ gpa: DATA, len: bytes.length });
  stage.ring.offer(0);
  expect(stage.judge.poll()).toMatchObject({ taken: 1 });
  expect(stage.ring.used()).toEqual([{ id: 0, len: 0 }]);
}

describe.each(formats)("the transmitted header (%s)", (format) => {
  const transmit = { direction: "transmit", format, size: 256 } as const;

  test.each([...Array(13).keys(), 25])("BI-243, BI-244 %i bytes hold no frame: dropped", (length) => {
    const stage = new Stage(transmit);
    if (length === 0) stage.chain({ gpa: DATA, len: 0 });
    sendBytes(stage, new Uint8Array(length));
    expect(stage.rig.counters).toMatchObject({ packets: 0, drops: { badFrame: 1 } });
    expect(stage.receiveq.used()).toEqual([]);
  });

  test.each(Array.from({ length: 11 }, (_, i) => i + 2))("BI-246 spread over %i descriptors of one byte", (count) => {
    const stage = new Stage(transmit);
    stage.rig.source.ram.slice(DATA, 2).fill(0);
    stage.post();
    const ones = Array.from({ length: count }, (_, i) => ({ gpa: DATA + BigInt(i), len: 1 }));
    stage.chain(...ones, { gpa: DATA + BigInt(count), len: 112 - count });
    stage.ring.offer(0);
    stage.judge.poll();
    expect(stage.rig.counters).toMatchObject({ packets: 1, bytes: 100 });
  });

  test.each([1, 2, 7, 11])("BI-247 %i bytes of it in one region, the rest in the next", (before) => {
    const stage = new Stage(transmit);
    const gpa = SEAM - BigInt(before);
    stage.rig.source.ram.slice(gpa, 2).fill(0);
    stage.post();
    stage.chain({ gpa, len: 112 });
    stage.ring.offer(0);
    stage.judge.poll();
    expect(stage.rig.counters).toMatchObject({ packets: 1, bytes: 100 });
  });

  test.each([
    ["flags NEEDS_CSUM", 0, 1],
    ["BI-249 gso_type 0x7F", 1, 0x7f],
    ["BI-249 gso_type 0x80", 1, 0x80],
    ["gso_type TCPV4", 1, 1],
  ])("an offload nobody negotiated is dropped: %s", (_, at, value) => {
    const stage = new Stage(transmit);
    const bytes = new Uint8Array(112);
    bytes[at] = value;
    sendBytes(stage, bytes);
    expect(stage.rig.counters).toMatchObject({ packets: 0, drops: { badFrame: 1 } });
  });

  test("5.1.6.2.2 flags that mean nothing here are ignored", () => {
    const stage = new Stage(transmit);
    const bytes = new Uint8Array(112);
    bytes[0] = 0xfe;
    sendBytes(stage, bytes);
    expect(stage.rig.counters).toMatchObject({ packets: 1 });
  });

  test("BI-253 what is not flags or gso_type is not trusted, nor passed on", () => {
    const stage = new Stage(transmit);
    sendBytes(stage, new Uint8Array(112).fill(0xff).fill(0, 0, 2));
    expect(stage.rig.counters).toMatchObject({ packets: 1, bytes: 100 });
    expect(Array.from(stage.rig.destination.ram.slice(GOOD, 12))).toEqual([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
  });

  test.each([
    [65_550, 1],
    [65_551, 1],
    [65_600, 1],
    [65_601, 0],
    [70_000, 0],
    [16 << 20, 0],
  ])("BI-248 a frame of %i bytes", (length, packets) => {
    const stage = new Stage(transmit);
    stage.post(0x2_0000);
    stage.rig.source.ram.slice(DATA, 2).fill(0);
    const parts = Array.from({ length: Math.floor(length / 70_000) }, () => ({ gpa: DATA, len: 70_000 }));
    stage.chain({ gpa: DATA, len: 12 }, ...parts, { gpa: DATA, len: length % 70_000 });
    stage.ring.offer(0);
    stage.judge.poll();
    expect(stage.rig.counters).toMatchObject({ packets, drops: { badFrame: 1 - packets } });
  });
});

describe.each(formats)("the received header and used lengths (%s)", (format) => {
  const receive = { direction: "receive", format, size: 256 } as const;

  test.each([
    [10, false],
    [12, false],
    [12, true],
  ])("BI-262 %i bytes, mergeable %s: zero but for num_buffers", (headerBytes, mergeable) => {
    const stage = new Stage(receive, { ring: { headerBytes, mergeable } });
    stage.mustDeliver();
    const numBuffers = headerBytes === 12 ? [1, 0] : [];
    const bytes = stage.rig.destination.ram.slice(GOOD, headerBytes);
    expect([...bytes]).toEqual([...Array(10).fill(0), ...numBuffers]);
    expect(stage.receiveq.used()).toEqual([{ id: 0, len: headerBytes + 100 }]);
    expect(stage.transmitq.used()).toEqual([{ id: 0, len: 0 }]); // BI-209
  });

  test.each([1, 3, 5, 11])("BI-264 num_buffers is exact when the header spans buffers of %i bytes", (len) => {
    const stage = new Stage(receive);
    const count = Math.ceil(112 / len);
    for (let i = 0; i < count; i++) stage.receiveq.describe(i, { gpa: DATA + BigInt(i * 64), len, flags: WRITE });
    stage.receiveq.offer(...Array(count).keys());
    stage.send();
    stage.judge.poll();
    const used = stage.receiveq.used();
    const bytes = used.flatMap(({ id, len }) =>
      Array.from(stage.rig.destination.ram.slice(DATA + BigInt(id * 64), len)),
    );
    expect(bytes.length).toBe(112);
    expect(bytes.slice(0, 12)).toEqual([...Array(10).fill(0), count, 0]);
    expect(used.every((entry, i) => entry.len === (i + 1 < count ? len : 112 - len * (count - 1)))).toBe(true); // BI-209
  });

  test("BI-263 a frame needs 17 buffers, 16 are offered: nothing is published, and all of it when there is one more", () => {
    const stage = new Stage(receive);
    for (let i = 0; i < 17; i++) stage.receiveq.describe(i, { gpa: DATA + BigInt(i * 64), len: 64, flags: WRITE });
    stage.receiveq.offer(...Array(16).keys());
    stage.send(16 * 64 + 1 - 12);
    const before = Uint8Array.from(stage.rig.destination.ram.slice(DATA, 17 * 64));
    expect(stage.judge.poll()).toMatchObject({ taken: 0, waiting: true });
    expect(stage.receiveq.used()).toEqual([]);
    expect(Uint8Array.from(stage.rig.destination.ram.slice(DATA, 17 * 64))).toEqual(before);
    stage.receiveq.offer(16);
    expect(stage.judge.poll()).toMatchObject({ taken: 1, waiting: false });
    expect(stage.receiveq.used().map(({ len }) => len)).toEqual([...Array(16).fill(64), 1]);
  });

  test("BI-263 no buffers for too long: the frame is dropped whole", () => {
    const stage = new Stage(receive);
    stage.post(64);
    stage.send();
    expect(stage.judge.poll()).toMatchObject({ taken: 0, waiting: true });
    expect(stage.judge.poll(64, true)).toMatchObject({ taken: 1, waiting: true });
    expect(stage.rig.counters.drops.noBuffer).toBe(1);
    expect(stage.receiveq.used()).toEqual([]);
    stage.post(64);
    stage.send();
    expect(stage.judge.poll()).toMatchObject({ taken: 1, waiting: false });
  });

  test("BI-266 a buffer that is too small and may not be merged: the frame is dropped, the buffer kept", () => {
    const stage = new Stage(receive, { ring: { mergeable: false } });
    stage.post(111);
    stage.send(100);
    expect(stage.judge.poll()).toMatchObject({ taken: 1, waiting: false });
    expect(stage.rig.counters.drops.tooSmall).toBe(1);
    expect(stage.receiveq.used()).toEqual([]);
    stage.send(99);
    stage.judge.poll();
    expect(stage.receiveq.used()).toEqual([{ id: 0, len: 111 }]);
  });

  test("a whole ring of mergeable buffers too small for a frame: it is dropped, the buffers kept", () => {
    const stage = new Stage({ direction: "receive", format, size: 2 });
    stage.receiveq.describe(1, { gpa: DATA, len: 48, flags: WRITE });
    stage.post(48);
    stage.receiveq.offer(1);
    stage.send(100);
    expect(stage.judge.poll()).toMatchObject({ taken: 1, waiting: false });
    expect(stage.rig.counters.drops.tooSmall).toBe(1);
    stage.send(80);
    stage.judge.poll();
    expect(stage.receiveq.used()).toEqual([
      { id: 0, len: 48 },
      { id: 1, len: 44 },
    ]);
  });
});

describe.each(formats)("areas that overlap (%s)", (format) => {
  /** What the core reads may change by what it writes; so there is no reference, only limits. */
  test.each(["desc", "avail", "used"] as const)(
    "BI-201, BI-229 a receive buffer over the %s area of its own ring",
    (area) => {
      const stage = new Stage({ direction: "receive", format, size: 4 });
      stage.post();
      for (let i = 0; i < 4; i++)
        stage.receiveq.describe(i, { gpa: stage.receiveq.ring[area], len: 2048, flags: WRITE });
      stage.receiveq.offer(1, 2, 3);
      for (let i = 0; i < 20; i++) {
        if (format === "split" || i === 0) stage.send();
        expect(stage.rig.poll().taken).toBeLessThanOrEqual(4);
      }
    },
  );

  test.each(["desc", "avail", "used"] as const)(
    "BI-201, BI-229 a transmit buffer or table over the %s area is read as bytes",
    (area) => {
      const stage = new Stage({ direction: "transmit", format, size: 4 });
      for (const flags of [0, INDIRECT]) {
        stage.transmitq.describe(0, { gpa: stage.transmitq.ring[area], len: 64, flags });
        stage.post();
        stage.transmitq.offer(0);
        stage.judge.poll();
      }
      expect(stage.transmitq.used()).toHaveLength(2);
      stage.mustDeliver();
    },
  );

  test.each(["desc", "avail", "used"] as const)(
    "BI-201, BI-229 a receive buffer over the %s area of the transmitq in the same guest",
    (area) => {
      const stage = new Stage({ direction: "receive", format, size: 4 }, { loopback: true });
      for (let i = 0; i < 4; i++) {
        stage.receiveq.describe(i, { gpa: stage.transmitq.ring[area], len: 2048, flags: WRITE });
      }
      stage.receiveq.offer(0, 1, 2, 3);
      stage.send();
      for (let i = 0; i < 20; i++) expect(stage.rig.poll().taken).toBeLessThanOrEqual(4);
    },
  );
});
