/** The network's side of a TAP interface: packet sockets on it, packet(7), and frames to send there. */
import { closeSync, readSync, writeSync } from "node:fs";
import { check, libc } from "../../native/libc.ts";
import { findInterface } from "../../native/network-interface.ts";
import { NET_HDR_SIZE_LEGACY } from "../../src/layout/virtio.ts";

const AF_PACKET = 17;
const SOCK_RAW = 3;
const SOCK_NONBLOCK = 0o4000;
const SOCK_CLOEXEC = 0o2000000;
const SOL_SOCKET = 1;
const SO_SNDBUFFORCE = 32;
const SO_RCVBUFFORCE = 33;
const SOL_PACKET = 263;
const PACKET_VNET_HDR = 15;
const PACKET_IGNORE_OUTGOING = 23;
const ETH_P_ALL = 3;
const BUFFER_BYTES = 64 << 20;

const socket = libc.func("int socket(int domain, int type, int protocol)");
const bind = libc.func("int bind(int fd, void *address, unsigned int length)");
const setsockopt = libc.func("int setsockopt(int fd, int level, int name, void *value, unsigned int length)");

/** Sends frames into an interface, and sees those that come out of it. */
export class PacketSocket implements Disposable {
  readonly #fd: number;
  readonly #headerBytes: number;
  readonly #bytes = Buffer.alloc(70_000);

  /** @param hasHeaders each frame has a net header of 10 bytes before it, both ways */
  constructor(name: string, hasHeaders = false) {
    const index = findInterface(name)?.index;
    if (index === undefined) throw new Error(`no interface ${name}`);
    this.#fd = check(socket(AF_PACKET, SOCK_RAW | SOCK_NONBLOCK | SOCK_CLOEXEC, 0), "socket", "AF_PACKET");
    this.#headerBytes = hasHeaders ? NET_HDR_SIZE_LEGACY : 0;
    this.#set(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1);
    this.#set(SOL_SOCKET, SO_SNDBUFFORCE, BUFFER_BYTES);
    this.#set(SOL_SOCKET, SO_RCVBUFFORCE, BUFFER_BYTES);
    if (hasHeaders) this.#set(SOL_PACKET, PACKET_VNET_HDR, 1);
    // struct sockaddr_ll: family, protocol (big-endian), index
    const address = Buffer.alloc(20);
    address.writeUInt16LE(AF_PACKET, 0);
    address.writeUInt16BE(ETH_P_ALL, 2);
    address.writeInt32LE(index, 4);
    check(bind(this.#fd, address, address.length), "bind", `to interface ${name}`);
  }

  #set(level: number, option: number, value: number): void {
    check(setsockopt(this.#fd, level, option, new Int32Array([value]), 4), "setsockopt", `option ${option}`);
  }

  /** @returns false if the interface is down, or gone */
  send(frame: Uint8Array, header?: Uint8Array): boolean {
    const before = Buffer.alloc(this.#headerBytes);
    before.set(header ?? []);
    try {
      return writeSync(this.#fd, Buffer.concat([before, frame])) > 0;
    } catch (error) {
      if (["ENETDOWN", "ENXIO"].includes((error as NodeJS.ErrnoException).code ?? "")) return false;
      throw error;
    }
  }

  /** The next frame that came out, or undefined. */
  receive(): { header: Buffer; frame: Buffer } | undefined {
    try {
      const bytes = Buffer.from(this.#bytes.subarray(0, readSync(this.#fd, this.#bytes)));
      return { header: bytes.subarray(0, this.#headerBytes), frame: bytes.subarray(this.#headerBytes) };
    } catch (error) {
      if (["EAGAIN", "ENETDOWN"].includes((error as NodeJS.ErrnoException).code ?? "")) return undefined;
      throw error;
    }
  }

  [Symbol.dispose](): void {
    closeSync(this.#fd);
  }
}

/** Of local experiments: no stack answers. */
const ETHERTYPE = 0x88b5;
export const FRAME_BYTES_MIN = 14;
export const HOST_MAC = "020000000001";
export const GUEST_MAC = "020000000002";
/** A bridge sends it to all ports, and keeps no copy. */
const NOBODY_MAC = "020000000003";

const filling = Buffer.from(Uint8Array.from({ length: 70_000 }, (_, i) => (i * i * 7 + (i >> 3)) & 0xff));

/** Frame number k: every byte behind the Ethernet header depends on it, the number is in the sender's address. */
export function numbered(k: number, length: number): Buffer {
  const start = k % 251;
  const bytes = Buffer.from(filling.subarray(start, start + length));
  bytes.write(`${NOBODY_MAC}02`, "hex");
  bytes.writeUInt32BE(k, 7);
  bytes[11] = 0;
  bytes.writeUInt16BE(ETHERTYPE, 12);
  return bytes;
}

/** The number of such a frame. */
export function numberOf(frame: Buffer): number {
  return frame.readUInt32BE(7);
}

export const isNumbered = (frame: Buffer): boolean => frame.readUInt16BE(12) === ETHERTYPE;

export interface Flow {
  macs: { from: string; to: string };
  ips: { from: string; to: string };
  ports: { from: number; to: number };
}

export const reversed = ({ macs, ips, ports }: Flow): Flow => ({
  macs: { from: macs.to, to: macs.from },
  ips: { from: ips.to, to: ips.from },
  ports: { from: ports.to, to: ports.from },
});

/** Where the transport header begins in frames made here. */
export const TRANSPORT = 34;

/** An IPv4 frame with UDP. @param checksum `partial`: of the pseudo header only, for somebody else to complete */
export function udpFrame(flow: Flow, payload: Uint8Array, checksum: "full" | "partial"): Buffer {
  const segment = Buffer.alloc(8 + payload.length);
  segment.writeUInt16BE(flow.ports.from, 0);
  segment.writeUInt16BE(flow.ports.to, 2);
  segment.writeUInt16BE(segment.length, 4);
  segment.set(payload, 8);
  return ipFrame(flow, 17, segment, 6, checksum);
}

/** An IPv4 frame with TCP. @param flags ACK 0x10, PSH 0x08, SYN 0x02 */
export function tcpFrame(
  flow: Flow,
  { sequence, acknowledged, flags }: { sequence: number; acknowledged: number; flags: number },
  payload: Uint8Array,
  checksum: "full" | "partial",
): Buffer {
  const segment = Buffer.alloc(20 + payload.length);
  segment.writeUInt16BE(flow.ports.from, 0);
  segment.writeUInt16BE(flow.ports.to, 2);
  segment.writeUInt32BE(sequence >>> 0, 4);
  segment.writeUInt32BE(acknowledged >>> 0, 8);
  segment[12] = 0x50;
  segment[13] = flags;
  segment.writeUInt16BE(0xffff, 14);
  segment.set(payload, 20);
  return ipFrame(flow, 6, segment, 16, checksum);
}

function ipFrame(flow: Flow, protocol: number, segment: Buffer, sumAt: number, checksum: "full" | "partial"): Buffer {
  const { macs, ips } = flow;
  const addresses = Buffer.from([...ips.from.split("."), ...ips.to.split(".")].map(Number));
  const pseudo = Buffer.concat([addresses, Buffer.from([0, protocol, segment.length >> 8, segment.length & 0xff])]);
  const sum = checksum === "full" ? ~sumOf(Buffer.concat([pseudo, segment])) & 0xffff || 0xffff : sumOf(pseudo);
  segment.writeUInt16BE(sum, sumAt);
  const ethernet = Buffer.from(`${macs.to}${macs.from}0800`, "hex");
  const header = Buffer.alloc(20);
  header[0] = 0x45;
  header.writeUInt16BE(20 + segment.length, 2);
  header.writeUInt16BE(0x4000, 6);
  header.set([64, protocol], 8);
  header.set(addresses, 12);
  header.writeUInt16BE(~sumOf(header) & 0xffff, 10);
  return Buffer.concat([ethernet, header, segment]);
}

/** Whether IPv4 header and UDP or TCP checksum are right, of a frame made as here. */
export function isSound(frame: Buffer): boolean {
  const header = frame.subarray(14, TRANSPORT);
  const segment = frame.subarray(TRANSPORT, 14 + header.readUInt16BE(2));
  const pseudo = Buffer.concat([
    header.subarray(12, 20),
    Buffer.from([0, header[9]!, segment.length >> 8, segment.length & 0xff]),
  ]);
  return sumOf(header) === 0xffff && sumOf(Buffer.concat([pseudo, segment])) === 0xffff;
}

/** One's complement sum of big-endian words. */
function sumOf(bytes: Uint8Array): number {
  let sum = 0;
  for (const [i, byte] of bytes.entries()) sum += i % 2 === 0 ? byte << 8 : byte;
  while (sum > 0xffff) sum = (sum & 0xffff) + (sum >>> 16);
  return sum;
}

/** struct virtio_net_hdr, of 10 bytes. */
export function netHeader(fields: {
  flags?: number;
  gsoType?: number;
  headerBytes?: number;
  gsoBytes?: number;
  csumStart?: number;
  csumOffset?: number;
}): Buffer {
  const { flags = 0, gsoType = 0, headerBytes = 0, gsoBytes = 0, csumStart = 0, csumOffset = 0 } = fields;
  const bytes = Buffer.alloc(NET_HDR_SIZE_LEGACY);
  bytes.set([flags, gsoType]);
  for (const [i, field] of [headerBytes, gsoBytes, csumStart, csumOffset].entries())
    bytes.writeUInt16LE(field, 2 + 2 * i);
  return bytes;
}
