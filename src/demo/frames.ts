/**
 * The Ethernet frames of two hosts that meet on a network: the demo's own traffic, and examples/traffic.pcap.
 *
 * Truth: RFC 826 (ARP), 791 and 8200 (IPv4, IPv6), 792 and 4443 (ICMP), 4861 (neighbour discovery), 9293 (TCP),
 * 768 (UDP), 1071 (checksums), IEEE 802.1Q (VLAN tag). Documentation addresses only: RFC 5737, 3849, 7042.
 */
import { LINKTYPE_ETHERNET } from "./pcap.ts";
import type { Capture } from "./pcap.ts";

const ETHERTYPE_IPV4 = 0x0800;
const ETHERTYPE_ARP = 0x0806;
const ETHERTYPE_VLAN = 0x8100;
const ETHERTYPE_IPV6 = 0x86dd;
const ICMP = 1;
const TCP = 6;
const UDP = 17;
const ICMPV6 = 58;
const FRAME_SIZE_MIN = 60; // without the frame check sequence
const MSS = 1460;

const FIN = 0x01;
const SYN = 0x02;
const PSH = 0x08;
const ACK = 0x10;

/** Concatenation; a number is one octet. */
const octets = (...parts: (number | Uint8Array | number[])[]): Uint8Array =>
  Uint8Array.from(parts.flatMap((part) => (typeof part === "number" ? [part] : [...part])));
const u16 = (value: number): number[] => [(value >>> 8) & 0xff, value & 0xff];
const u32 = (value: number): number[] => [...u16(value >>> 16), ...u16(value)];
const text = (value: string): Uint8Array => new TextEncoder().encode(value);
/** Printable filling, as ping and iperf use. */
const filler = (length: number): Uint8Array => Uint8Array.from({ length }, (_, i) => 0x20 + (i % 95));

/** The Internet checksum of RFC 1071 over the parts in turn; every part but the last has an even length. */
export function internetChecksum(...parts: Uint8Array[]): number {
  let sum = 0;
  for (const part of parts) {
    for (let i = 0; i < part.length; i += 2) sum += (part[i]! << 8) | (part[i + 1] ?? 0);
  }
  while (sum > 0xffff) sum = (sum >>> 16) + (sum & 0xffff);
  return ~sum & 0xffff;
}

interface Host {
  mac: number[];
  ipv4: number[];
  ipv6: number[];
}

const host = (last: number): Host => ({
  mac: [0x00, 0x00, 0x5e, 0x00, 0x53, last],
  ipv4: [192, 0, 2, last],
  ipv6: [0x20, 0x01, 0x0d, 0xb8, ...Array<number>(11).fill(0), last],
});

const ALICE = host(1);
const BOB = host(2);
const BROADCAST = Array<number>(6).fill(0xff);

function ethernet(from: Host, to: number[], type: number, payload: Uint8Array, vlan?: number): Uint8Array {
  const tag = vlan === undefined ? [] : [...u16(ETHERTYPE_VLAN), ...u16(vlan)];
  const frame = octets(to, from.mac, tag, u16(type), payload);
  return frame.length < FRAME_SIZE_MIN ? octets(frame, new Uint8Array(FRAME_SIZE_MIN - frame.length)) : frame;
}

/** Copies `packet` with its checksum, computed over `pseudoHeader` and itself, put at `offset`. */
function sealed(packet: Uint8Array, offset: number, pseudoHeader: Uint8Array = new Uint8Array(0)): Uint8Array {
  const copy = packet.slice();
  copy.set(u16(internetChecksum(pseudoHeader, packet)), offset);
  return copy;
}

function arp(operation: number, from: Host, to: Host, toMac: number[]): Uint8Array {
  const target = operation === 1 ? Array<number>(6).fill(0) : to.mac;
  const body = octets(u16(1), u16(ETHERTYPE_IPV4), 6, 4, u16(operation), from.mac, from.ipv4, target, to.ipv4);
  return ethernet(from, toMac, ETHERTYPE_ARP, body);
}

function ipv4(from: Host, to: Host, protocol: number, payload: Uint8Array, vlan?: number): Uint8Array {
  // Never fragmented (DF), so that the identification may be 0 (RFC 6864, 4.1).
  const header = octets(
    0x45,
    0,
    u16(20 + payload.length),
    u16(0),
    u16(0x4000),
    64,
    protocol,
    u16(0),
    from.ipv4,
    to.ipv4,
  );
  return ethernet(from, to.mac, ETHERTYPE_IPV4, octets(sealed(header, 10), payload), vlan);
}

function ipv6(from: Host, to: Host, protocol: number, payload: Uint8Array, hops = 64): Uint8Array {
  const header = octets(u32(0x6000_0000), u16(payload.length), protocol, hops, from.ipv6, to.ipv6);
  return ethernet(from, to.mac, ETHERTYPE_IPV6, octets(header, payload));
}

const pseudo4 = (from: Host, to: Host, protocol: number, length: number): Uint8Array =>
  octets(from.ipv4, to.ipv4, 0, protocol, u16(length));
const pseudo6 = (from: Host, to: Host, protocol: number, length: number): Uint8Array =>
  octets(from.ipv6, to.ipv6, u32(length), u32(protocol));

function ping4(from: Host, to: Host, type: number, sequence: number, vlan?: number): Uint8Array {
  return ipv4(from, to, ICMP, sealed(octets(type, 0, u16(0), u16(0x1d), u16(sequence), filler(56)), 2), vlan);
}

function icmp6(from: Host, to: Host, message: Uint8Array, hops?: number): Uint8Array {
  return ipv6(from, to, ICMPV6, sealed(message, 2, pseudo6(from, to, ICMPV6, message.length)), hops);
}

function udpSegment(ports: [number, number], payload: Uint8Array, pseudo: (length: number) => Uint8Array): Uint8Array {
  const length = 8 + payload.length;
  return sealed(octets(u16(ports[0]), u16(ports[1]), u16(length), u16(0), payload), 6, pseudo(length));
}

function udp4(from: Host, to: Host, ports: [number, number], payload: Uint8Array, vlan?: number): Uint8Array {
  return ipv4(
    from,
    to,
    UDP,
    udpSegment(ports, payload, (length) => pseudo4(from, to, UDP, length)),
    vlan,
  );
}

function udp6(from: Host, to: Host, ports: [number, number], payload: Uint8Array): Uint8Array {
  return ipv6(
    from,
    to,
    UDP,
    udpSegment(ports, payload, (length) => pseudo6(from, to, UDP, length)),
  );
}

interface Segment {
  ports: [number, number];
  sequence: number;
  acknowledged: number;
  flags: number;
  payload?: Uint8Array;
}

function tcp4(from: Host, to: Host, { ports, sequence, acknowledged, flags, payload }: Segment): Uint8Array {
  const options = flags & SYN ? [2, 4, ...u16(MSS)] : [];
  const head = octets(
    u16(ports[0]),
    u16(ports[1]),
    u32(sequence),
    u32(acknowledged),
    (20 + options.length) << 2,
    flags,
  );
  const segment = octets(head, u16(0xffff), u16(0), u16(0), options, payload ?? []);
  return ipv4(from, to, TCP, sealed(segment, 16, pseudo4(from, to, TCP, segment.length)));
}

/** A whole connection: handshake, a request, an answer in full-size segments, close. */
function conversation(): Uint8Array[] {
  const request = text("GET /index.html HTTP/1.1\r\nHost: www.example.com\r\n\r\n");
  const body = filler(2 * MSS);
  const up: [number, number] = [49152, 80];
  const down: [number, number] = [80, 49152];
  const [a, b] = [1000, 0xffff_f000]; // bob's sequence numbers pass 2^32 on the way
  const atB = (n: number): number => (b + n) >>> 0;
  const asked = a + 1 + request.length;
  return [
    tcp4(ALICE, BOB, { ports: up, sequence: a, acknowledged: 0, flags: SYN }),
    tcp4(BOB, ALICE, { ports: down, sequence: b, acknowledged: a + 1, flags: SYN | ACK }),
    tcp4(ALICE, BOB, { ports: up, sequence: a + 1, acknowledged: atB(1), flags: ACK }),
    tcp4(ALICE, BOB, { ports: up, sequence: a + 1, acknowledged: atB(1), flags: PSH | ACK, payload: request }),
    tcp4(BOB, ALICE, {
      ports: down,
      sequence: atB(1),
      acknowledged: asked,
      flags: ACK,
      payload: body.subarray(0, MSS),
    }),
    tcp4(BOB, ALICE, {
      ports: down,
      sequence: atB(1 + MSS),
      acknowledged: asked,
      flags: PSH | ACK,
      payload: body.subarray(MSS),
    }),
    tcp4(ALICE, BOB, { ports: up, sequence: asked, acknowledged: atB(1 + 2 * MSS), flags: FIN | ACK }),
    tcp4(BOB, ALICE, { ports: down, sequence: atB(1 + 2 * MSS), acknowledged: asked + 1, flags: FIN | ACK }),
    tcp4(ALICE, BOB, { ports: up, sequence: asked + 1, acknowledged: atB(2 + 2 * MSS), flags: ACK }),
  ];
}

/** The frames, the same at every call: ARP, ICMP, neighbour discovery, ICMPv6, UDP, TCP, VLAN. */
export function exampleFrames(): Uint8Array[] {
  const name = [7, ...text("example"), 3, ...text("com"), 0];
  const question = octets(name, u16(1), u16(1));
  const query = octets(u16(0x2a2a), u16(0x0100), u16(1), u16(0), u16(0), u16(0), question);
  const records = octets(u16(0xc00c), u16(1), u16(1), u32(300), u16(4), BOB.ipv4);
  const answer = octets(u16(0x2a2a), u16(0x8180), u16(1), u16(1), u16(0), u16(0), question, records);
  return [
    arp(1, ALICE, BOB, BROADCAST),
    arp(2, BOB, ALICE, ALICE.mac),
    ...[1, 2, 3].flatMap((sequence) => [ping4(ALICE, BOB, 8, sequence), ping4(BOB, ALICE, 0, sequence)]),
    icmp6(ALICE, BOB, octets(135, 0, u16(0), u32(0), BOB.ipv6, 1, 1, ALICE.mac), 255),
    icmp6(BOB, ALICE, octets(136, 0, u16(0), u32(0x6000_0000), BOB.ipv6, 2, 1, BOB.mac), 255),
    icmp6(ALICE, BOB, octets(128, 0, u16(0), u16(0x1d), u16(1), filler(57))),
    icmp6(BOB, ALICE, octets(129, 0, u16(0), u16(0x1d), u16(1), filler(57))),
    udp4(ALICE, BOB, [50000, 53], query),
    udp4(BOB, ALICE, [53, 50000], answer),
    udp6(ALICE, BOB, [50001, 9], filler(1401)),
    ...conversation(),
    udp4(ALICE, BOB, [50002, 9], filler(18), 42),
    ping4(ALICE, BOB, 8, 4, 42),
    ping4(BOB, ALICE, 0, 4, 42),
  ];
}

/** What examples/traffic.pcap holds: the frames, a millisecond apart. */
export function exampleCapture(): Capture {
  const start = 1_600_000_000_000_000_000n;
  const packets = exampleFrames().map((data, i) => ({
    timeNs: start + BigInt(i) * 1_000_000n,
    data,
    originalLength: data.length,
  }));
  return { linkType: LINKTYPE_ETHERNET, packets };
}
