/** TCP frames as RFC 791, 793, 1071 and 8200 have them: made, and cut the way a sender without offloads would have sent them. */

export interface TcpFrame {
  version: 4 | 6;
  /** VLAN tags between the Ethernet header and the IP header. */
  vlans: readonly number[];
  id: number;
  sequence: number;
  /** CWR 0x80, ECE 0x40, ..., PSH 0x08, FIN 0x01 */
  flags: number;
  /** Bytes of IPv4 options, a multiple of 4, or of one IPv6 extension header, a multiple of 8. */
  ipOptions: number;
  /** Bytes of TCP options, a multiple of 4. */
  tcpOptions: number;
  payload: Uint8Array;
}

interface BuiltFrame {
  bytes: Uint8Array;
  /** Where the TCP header begins, and the payload. */
  tcp: number;
  payload: number;
}

/** @param checksum `full`, or `partial`: of the pseudo header only, for the device to complete */
export function tcpFrame(frame: TcpFrame, checksum: "full" | "partial"): BuiltFrame {
  const { version, vlans, id, sequence, flags, ipOptions, tcpOptions, payload } = frame;
  const ethernet = Buffer.alloc(14 + 4 * vlans.length);
  ethernet.set([2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2]);
  for (const [i, tag] of vlans.entries()) {
    ethernet.writeUInt16BE(i === 0 && vlans.length > 1 ? 0x88a8 : 0x8100, 12 + 4 * i);
    ethernet.writeUInt16BE(tag, 14 + 4 * i);
  }
  ethernet.writeUInt16BE(version === 4 ? 0x0800 : 0x86dd, ethernet.length - 2);

  const segment = Buffer.alloc(20 + tcpOptions + payload.length);
  segment.writeUInt16BE(40_000, 0);
  segment.writeUInt16BE(5201, 2);
  segment.writeUInt32BE(sequence, 4);
  segment.writeUInt32BE(0x1234_5678, 8);
  segment[12] = ((20 + tcpOptions) / 4) << 4;
  segment[13] = flags;
  segment.writeUInt16BE(0xffff, 14);
  segment.fill(1, 20, 20 + tcpOptions);
  segment.set(payload, 20 + tcpOptions);

  const ip = version === 4 ? ipv4(id, ipOptions, segment.length) : ipv6(ipOptions, segment.length);
  const addresses = version === 4 ? ip.subarray(12, 20) : ip.subarray(8, 40);
  const pseudo = Buffer.concat([addresses, Buffer.from([0, 6, segment.length >> 8, segment.length & 0xff])]);
  const sum = checksum === "full" ? ~sumOf(Buffer.concat([pseudo, segment])) & 0xffff || 0xffff : sumOf(pseudo);
  segment.writeUInt16BE(sum, 16);
  const tcp = ethernet.length + ip.length;
  const bytes = Uint8Array.from(Buffer.concat([ethernet, ip, segment]));
  return { bytes, tcp, payload: tcp + 20 + tcpOptions };
}

/** The frames that carry the same in segments of at most `mss` bytes. */
export function cutFrame(frame: TcpFrame, mss: number): Uint8Array[] {
  const count = Math.max(1, Math.ceil(frame.payload.length / mss));
  return Array.from({ length: count }, (_, i) => {
    const isLast = i === count - 1;
    const part = {
      ...frame,
      id: (frame.id + i) & 0xffff,
      sequence: (frame.sequence + i * mss) >>> 0,
      flags: frame.flags & (isLast ? 0xff : 0xf6) & (i === 0 ? 0xff : 0x7f),
      payload: frame.payload.subarray(i * mss, (i + 1) * mss),
    };
    return tcpFrame(part, "full").bytes;
  });
}

function ipv4(id: number, options: number, payloadBytes: number): Buffer {
  const header = Buffer.alloc(20 + options, 1);
  header[0] = 0x40 | (header.length / 4);
  header[1] = 0;
  header.writeUInt16BE(header.length + payloadBytes, 2);
  header.writeUInt16BE(id, 4);
  header.writeUInt16BE(0x4000, 6);
  header.set([64, 6, 0, 0, 192, 168, 7, 1, 192, 168, 7, 2], 8);
  header.writeUInt16BE(~sumOf(header) & 0xffff, 10);
  return header;
}

function ipv6(extension: number, payloadBytes: number): Buffer {
  const header = Buffer.alloc(40 + extension);
  header[0] = 0x60;
  header.writeUInt16BE(extension + payloadBytes, 4);
  header.set([extension ? 0 : 6, 64], 6);
  for (let i = 8; i < 40; i++) header[i] = 17 * i;
  if (extension) header.set([6, extension / 8 - 1, 1, extension - 4], 40); // hop-by-hop options: PadN
  return header;
}

/** One's complement sum of big-endian words. */
function sumOf(bytes: Uint8Array): number {
  let sum = 0;
  for (const [i, byte] of bytes.entries()) sum += i % 2 === 0 ? byte << 8 : byte;
  while (sum > 0xffff) sum = (sum & 0xffff) + (sum >>> 16);
  return sum;
}
