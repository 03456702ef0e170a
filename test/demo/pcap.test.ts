/** The classic pcap format: draft-ietf-opsawg-pcap. */
import { describe, expect, test } from "vitest";
import { LINKTYPE_ETHERNET, readPcap, writePcap } from "../../src/demo/pcap.ts";
import { ConfigError } from "../../src/errors.ts";

const CAPTURE = {
  linkType: LINKTYPE_ETHERNET,
  packets: [
    { timeNs: 1_600_000_000_123_456_789n, data: Uint8Array.of(1, 2, 3), originalLength: 3 },
    { timeNs: 4_294_967_295_999_999_000n, data: new Uint8Array(0), originalLength: 0 },
    { timeNs: 0n, data: new Uint8Array(9000).fill(7), originalLength: 65_535 },
  ],
};

describe("a capture written and read again is the same", () => {
  test.each([true, false])("nanoseconds, little-endian %s", (littleEndian) => {
    expect(readPcap(writePcap(CAPTURE, { littleEndian, nanoseconds: true }))).toEqual(CAPTURE);
  });

  test.each([true, false])("microseconds lose the digits below, little-endian %s", (littleEndian) => {
    const packets = CAPTURE.packets.map((packet) => ({ ...packet, timeNs: (packet.timeNs / 1000n) * 1000n }));
    expect(readPcap(writePcap(CAPTURE, { littleEndian }))).toEqual({ ...CAPTURE, packets });
  });
});

test("the header's bytes are those of the format: magic, version 2.4, snap length, link type", () => {
  const empty = { linkType: LINKTYPE_ETHERNET, packets: [] };
  expect(Buffer.from(writePcap(empty)).toString("hex")).toBe("d4c3b2a10200040000000000000000000000040001000000");
  expect(Buffer.from(writePcap(empty, { littleEndian: false, nanoseconds: true })).toString("hex")).toBe(
    "a1b23c4d0002000400000000000000000004000000000001",
  );
});

test("a view that does not begin at its buffer's start is read from where it begins", () => {
  const file = writePcap(CAPTURE, { nanoseconds: true });
  const shifted = new Uint8Array(file.length + 5);
  shifted.set(file, 5);
  expect(readPcap(shifted.subarray(5))).toEqual(CAPTURE);
});

test.each([
  ["nothing", 0],
  ["half a file header", 12],
  ["half a packet header", 24 + 8],
  ["half a packet", 24 + 16 + 1],
])("%s is refused", (_, length) => {
  expect(() => readPcap(writePcap(CAPTURE).subarray(0, length))).toThrow(ConfigError);
});

test("another magic number is refused, with the way out", () => {
  expect(() => readPcap(Buffer.from("0a0d0d0a".padEnd(56, "0"), "hex"))).toThrow(/pcapng.*editcap/);
});
