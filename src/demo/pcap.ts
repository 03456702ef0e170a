/**
 * Capture files in the classic pcap format, read in every variant and written in the host's usual one.
 *
 * Truth: draft-ietf-opsawg-pcap: a 24-byte file header, then per packet 16 bytes and the captured octets; the magic
 * number tells byte order and whether time stamps count microseconds or nanoseconds.
 */
import { ConfigError } from "../errors.ts";

export const LINKTYPE_ETHERNET = 1;

const MAGIC_MICROSECONDS = 0xa1b2c3d4;
const MAGIC_NANOSECONDS = 0xa1b23c4d;
const FILE_HEADER_SIZE = 24;
const PACKET_HEADER_SIZE = 16;
const VERSION_MAJOR = 2;
const VERSION_MINOR = 4;
const SNAPLEN = 262144;

/** One captured packet. */
interface Packet {
  /** Nanoseconds since the epoch. */
  timeNs: bigint;
  /** The captured octets: a view into the file that was read. */
  data: Uint8Array;
  /** The packet's length on the wire; more than data.length where the capture was cut short. */
  originalLength: number;
}

export interface Capture {
  linkType: number;
  packets: Packet[];
}

/**
 * Reads a whole capture file.
 * @throws ConfigError if it is not a classic pcap file or is truncated
 */
export function readPcap(file: Uint8Array): Capture {
  const view = new DataView(file.buffer, file.byteOffset, file.byteLength);
  if (file.length < FILE_HEADER_SIZE)
    throw new ConfigError(`a pcap file of ${file.length} bytes: its header alone takes 24`);
  const littleEndian = isMagic(view.getUint32(0, true));
  const magic = view.getUint32(0, littleEndian);
  if (!isMagic(magic)) {
    throw new ConfigError(`not a classic pcap file (magic 0x${magic.toString(16)}); convert pcapng by editcap -F pcap`);
  }
  const nsPerTick = magic === MAGIC_NANOSECONDS ? 1n : 1000n;
  const packets: Packet[] = [];
  for (let at = FILE_HEADER_SIZE; at < file.length;) {
    const data = at + PACKET_HEADER_SIZE;
    const end = data > file.length ? Infinity : data + view.getUint32(at + 8, littleEndian);
    if (end > file.length) throw new ConfigError(`pcap file is cut off in packet ${packets.length}, at byte ${at}`);
    const seconds = BigInt(view.getUint32(at, littleEndian));
    const ticks = BigInt(view.getUint32(at + 4, littleEndian));
    packets.push({
      timeNs: seconds * 1_000_000_000n + ticks * nsPerTick,
      data: file.subarray(data, end),
      originalLength: view.getUint32(at + 12, littleEndian),
    });
    at = end;
  }
  // The upper bits may tell the length of the frame check sequence.
  return { linkType: view.getUint32(20, littleEndian) & 0x0fff_ffff, packets };
}

/** The bytes of a capture file; little-endian with microseconds unless told. */
export function writePcap(
  { linkType, packets }: Capture,
  { littleEndian = true, nanoseconds = false }: { littleEndian?: boolean; nanoseconds?: boolean } = {},
): Uint8Array {
  const bytes = packets.reduce((sum, packet) => sum + PACKET_HEADER_SIZE + packet.data.length, FILE_HEADER_SIZE);
  const file = new Uint8Array(bytes);
  const view = new DataView(file.buffer);
  view.setUint32(0, nanoseconds ? MAGIC_NANOSECONDS : MAGIC_MICROSECONDS, littleEndian);
  view.setUint16(4, VERSION_MAJOR, littleEndian);
  view.setUint16(6, VERSION_MINOR, littleEndian);
  view.setUint32(16, SNAPLEN, littleEndian);
  view.setUint32(20, linkType, littleEndian);
  let at = FILE_HEADER_SIZE;
  for (const { timeNs, data, originalLength } of packets) {
    view.setUint32(at, Number(timeNs / 1_000_000_000n), littleEndian);
    view.setUint32(at + 4, Number((timeNs % 1_000_000_000n) / (nanoseconds ? 1n : 1000n)), littleEndian);
    view.setUint32(at + 8, data.length, littleEndian);
    view.setUint32(at + 12, originalLength, littleEndian);
    file.set(data, at + PACKET_HEADER_SIZE);
    at += PACKET_HEADER_SIZE + data.length;
  }
  return file;
}

function isMagic(word: number): boolean {
  return word === MAGIC_MICROSECONDS || word === MAGIC_NANOSECONDS;
}
