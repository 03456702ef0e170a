/** The project's own capture: real-looking Ethernet whose every checksum and length is right. */
import { readFileSync } from "node:fs";
import { describe, expect, test } from "vitest";
import { exampleCapture, exampleFrames, internetChecksum } from "../../src/demo/frames.ts";
import { readPcap, writePcap } from "../../src/demo/pcap.ts";

const FILE = new URL("../../examples/traffic.pcap", import.meta.url);

/** One's complement sum as RFC 1071 words it, a byte at a time: 0xffff over data that hold their own checksum. */
function onesSum(bytes: Uint8Array): number {
  let sum = 0;
  for (const [i, byte] of bytes.entries()) {
    sum += i % 2 === 0 ? byte * 256 : byte;
    if (sum > 0xffff) sum -= 0xffff;
  }
  return sum;
}

const u16 = (bytes: Uint8Array, offset: number): number => bytes[offset]! * 256 + bytes[offset + 1]!;

interface Parsed {
  kind: string;
  vlan: boolean;
  /** Pseudo header and transport, or an ICMP message. */
  covered: Uint8Array;
  ipHeader: Uint8Array | undefined;
}

function parse(frame: Uint8Array): Parsed {
  const vlan = u16(frame, 12) === 0x8100;
  const type = u16(frame, vlan ? 16 : 12);
  const packet = frame.subarray(vlan ? 18 : 14);
  const names: Record<number, string> = { 1: "icmp", 6: "tcp", 17: "udp", 58: "icmpv6" };
  if (type === 0x0806) return { kind: "arp", vlan, covered: new Uint8Array(0), ipHeader: undefined };
  const four = type === 0x0800;
  expect(four || type === 0x86dd, `ethertype ${type}`).toBe(true);
  const protocol = packet[four ? 9 : 6]!;
  const payload = four ? packet.subarray(20, u16(packet, 2)) : packet.subarray(40, 40 + u16(packet, 4));
  const addresses = four ? packet.subarray(12, 20) : packet.subarray(8, 40);
  const pseudo = protocol === 1 ? [] : [...addresses, 0, protocol, payload.length >> 8, payload.length & 0xff];
  if (protocol === 17) expect(u16(payload, 4), "UDP length").toBe(payload.length);
  return {
    kind: `${names[protocol]}${four ? 4 : 6}`,
    vlan,
    covered: Uint8Array.from([...pseudo, ...payload]),
    ipHeader: four ? packet.subarray(0, 20) : undefined,
  };
}

describe("every frame", () => {
  test.each(exampleFrames().map((frame, i) => ({ i, frame, kind: parse(frame).kind })))("$i, $kind", ({ frame }) => {
    const { kind, covered, ipHeader } = parse(frame);
    expect(frame.length).toBeGreaterThanOrEqual(60);
    expect(frame.length).toBeLessThanOrEqual(1518);
    if (ipHeader) expect(onesSum(ipHeader), "IPv4 header checksum").toBe(0xffff);
    if (kind !== "arp") expect(onesSum(covered), `${kind} checksum`).toBe(0xffff);
  });
});

test("all that a network's start shows is there", () => {
  const frames = exampleFrames().map(parse);
  expect(new Set(frames.map(({ kind }) => kind))).toEqual(new Set(["arp", "icmp4", "icmpv66", "udp4", "udp6", "tcp4"]));
  expect(frames.some(({ vlan }) => vlan)).toBe(true);
});

test("internetChecksum gives RFC 1071's own example", () => {
  expect(internetChecksum(Uint8Array.of(0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7))).toBe(~0xddf2 & 0xffff);
});

test("examples/traffic.pcap is what the code makes; if not: node examples/write-traffic.ts", () => {
  const file = readFileSync(FILE);
  expect(file.equals(writePcap(exampleCapture()))).toBe(true);
  expect(readPcap(file).packets.map(({ data }) => Uint8Array.from(data))).toEqual(exampleFrames());
});
